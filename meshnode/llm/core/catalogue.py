"""Well-known open models: what they are called, where they are fetched from, and about what they need.

The list itself is data (meshnode/llm/data/catalogue.json). Its figures serve to say "will it fit here" before anything
is fetched; what is `approximate` there is replaced by the facts of the file's header when a model is pulled.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Final

import msgspec

from protocol.sharding.shapes import ModelShape

NEAR_MAX: Final = 5
KV_ITEM_BYTES: Final = 2
"""Keys and values are kept as F16."""


class CatalogueFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a model, or the first of its parts. `bytes` of all parts; `approximate`: rounded, or not looked
    up."""

    quantisation: str
    ref: str
    bytes: int
    approximate: bool


class CatalogueModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model. Its first file is the one meant when none is named."""

    name: str
    aliases: tuple[str, ...]
    description: str
    architecture: str
    parameters: int
    layers: int
    n_embd: int
    heads: int
    heads_kv: int
    head_size: int
    n_vocab: int
    context_max: int
    licence: str
    tied: bool
    embeds: bool
    experts: int
    experts_used: int
    files: tuple[CatalogueFile, ...]


class CatalogueEntry(msgspec.Struct, frozen=True, eq=False):
    """A model in one quantisation, by the name that it goes by there; the default one also goes by its model's name."""

    name: str
    model: CatalogueModel
    file: CatalogueFile

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that it may be called, the shortest first."""
        is_default = self.file is self.model.files[0]
        every = [self.model.name, *self.model.aliases]
        suffixed = [f"{name}-{self.file.quantisation.lower()}" for name in every]
        return (*every, *suffixed) if is_default else tuple(suffixed)


class Catalogue:
    """The list, by name. Names are compared without regard to case."""

    def __init__(self, models: Sequence[CatalogueModel]) -> None:
        """Raises ValueError if two models share a name."""
        self.entries: tuple[CatalogueEntry, ...] = tuple(_entries(models))
        named: dict[str, CatalogueEntry] = {}
        for entry in self.entries:
            for name in entry.names:
                if named.setdefault(name.casefold(), entry) is not entry:
                    raise ValueError(f"two models of the catalogue are called {name}")
        self._named: Mapping[str, CatalogueEntry] = named

    def find(self, name: str) -> CatalogueEntry | None:
        """The entry of exactly this name. `latest` behind a colon means nothing and is passed over."""
        wanted = name.strip().casefold().removesuffix(":latest")
        return self._named.get(wanted)

    def names(self) -> list[str]:
        """The shortest name of each entry, in the order of the list."""
        return [entry.names[0] for entry in self.entries]

    def near(self, name: str) -> list[str]:
        """Names that look like this one: of the same family, then similarly written."""
        wanted = name.strip().casefold()
        family = wanted.partition(":")[0]
        same = [known for known in self.names() if family and known.casefold().partition(":")[0] == family]
        close = get_close_matches(wanted, list(self._named), NEAR_MAX, 0.6)
        return list(dict.fromkeys([*same, *close]))[:NEAR_MAX]


def read_catalogue(data: bytes) -> Catalogue:
    """The catalogue from its JSON. Raises msgspec.MsgspecError or ValueError: a defect of the package."""
    return Catalogue(msgspec.json.decode(data, type=tuple[CatalogueModel, ...]))


def shape_of(entry: CatalogueEntry, *, cuts: tuple[int, ...] = (), uncut_reason: str = "") -> ModelShape:
    """About what the model needs: its bytes spread over its weights alike. The digest is empty."""
    model, file = entry.model, entry.file
    embedding = model.n_embd * model.n_vocab * file.bytes // max(1, model.parameters)
    stored = embedding * (1 if model.tied else 2)
    layer = max(1, (file.bytes - min(stored, file.bytes * 9 // 10)) // model.layers)
    return ModelShape(
        digest="",
        name=entry.names[0],
        architecture=model.architecture,
        quantisation=file.quantisation,
        n_embd=model.n_embd,
        n_vocab=model.n_vocab,
        context_max=model.context_max,
        layer_bytes=(layer,) * model.layers,
        kv_bytes_per_token=(2 * model.heads_kv * model.head_size * KV_ITEM_BYTES,) * model.layers,
        embed_bytes=embedding,
        output_bytes=embedding,
        cuts=cuts,
        uncut_reason=uncut_reason,
        tied_bytes=embedding if model.tied else 0,
        parameters=model.parameters,
        heads=model.heads,
        heads_kv=model.heads_kv,
        experts=model.experts,
        experts_used=model.experts_used,
        embeds=model.embeds,
    )


def _entries(models: Sequence[CatalogueModel]) -> list[CatalogueEntry]:
    return [
        CatalogueEntry(f"{model.name}-{file.quantisation.lower()}", model, file)
        for model in models
        for file in model.files
    ]
