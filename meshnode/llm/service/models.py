"""Which model a name means, whatever engine answers for it, and what can be said of each model here and now."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import ModelCard
from meshnode.llm.service.loaded import Told
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.templates.model import TemplateSource
from protocol.ids import NodeId
from protocol.sharding.shapes import ModelShape

AUTO: Final = "auto"


class Known(Protocol):
    """A model as the mesh's records describe it."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def shape(self) -> ModelShape: ...


class Library(Protocol):
    """Manifests and holdings."""

    def find(self, name: str) -> Manifest: ...
    def named(self, name: str) -> Manifest | None: ...
    def manifest(self, digest: str) -> Manifest | None: ...
    def manifests(self) -> list[Manifest]: ...
    def holders(self, digest: str) -> list[NodeId]: ...
    def holds(self, node: NodeId, digest: str) -> tuple[tuple[int, int], ...]: ...
    async def template(self, digest: str) -> str: ...


def parse_aliases(pairs: Sequence[str]) -> dict[str, str]:
    """The setting llm.aliases, each ALIAS=MODEL. Raises MeshError BAD_SETTING."""
    found = {}
    for pair in pairs:
        alias, equals, model = pair.partition("=")
        if not (alias and equals and model):
            raise MeshError(ErrorCode.BAD_SETTING, f"llm.aliases: {pair!r} is not ALIAS=MODEL.")
        found[alias] = model
    return found


class Models:
    """See the module. `ready` says which digests answered a probe and are loaded now."""

    def __init__(
        self,
        *,
        library: Library,
        aliases: Mapping[str, str],
        default: str,
        pinned: Sequence[str],
        states: Callable[[], Mapping[str, Told]],
    ) -> None:
        self._library = library
        self._aliases = dict(aliases)
        self._default = default
        self._pinned = frozenset(pinned)
        self._states = states

    def find(self, name: str) -> Manifest:
        """The model of a name, alias or `auto`. Raises MeshError NOT_FOUND with near names."""
        wanted = self._aliases.get(name, name)
        if wanted == AUTO:
            return self._auto()
        return self._library.find(wanted)

    def known(self, name: str) -> Manifest | None:
        """The model of exactly this name or alias, or None."""
        return self._library.named(self._aliases.get(name, name))

    def is_pinned(self, digest: str) -> bool:
        """Whether it stays loaded, by this node's settings or any other's."""
        told = self._states().get(digest)
        if told is not None and told.pinned:
            return True
        found = self._library.manifest(digest)
        return found is not None and (found.name in self._pinned or bool(self._pinned.intersection(found.aliases)))

    async def template(self, known: Known) -> TemplateSource:
        """How the model wants a conversation written."""
        found = self._library.manifest(known.digest)
        if found is None:
            raise MeshError(ErrorCode.NOT_FOUND, f"{known.name} was removed. Pull it again.")
        template = found.chat_template
        if found.template_cut:
            template = await self._library.template(found.digest)
        return TemplateSource(
            template=template or None,
            architecture=found.shape.architecture,
            bos=found.bos,
            eos=found.eos,
            adds_bos=found.adds_bos,
        )

    def cards(self) -> list[ModelCard]:
        """Every model, those that are ready first, then the newest."""
        states = self._states()
        aliases: dict[str, list[str]] = {}
        for alias, model in self._aliases.items():
            aliases.setdefault(model, []).append(alias)
        cards = [
            self._card(found, states.get(found.digest), aliases.get(found.name, []))
            for found in self._library.manifests()
        ]
        return sorted(cards, key=lambda card: (not card.ready, -card.created, card.name))

    def shapes(self) -> list[ModelShape]:
        """Of every model that somebody holds."""
        return [found.shape for found in self._library.manifests()]

    def _missing(self, found: Manifest) -> str:
        """Why it cannot be loaded at all: layers of which there is no copy in the mesh, nor anywhere to fetch one."""
        if found.source:
            return ""
        held = {
            layer
            for node in self._library.holders(found.digest)
            for first, last in self._library.holds(node, found.digest)
            for layer in range(first, last)
        }
        missing = found.layers - len(held)
        if not missing:
            return ""
        return f"no member holds {missing} of its {found.layers} layers; `meshnode pull` it from where it came"

    def _card(self, found: Manifest, told: Told | None, aliases: Sequence[str]) -> ModelCard:
        reason = self._missing(found)
        if not reason and told is not None:
            reason = told.words
        if told is not None and told.state == "failed":
            reason += ". Whoever asks for it has it tried again."
        return ModelCard(
            name=found.name,
            digest=found.digest,
            aliases=(*found.aliases, *aliases),
            description=found.description,
            architecture=found.shape.architecture,
            quantization=found.shape.quantisation,
            parameters=found.shape.parameters,
            file_bytes=found.bytes,
            layers=found.layers,
            context_max=found.shape.context_max,
            embeds=found.shape.embeds,
            heads=found.shape.heads,
            embed_length=found.shape.n_embd,
            licence=found.licence,
            source=found.source,
            held_by=tuple(self._library.holders(found.digest)),
            ready=told is not None and told.state == "ready",
            state="idle" if told is None else told.state,
            pinned=self.is_pinned(found.digest),
            reason=reason,
            created=found.created,
        )

    def _auto(self) -> Manifest:
        """What the settings say; else one that is ready; else the largest that talks and is all here."""
        if self._default:
            return self._library.find(self._default)
        talking = [found for found in self._library.manifests() if not found.shape.embeds]
        whole = [found for found in talking if not self._missing(found)]
        if talking and not whole:
            # Who holds it is starting, or was lost a moment ago: that there is a model is known.
            first = min(talking, key=lambda found: found.name)
            raise MeshError(
                ErrorCode.UNAVAILABLE,
                f"No model can be run now; of {first.name}, {self._missing(first)}. Try again when the nodes that hold "
                "it are up.",
                retryable=True,
            )
        if not whole:
            raise MeshError(
                ErrorCode.NOT_FOUND, "There is no model in this mesh yet. `meshnode models --all` lists some to pull."
            )
        ready = {digest for digest, told in self._states().items() if told.state == "ready"}
        return max(whole, key=lambda found: (found.digest in ready, found.shape.parameters, found.name))
