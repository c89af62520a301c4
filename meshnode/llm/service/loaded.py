"""What is loaded, as the coordinator tells it to the whole mesh: which models answer, and why others do not.

The coordinator alone knows (it probes each pipeline before it counts). It writes one record of its own when that
changes; everybody reads the record of whoever coordinates now, so a list of models is the same from every member.
"""

from collections.abc import Callable
from typing import Annotated, Final

import msgspec
import trio

from meshnode.kernel.errors import MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.records import RecordWriter
from meshnode.llm.model import UNREADABLE, ModelState
from protocol.ids import NodeId
from protocol.node import Node
from protocol.records.collection import Collection, only_owner
from protocol.sharding.loading import LoadingMachine
from protocol.sharding.pipelines import LoadFailed, PipelineLost, PipelineReady
from protocol.wire import limits

LOADED: Final = "llm/loaded"
LOOK_S: Final = 1.0
FAILED_S: Final = 900.0  # how long the reason of a load that failed is told
TOLD_MAX: Final = 256
WORDS_CHARS_MAX: Final = 200


def loaded_collection() -> Collection:
    """Each node speaks for itself; only the coordinator is listened to."""
    return Collection(LOADED, may_write=only_owner, value_bytes_max=60_000, records_max=limits.ROSTER_MAX)


class Told(msgspec.Struct, frozen=True, array_like=True):
    """One model. `idle`: it is told of only because it is pinned. Later versions append."""

    digest: Annotated[str, msgspec.Meta(max_length=128)]
    state: ModelState
    pinned: bool = False
    words: Annotated[str, msgspec.Meta(max_length=WORDS_CHARS_MAX)] = ""  # why it is not ready


class _Board(msgspec.Struct, frozen=True, array_like=True):
    models: tuple[Told, ...]


class Loaded:
    """Tells while this node coordinates, and reads what is told. `observe` hears what the loading machine publishes."""

    def __init__(
        self,
        *,
        me: NodeId,
        hub: Node,
        machine: LoadingMachine,
        writer: RecordWriter,
        name_of: Callable[[NodeId], str],
        now: Callable[[], float],
        log: Logger,
    ) -> None:
        self._me = me
        self._hub = hub
        self._machine = machine
        self._writer = writer
        self._name_of = name_of
        self._now = now
        self._log = log
        self._failed: dict[str, tuple[str, float]] = {}
        self._told: tuple[Told, ...] = ()
        self._moved = trio.Event()

    def observe(self, event: object) -> None:
        """Something was loaded, lost, or could not be loaded."""
        match event:
            case PipelineReady(pipeline):
                self._failed.pop(pipeline.model, None)
            case LoadFailed(model, _, words):
                self._failed[model] = words, self._now()
            case PipelineLost():
                pass
            case _:
                return
        self._moved.set()

    async def run(self) -> None:
        """Tell what changed until cancelled, once a second at most."""
        while True:
            told = self._own()
            if told != self._told:
                try:
                    value = msgspec.msgpack.encode(_Board(told))
                    await self._writer.put(LOADED, self._me.encode("ascii"), value)
                    self._told = told
                except MeshError as error:
                    self._log.warning("which models are loaded could not be told", why=error.message)
            await trio.sleep(LOOK_S / 4)
            with trio.move_on_after(LOOK_S):
                await self._moved.wait()
            self._moved = trio.Event()

    def states(self) -> dict[str, Told]:
        """By digest, as the coordinator of this node's side of the mesh tells; without one, nothing."""
        leader = self._hub.election.coordinator
        if leader == self._me:
            return {one.digest: one for one in self._own()}
        record = None if leader is None else self._hub.records.get(LOADED, leader.encode("ascii"))
        if record is None:
            return {}
        try:
            told = msgspec.msgpack.decode(record.value, type=_Board)
        except UNREADABLE:
            return {}
        return {one.digest: one for one in told.models}

    def _own(self) -> tuple[Told, ...]:
        """What this node has to tell; nothing unless it coordinates."""
        machine = self._machine
        if not machine.is_coordinator:
            self._failed.clear()
            return ()
        self._failed = {model: told for model, told in self._failed.items() if self._now() - told[1] < FAILED_S}
        found: dict[str, tuple[ModelState, str]] = {
            model: ("failed", words) for model, (words, _) in self._failed.items()
        }
        for model in machine.pinned:
            found.setdefault(model, ("idle", ""))
        for load in machine.loads:
            found[load.model] = "loading", f"it is being loaded: {load.words}"
        for held in machine.pipelines:
            if held.state == "ready":
                found[held.pipeline.model] = "ready", ""
            elif held.state in ("loading", "probing") and found.get(held.pipeline.model, ("",))[0] != "ready":
                words = "waiting for the first token" if held.state == "probing" else "its layers are being loaded"
                found[held.pipeline.model] = "loading", words
        pinned = machine.pinned
        told = [
            Told(model, state, model in pinned, self._named(words)[:WORDS_CHARS_MAX])
            for model, (state, words) in sorted(found.items())
        ]
        return tuple(told[:TOLD_MAX])

    def _named(self, words: str) -> str:
        """Nodes by their names: the machines know ids alone."""
        for node in self._hub.roster.members():
            if node in words:
                words = words.replace(node, self._name_of(node))
        return words
