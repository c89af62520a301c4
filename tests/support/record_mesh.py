"""Members that share records: hubs, drivers, sockets and databases are the agent's own, the links are short wires.

Its job is to show what a subsystem's records do on several nodes, together and apart. Links have tests of their own.
"""

import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from meshnode.kernel.database import KeyValue, kernel_migrations, open_database
from meshnode.kernel.datagrams import open_datagrams
from meshnode.kernel.driver import Driver
from meshnode.kernel.records import RecordWriter
from meshnode.kernel.recordstore import DurableState, SqlRecordStore, record_migrations
from protocol.effects import FrameReceived, LinkLost, LinkOpened
from protocol.ids import Address, NodeId
from protocol.membership.events import ContactFound
from protocol.node import Node
from protocol.records.collection import Collection
from tests.protocol.test_node import KEYS
from tests.support.hub import BOOT, MESH_ID, Mesh, roster_of, suite_of
from tests.support.recording_log import RecordingLog


@dataclass
class Member:
    """One node, as far as records go."""

    node_id: NodeId
    hub: Node
    driver: Driver
    writer: RecordWriter


class RecordMesh:
    """The members; while `apart`, no frame of one reaches another."""

    def __init__(self, size: int) -> None:
        self.mesh = Mesh(size)
        self.members: list[Member] = []
        self.apart = False

    def deliver(self, sender: int, to: NodeId, payload: bytes) -> None:
        if self.apart:
            self.members[sender].driver.submit(LinkLost(to, "apart"))
            return
        there = self.members[self.mesh.number(to)].driver
        there.submit(LinkOpened(self.mesh.id(sender), BOOT))
        there.submit(FrameReceived(self.mesh.id(sender), payload))

    async def until(self, reached: Callable[[], bool], within_s: float = 20.0) -> None:
        """Wait for a state that no event tells about, and fail when it does not come in time."""
        with trio.fail_after(within_s):
            while not reached():  # noqa: ASYNC110 -- what readers see has no event
                await trio.sleep(0.01)

    async def agree(self, collection: str) -> None:
        """Wait until all members hold the same."""
        await self.until(lambda: len({member.hub.records.digest(collection) for member in self.members}) == 1)


class _Wire:
    def __init__(self, mesh: RecordMesh, index: int) -> None:
        self._mesh = mesh
        self._index = index

    def send(self, node_id: NodeId, payload: bytes) -> None:
        self._mesh.deliver(self._index, node_id, payload)

    def cut(self, node_id: NodeId, reason: str) -> None:
        raise AssertionError(f"cut off for {reason}")


@asynccontextmanager
async def record_mesh(folder: Path, size: int, collections: Sequence[Collection]) -> AsyncIterator[RecordMesh]:
    """So many members that know and see each other."""
    made = RecordMesh(size)
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for index in range(size):
            sockets = open_datagrams("127.0.0.1", 0)
            stack.callback(sockets.close)
            migrations = [*kernel_migrations(), *record_migrations()]
            opened = open_database(folder / f"{index}.db", migrations, wall=time.time())
            database = await stack.enter_async_context(opened)
            store = SqlRecordStore(database)
            hub = Node(
                me=made.mesh.id(index), mesh_id=MESH_ID, boot=BOOT, founder=index == 0, suite=suite_of(index),
                rng=random.Random(index), roster=roster_of(range(size)), durable={"keys": KEYS},
                collections=collections, record_store=store, addresses=(Address("127.0.0.1", sockets.port),),
            )  # fmt: skip
            state = DurableState(database, KeyValue(database), store)
            driver = Driver(
                node=hub, sockets=sockets, links=_Wire(made, index), store=state.persist, log=RecordingLog()
            )
            made.members.append(Member(hub.me, hub, driver, RecordWriter(driver, 1 + index * 1_000_000)))
        for member in made.members:
            await nursery.start(member.driver.run, [member.writer.observe])
        first = made.members[0]
        for other in made.members[1:]:
            first.driver.submit(ContactFound(other.node_id, other.hub.membership.addresses(other.node_id)[0]))
        await made.until(lambda: all(len(member.hub.membership.view.up) == size for member in made.members))
        yield made
        nursery.cancel_scope.cancel()
