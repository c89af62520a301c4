"""Models as the rest of the subsystem sees them: which there are, who holds what, a file with the layers of a stage.

It composes the parts of this folder and answers for them to peers. Bringing models into the mesh and removing them is
`pull`'s.
"""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final

import httpx2
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.kernel.service import Policy
from meshnode.llm.service.weights.claims import Claims
from meshnode.llm.service.weights.contracts import (
    ClaimAnswer,
    ClaimRequest,
    DropAnswer,
    DropRequest,
    Network,
    ReadRequest,
    WantAnswer,
    WantRequest,
)
from meshnode.llm.service.weights.finding import Finding
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.records import ModelRecords
from meshnode.llm.service.weights.room import Disk, Room
from meshnode.llm.service.weights.serving import Serving
from meshnode.llm.service.weights.shelf import Shelf
from meshnode.llm.service.weights.staging import Progress, Staging
from meshnode.llm.store import WeightStore
from protocol.ids import NodeId

DIGEST_CHARS_MIN: Final = 8
NEAR_MAX: Final = 5


class Weights:
    """One for each node. What it knows of others is as fresh as this node's records."""

    name = "llm.weights"
    policy = Policy.RESTART

    def __init__(
        self,
        *,
        me: NodeId,
        records: ModelRecords,
        store: WeightStore,
        network: Network,
        alive: Callable[[], Sequence[NodeId]],
        client: httpx2.AsyncClient,
        folder: Path,
        bytes_max: int,
        hub: str,
        token: str,
        in_use: Callable[[str], bool],
        pinned: Callable[[str], bool],
        may_delete: Callable[[NodeId], None],
        other_names: Callable[[], Iterable[str]],
        disk: Disk,
        offload: Offload,
        wall: Callable[[], float],
        logger: Logger,
    ) -> None:
        """`alive`: members that are up. `bytes_max`: llm.disk_bytes_max. `in_use`, `pinned`: by digest.

        `may_delete` raises MeshError FORBIDDEN for members that may not delete models from others' disks.
        `other_names`: what may be pulled by name, for suggestions. The caller hides `token` from logs.
        """
        self.me = me
        self.records = records
        self._in_use = in_use
        self.may_delete = may_delete
        self._other_names = other_names
        self._claims = Claims()
        self.shelf = Shelf(store=store, records=records, folder=folder, offload=offload, wall=wall, logger=logger)
        self.room = Room(
            me=me,
            shelf=self.shelf,
            records=records,
            bytes_max=bytes_max,
            disk=disk,
            in_use=in_use,
            pinned=pinned,
            logger=logger,
        )
        finding = Finding(
            me=me,
            shelf=self.shelf,
            records=records,
            network=network,
            alive=alive,
            client=client,
            hub=hub,
            token=token,
            offload=offload,
            logger=logger,
        )
        self._finding = finding
        self.staging = Staging(
            shelf=self.shelf,
            records=records,
            store=store,
            room=self.room,
            finding=finding,
            disk=disk,
            offload=offload,
            logger=logger,
        )
        self.serving = Serving(shelf=self.shelf, known=records, network=network, offload=offload)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See what is here, go on with what was begun, serve until cancelled."""
        await self.shelf.load()
        await self.staging.run(task_status=task_status)

    # ---- which models there are ------------------------------------------------------------

    def manifest(self, digest: str) -> Manifest | None:
        """The model with this digest, if the mesh knows it."""
        return self.records.manifest(digest)

    def manifests(self) -> list[Manifest]:
        """Every model that the mesh knows, by name."""
        return sorted(self.records.manifests(), key=lambda manifest: (manifest.name, -manifest.created))

    def find(self, name: str) -> Manifest:
        """By name, alias, digest, or a beginning that only one has. Of two with one name, the newer.

        Raises MeshError NOT_FOUND with the nearest names.
        """
        exact = self.named(name)
        if exact is not None:
            return exact
        wanted = name.strip().casefold()
        newest = sorted(self.records.manifests(), key=lambda manifest: -manifest.created)
        if len(wanted) >= DIGEST_CHARS_MIN:
            begun = [manifest for manifest in newest if manifest.digest.startswith(wanted)]
            if len(begun) == 1:
                return begun[0]
        names = {known.casefold(): manifest for manifest in newest for known in (manifest.name, *manifest.aliases)}
        begun = [manifest for known, manifest in names.items() if wanted and known.startswith(wanted)]
        if len({manifest.digest for manifest in begun}) == 1:
            return begun[0]
        raise self._unknown(name, [manifest.name for manifest in newest])

    def named(self, name: str) -> Manifest | None:
        """The newest with exactly this name, alias or digest."""
        wanted = name.strip().casefold()
        found = [
            manifest
            for manifest in self.records.manifests()
            if wanted in (manifest.digest, manifest.name.casefold(), *(alias.casefold() for alias in manifest.aliases))
        ]
        return max(found, key=lambda manifest: manifest.created, default=None)

    def holds(self, node: NodeId, digest: str) -> tuple[tuple[int, int], ...]:
        """The layers of a model on that node's disk, as ranges that are files of their own; the whole model is one."""
        held, manifest = self.records.held(node, digest), self.records.manifest(digest)
        if held is None or manifest is None:
            return ()
        spans = {(first, last) for first, last, _ in held.spans}
        return tuple(sorted(spans | ({(0, manifest.layers)} if held.whole else set())))

    def holders(self, digest: str) -> list[NodeId]:
        """Who has any layers of a model."""
        return sorted(node for node, held in self.records.holders(digest).items() if held.whole or held.spans)

    async def template(self, digest: str) -> str:
        """The chat template, read from the header where it is too long for the records. Raises MeshError."""
        manifest = self._known(digest)
        if not manifest.template_cut:
            return manifest.chat_template
        await self._finding.headers(manifest)
        weights, _ = await self.shelf.opened(manifest)
        return weights.text("tokenizer.chat_template")

    def _known(self, digest: str) -> Manifest:
        manifest = self.records.manifest(digest)
        if manifest is None:
            raise MeshError(
                ErrorCode.NOT_FOUND,
                f"The mesh knows no model {digest[:16]}. It was removed, or its record has not arrived here yet.",
                retryable=True,
            )
        return manifest

    def _unknown(self, name: str, known: Sequence[str]) -> MeshError:
        others = self._other_names()
        offered = next((one for one in others if one.casefold() == name.strip().casefold()), None)
        if offered is not None:
            return MeshError(
                ErrorCode.NOT_FOUND,
                f"No node has the model {offered!r} yet; `meshnode pull {offered}` fetches it.",
                detail={"near": [offered]},
            )
        every = list(dict.fromkeys([*known, *others]))
        near = get_close_matches(name.casefold(), [one.casefold() for one in every], NEAR_MAX, 0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        return MeshError(
            ErrorCode.NOT_FOUND,
            f"There is no model {name[:200]!r}.{hint} `meshnode models --all` lists what there is and can be pulled.",
            detail={"near": near},
        )

    # ---- having their layers here ------------------------------------------------------------

    async def stage_file(
        self, digest: str, first: int, end: int, *, tail: bool, progress: Progress
    ) -> tuple[str, bool]:
        """A file with layers `first` up to, not including, `end`, and whether it has the tail that was asked for.

        All layers: the whole model. See Staging.stage.
        """
        staged = await self.staging.stage(self._known(digest), first, end, tail=tail, progress=progress)
        return str(staged.path), staged.tail

    async def drop(self, digest: str, *, force: bool) -> DropAnswer:
        """Delete what this node holds of a model; contributed files stay where they are, and are forgotten."""
        if self._in_use(digest) and not force:
            return DropAnswer(0, "it is loaded; unload it, or remove it by force")
        await self.staging.stop(digest)
        freed = await self.room.drop(digest)
        await self.shelf.forget_files(digest)
        await self.shelf.forget_headers(digest)
        return DropAnswer(freed)

    # ---- what peers ask ------------------------------------------------------------

    async def read_for(self, peer: NodeId, request: ReadRequest) -> object:
        """`llm.weights.read`."""
        return await self.serving.read(peer, request)

    async def claim_for(self, peer: NodeId, request: ClaimRequest) -> ClaimAnswer:
        """`llm.weights.claim`."""
        if request.release:
            self._claims.release(peer, request.digest, request.ranges)
            return ClaimAnswer(())
        return ClaimAnswer(self._claims.claim(peer, request.digest, request.ranges, trio.current_time()))

    async def want_for(self, peer: NodeId, request: WantRequest) -> WantAnswer:
        """`llm.weights.want`."""
        manifest = self._known(request.digest)
        return await self.staging.ask(manifest, request.first, request.last, tail=request.tail, begin=request.begin)

    async def drop_for(self, peer: NodeId, request: DropRequest) -> DropAnswer:
        """`llm.weights.drop`. Raises MeshError FORBIDDEN."""
        if peer != self.me:
            self.may_delete(peer)
        return await self.drop(request.digest, force=request.force)
