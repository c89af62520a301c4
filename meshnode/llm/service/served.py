"""Which upstream models which node serves: each node tells of its own, and looks after them."""

import math
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import trio

from meshnode.kernel.errors import MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.records import RecordWriter
from meshnode.llm.model import UNREADABLE, ModelCard
from meshnode.llm.service.engines.upstream import Upstreams
from protocol.ids import NodeId
from protocol.node import Node
from protocol.records.collection import Collection, only_owner
from protocol.wire import limits

SERVED: Final = "llm/served"
REFRESH_S: Final = 60.0
RETRY_S: Final = 5.0  # who did not answer is looked for sooner: until then nobody can use what it serves
MODELS_TOLD_MAX: Final = 500
VALUE_BYTES_MAX: Final = 60_000


def served_collection() -> Collection:
    """Each node speaks for itself."""
    return Collection(SERVED, may_write=only_owner, value_bytes_max=VALUE_BYTES_MAX, records_max=limits.ROSTER_MAX)


class _Served(msgspec.Struct, frozen=True, array_like=True):
    models: tuple[str, ...]


class Served:
    """See the module. `upstreams` are this node's own."""

    def __init__(self, *, me: NodeId, hub: Node, writer: RecordWriter, upstreams: Upstreams, log: Logger) -> None:
        self._me = me
        self._hub = hub
        self._writer = writer
        self._upstreams = upstreams
        self._log = log

    async def run(self) -> None:
        """Ask the servers now and then, and tell the mesh when something changed, until cancelled."""
        silent = set[str]()
        asked_all_at = -math.inf
        while True:
            only_silent = trio.current_time() < asked_all_at + REFRESH_S
            if not only_silent:
                asked_all_at = trio.current_time()
            await self._tell(await self._upstreams.refresh(silent_only=only_silent))
            failures = self._upstreams.failures
            for name in failures.keys() - silent:
                self._log.warning("an upstream server does not answer", server=name, why=failures[name])
            for name in silent - failures.keys():
                self._log.info("an upstream server answers again", server=name)
            silent = set(failures)
            await trio.sleep(RETRY_S if failures else REFRESH_S)

    async def _tell(self, cards: Sequence[ModelCard]) -> None:
        names = _fitting([card.name for card in cards[:MODELS_TOLD_MAX]])
        # Compared with the record itself: an earlier run, with other settings, may have written it.
        if names == self._of(self._me):
            return
        try:
            await self._writer.put(SERVED, self._me.encode("ascii"), msgspec.msgpack.encode(_Served(names)))
        except MeshError as error:
            self._log.warning("upstream models could not be told", why=error.message)

    def by_model(self) -> dict[str, NodeId]:
        """Which node serves a model; of several, one that is this node or comes first."""
        found: dict[str, NodeId] = {}
        for node in sorted(self._hub.membership.view.up, key=lambda node: (node != self._me, node)):
            for name in self._of(node):
                found.setdefault(name, node)
        return found

    def _of(self, node: NodeId) -> tuple[str, ...]:
        """What a node told; nothing where that cannot be read."""
        record = self._hub.records.get(SERVED, node.encode("ascii"))
        if record is None:
            return ()
        try:
            return msgspec.msgpack.decode(record.value, type=_Served).models
        except UNREADABLE:
            return ()

    def cards(self, name_of: Callable[[NodeId], str]) -> list[ModelCard]:
        """Every upstream model of the mesh."""
        return [
            ModelCard(
                name=name,
                source=f"upstream server of {name_of(node)}",
                held_by=(node,),
                ready=True,
                state="ready",
            )
            for name, node in sorted(self.by_model().items())
        ]


def _fitting(names: Sequence[str]) -> tuple[str, ...]:
    """As many of the first as a record holds."""
    room = VALUE_BYTES_MAX - 16  # the list's own head
    fitting: list[str] = []
    for name in names:
        room -= len(name.encode()) + 5  # a text's longest head
        if room < 0:
            break
        fitting.append(name)
    return tuple(fitting)
