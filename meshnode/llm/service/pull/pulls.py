"""Brings models into the mesh and removes them: the verbs behind `meshnode pull` and `meshnode rm-model`.

A pull makes the model known and then has each node get what it needs; how bytes travel is weights'. It goes on when its
reader leaves, is joined by whoever asks for the same, and is taken up again after a restart.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, Protocol

import httpx2
import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.kernel.service import Policy
from meshnode.llm.model import PullPart, PullProgress, RemovedReport
from meshnode.llm.service.pull.introducing import Described, read_files, read_origin
from meshnode.llm.service.pull.refs import LocalRef, NamedRef, Ref, RemoteRef, parse_ref
from meshnode.llm.service.pull.stopping import until_stopped
from meshnode.llm.service.weights.contracts import DropAnswer, DropRequest, Network, WantAnswer, WantRequest
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.weights import Weights
from meshnode.llm.store import PullRow, WeightStore
from protocol.ids import NodeId

POLL_S: Final = 0.5
TELL_S: Final = 0.2
CALL_S: Final = 15.0
LOST_POLLS_MAX: Final = 60
SPEED_SHARE: Final = 0.2  # of the newest measurement in the speed that is told
WANT: Final = "llm.weights.want"
DROP: Final = "llm.weights.drop"

Target = tuple[NodeId, int, int]
Planner = Callable[[Manifest], Sequence[Target]]
"""Which node needs which layers, from first up to, not including, last. Raises MeshError when it fits nowhere."""

_LOST: Final = frozenset({ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED})
"""What a call to a node fails with that may be there again in a moment."""


class Offers(Protocol):
    """The catalogue."""

    def find(self, name: str) -> tuple[str, Described] | None:
        """The reference of a name and what is known of it."""
        ...


@dataclass(slots=True)
class _Pull:
    row: PullRow
    told: PullProgress
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    moved: trio.Event = field(default_factory=trio.Event)
    digest: str = ""
    over: bool = False
    error: MeshError | None = None

    def tell(
        self,
        status: str,
        completed: int = 0,
        total: int = 0,
        speed: float = 0.0,
        source: str = "",
        parts: tuple[PullPart, ...] = (),
    ) -> None:
        self.told = PullProgress(
            model=self.told.model,
            status=status,
            completed=completed,
            total=total,
            bytes_per_s=speed,
            source=source,
            parts=parts,
        )
        self.wake()

    def wake(self) -> None:
        self.moved.set()
        self.moved = trio.Event()


class Pulls:
    """One for each node; `run` must be running."""

    name = "llm.pulls"
    policy = Policy.RESTART

    def __init__(
        self,
        *,
        weights: Weights,
        store: WeightStore,
        network: Network,
        alive: Callable[[], Sequence[NodeId]],
        planner: Planner,
        offers: Offers,
        name_of: Callable[[NodeId], str],
        client: httpx2.AsyncClient,
        hub: str,
        token: str,
        offload: Offload,
        wall: Callable[[], float],
        logger: Logger,
    ) -> None:
        """The caller hides `token` from logs."""
        self._name_of = name_of
        self._weights = weights
        self._store = store
        self._network = network
        self._alive = alive
        self._planner = planner
        self._offers = offers
        self._client = client
        self._hub = hub
        self._token = token
        self._offload = offload
        self._wall = wall
        self._log = logger
        self._pulls: dict[PullRow, _Pull] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled; begins with what an earlier run left unfinished."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for row in self._store.pulls():
                    self._begin(row)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def pull(self, ref: str, *, node: NodeId | None, whole: bool) -> AsyncGenerator[PullProgress, None]:
        """Bring a model in, and tell how far it is. `whole` or `node`: all of it to one node, this one by default.

        Otherwise each node gets the layers that the plan gives it. Closing the iteration stops nothing. Raises
        MeshError BAD_REQUEST, NOT_FOUND with the nearest names, FORBIDDEN for a gated model, and whatever a node failed
        with.
        """
        self._resolve(ref)
        if node is not None and node != self._weights.me and node not in self._alive():
            raise MeshError(ErrorCode.UNKNOWN_NODE, f"Node {node} is not up. `meshnode nodes` lists who is.")
        pull = self._begin(PullRow(ref.strip(), node or "", whole))
        told: PullProgress | None = None
        while True:
            if pull.told != told:
                told = pull.told
                yield told
            if pull.over:
                break
            with trio.move_on_after(TELL_S):
                while not pull.over:
                    await pull.moved.wait()
        if pull.error is not None:
            error = pull.error
            raise MeshError(error.code, error.message, retryable=error.retryable, detail=error.detail)

    def under_way(self) -> list[PullProgress]:
        """Pulls that this node does."""
        return [pull.told for pull in self._pulls.values()]

    async def remove(
        self, model: str, *, node: NodeId | None = None, everywhere: bool, force: bool = False
    ) -> RemovedReport:
        """Delete a model from this node, from `node`, or from all that are up; stops pulls of it here.

        Raises MeshError NOT_FOUND; FORBIDDEN, nothing deleted anywhere, if that is not this node's to decide; CONFLICT,
        nothing deleted here, while it is loaded and not `force`d.
        """
        manifest = self._weights.find(model)
        me = self._weights.me
        holders = self._weights.records.holders(manifest.digest)
        wanted = sorted({me, *holders}) if everywhere else [node or me]
        if wanted != [me]:
            self._weights.may_delete(me)
        for pull in [pull for pull in self._pulls.values() if pull.digest == manifest.digest]:
            pull.scope.cancel()
        up = {me, *self._alive()}
        unreachable = [one for one in wanted if one not in up]
        kept = [f"node {one} is not up" for one in unreachable]
        freed, done = 0, list[NodeId]()
        for target in [one for one in wanted if one in up]:
            try:
                answer = await self._network.call(
                    target, DROP, DropRequest(manifest.digest, force), DropAnswer, timeout_s=CALL_S
                )
            except MeshError as error:
                kept.append(f"node {target}: {error.message}")
                continue
            freed += answer.bytes_freed
            if answer.kept:
                kept.append(f"node {target}: {answer.kept}")
            else:
                done.append(target)
        if not done and kept:
            raise MeshError(ErrorCode.CONFLICT, f"{manifest.name} was not removed. {'; '.join(kept)}.")
        left = {node for node, held in holders.items() if held.whole or held.spans} - set(done)
        if not left:
            await self._weights.records.forget(manifest.digest)
        return RemovedReport(
            model=manifest.name,
            nodes=tuple(done),
            freed_bytes=freed,
            unreachable=tuple(unreachable),
            kept=tuple(kept),
        )

    # ---- one pull ------------------------------------------------------------

    def _begin(self, row: PullRow) -> _Pull:
        pull = self._pulls.get(row)
        if pull is None:
            if self._nursery is None:
                raise MeshError(ErrorCode.UNAVAILABLE, "This node is starting or stopping. Try again.", retryable=True)
            pull = self._pulls[row] = _Pull(row, PullProgress(model=row.ref, status="looking for it"))
            self._nursery.start_soon(self._do, pull)
        return pull

    async def _do(self, pull: _Pull) -> None:
        error: MeshError | None = MeshError(
            ErrorCode.UNAVAILABLE, "The pull was stopped: the model was removed, or the node stops."
        )
        try:
            with pull.scope:
                try:
                    await self._store.put_pull(pull.row)
                    await self._pull(pull)
                    error = None
                except MeshError as why:
                    error = why
                    self._log.warning("a pull failed", ref=pull.row.ref, why=why.message)
                await self._over(pull.row)
            if pull.scope.cancelled_caught:
                await self._over(pull.row)
        finally:
            del self._pulls[pull.row]
            pull.over, pull.error = True, error
            pull.wake()

    async def _over(self, row: PullRow) -> None:
        """Do not take it up again at the next start. A database that cannot be told costs another try then."""
        try:
            await self._store.drop_pull(row)
        except MeshError as why:
            self._log.warning("it could not be noted that a pull is over", why=why.message)

    async def _pull(self, pull: _Pull) -> None:
        node = NodeId(pull.row.node) if pull.row.node else self._weights.me
        found = self._resolve(pull.row.ref)
        if isinstance(found, Manifest):
            manifest = found
        else:
            ref, described = found
            if isinstance(ref, LocalRef) and node != self._weights.me:
                raise MeshError(
                    ErrorCode.BAD_REQUEST, "A path is one of this machine. Pull it here; other nodes get it from here."
                )
            manifest = await self._introduce(pull, ref, described)
        pull.digest = manifest.digest
        pull.told = PullProgress(model=manifest.name, status=pull.told.status, source=manifest.source)
        if pull.row.whole or pull.row.node:
            targets: Sequence[Target] = [(node, 0, manifest.layers)]
        elif await self._weights.shelf.whole(manifest.digest) is not None:
            # Others get their layers from here when they need them.
            targets = []
        else:
            targets = self._planner(manifest)
        await self._spread(pull, manifest, targets)
        pull.tell("success", manifest.bytes, manifest.bytes, source=manifest.source, parts=pull.told.parts)

    def _resolve(self, text: str) -> Manifest | tuple[Ref, Described]:
        """What a reference means: a model that the mesh knows, or one to be made known."""
        ref = parse_ref(text, hub=self._hub)
        if not isinstance(ref, NamedRef):
            return ref, Described(ref.name, "" if isinstance(ref, LocalRef) else text.strip())
        known = self._weights.named(ref.name)
        offered = self._offers.find(ref.name)
        if known is not None or offered is None:
            return known or self._weights.find(ref.name)
        source, described = offered
        return parse_ref(source, hub=self._hub), described

    async def _introduce(self, pull: _Pull, ref: Ref, described: Described) -> Manifest:
        weights = self._weights
        if isinstance(ref, RemoteRef):
            manifest, headers = await read_origin(
                self._client, ref, described, token=self._token, created=self._wall(), progress=pull.tell
            )
            known = weights.manifest(manifest.digest)
            await weights.records.put_manifest(_joined(manifest, known))
            await weights.shelf.keep_headers(manifest.digest, headers)
            return _joined(manifest, known)
        assert isinstance(ref, LocalRef)
        words = f"reading {ref.paths[0]}"
        adopted = await until_stopped(
            self._offload,
            lambda stopped: read_files(
                ref.paths,
                described,
                created=self._wall(),
                progress=lambda done, total: _from_thread(pull, words, done, total),
                stopped=stopped,
            ),
        )
        manifest = _joined(adopted.manifest, weights.manifest(adopted.manifest.digest))
        await weights.records.put_manifest(manifest)
        for group, hashes in adopted.hashes.items():
            await weights.records.put_hashes(manifest.digest, group, hashes, certain=True)
        await weights.shelf.keep_headers(manifest.digest, adopted.headers)
        if await weights.shelf.whole(manifest.digest) is None:
            await weights.shelf.add_files(manifest.digest, ref.paths, owned=False)
        return manifest

    # ---- having the nodes get it ------------------------------------------------------------

    async def _spread(self, pull: _Pull, manifest: Manifest, targets: Sequence[Target]) -> None:
        """Each node gets its layers; the progress told is that of all."""
        told: dict[Target, WantAnswer] = {}
        started = trio.current_time()
        last, speed = (started, 0), 0.0

        def tell() -> None:
            nonlocal last, speed
            done = sum(answer.done for answer in told.values())
            total = sum(_size(told.get(one), manifest, one) for one in targets)
            now = trio.current_time()
            if now - last[0] >= POLL_S:
                measured = max(0.0, (done - last[1]) / (now - last[0]))
                speed = measured if not speed else speed + SPEED_SHARE * (measured - speed)
                last = now, done
            words = next((answer.words for answer in told.values() if not answer.finished), "fetching")
            pull.tell(words, min(done, total), total, speed, manifest.source, self._parts(manifest, targets, told))

        failures: list[MeshError] = []

        async def one(target: Target, scope: trio.CancelScope) -> None:
            try:
                async with aclosing(self._wanting(manifest, target)) as answers:
                    async for answer in answers:
                        if answer.finished:
                            size = _size(told.get(target), manifest, target)
                            answer = WantAnswer(size, size, "here", True)
                        told[target] = answer
                        tell()
            except MeshError as error:
                failures.append(error)
                scope.cancel()

        async with trio.open_nursery() as nursery:
            for target in targets:
                nursery.start_soon(one, target, nursery.cancel_scope)
        if failures:
            raise failures[0]

    def _parts(
        self, manifest: Manifest, targets: Sequence[Target], told: Mapping[Target, WantAnswer]
    ) -> tuple[PullPart, ...]:
        """How far each node is; one that has not answered yet has nothing of what its layers are expected to take."""
        parts: list[PullPart] = []
        for target in sorted(targets, key=lambda target: target[1]):
            node, first, last = target
            answer = told.get(target)
            total = _size(answer, manifest, target)
            done = 0 if answer is None else min(answer.done, total)
            name = self._name_of(node)
            parts.append(PullPart(node_id=node, node_name=name, first=first, last=last, completed=done, total=total))
        return tuple(parts)

    async def _wanting(self, manifest: Manifest, target: Target) -> AsyncGenerator[WantAnswer, None]:
        """How far one node is, until it has its layers. A node that is lost for a while is waited for."""
        node, first, last = target
        lost, begin = 0, True
        while True:
            request = WantRequest(manifest.digest, first, last, True, begin)
            try:
                answer = await self._network.call(node, WANT, request, WantAnswer, timeout_s=CALL_S)
            except MeshError as error:
                # A record may be slower than a call; what else fails there failed for good.
                late = error.code is ErrorCode.NOT_FOUND and error.retryable
                lost += 1
                if not (late or error.code in _LOST) or lost > LOST_POLLS_MAX:
                    raise self._failed(manifest, target, error) from error
                begin = True
            else:
                failed = None if answer.failed is None else _error_of(*answer.failed)
                if failed is None:
                    lost, begin = 0, False
                    yield answer
                    if answer.finished:
                        return
                elif failed.code is ErrorCode.UNAVAILABLE and failed.retryable and lost < LOST_POLLS_MAX:
                    # It restarted, and does not know any more that it was asked.
                    lost, begin = lost + 1, True
                else:
                    raise self._failed(manifest, target, failed)
            await trio.sleep(POLL_S)

    def _failed(self, manifest: Manifest, target: Target, error: MeshError) -> MeshError:
        node, first, last = target
        return MeshError(
            error.code,
            f"Node {node} could not get layers {first} to {last - 1} of {manifest.name}: {error.message}",
            retryable=error.retryable,
            detail={**error.detail, "node_id": node},
        )


def _error_of(code: str, message: str, retryable: bool) -> MeshError:
    known = code in ErrorCode.__members__.values()
    return MeshError(ErrorCode(code) if known else ErrorCode.INTERNAL, message, retryable=retryable)


def _size(answer: WantAnswer | None, manifest: Manifest, target: Target) -> int:
    """Bytes that a node says its layers take; while it waits and does not know yet, what they are expected to take."""
    return (0 if answer is None else answer.total) or _estimate(manifest, target)


def _estimate(manifest: Manifest, target: Target) -> int:
    _, first, last = target
    return sum(manifest.shape.layer_bytes[first:last])


def _joined(fresh: Manifest, known: Manifest | None) -> Manifest:
    """What is said of a model anew, without losing where it came from and what it was called first."""
    if known is None:
        return fresh
    names = dict.fromkeys([*known.aliases, fresh.name, *fresh.aliases])
    names.pop(known.name, None)
    return msgspec.structs.replace(
        known,
        checked="file" if fresh.checked == "file" else known.checked,
        parts=known.parts if known.source else fresh.parts,
        source=known.source or fresh.source,
        description=known.description or fresh.description,
        licence=known.licence or fresh.licence,
        aliases=tuple(names),
    )


def _from_thread(pull: _Pull, words: str, done: int, total: int) -> None:
    """Progress of a thread: told without waking anybody, for events belong to trio's thread."""
    pull.told = PullProgress(model=pull.told.model, status=words, completed=done, total=total)
