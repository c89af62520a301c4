"""Nodes of one mesh in one process, for the cluster's services: real hubs and keys, calls that go straight across.

A call is encoded, decoded and answered by the peer's own methods, after the gate that every link has. What a driver
and links do beyond that has tests of its own.
"""

from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from meshnode.cluster.peers import peer_methods
from meshnode.cluster.service.nodes import Nodes
from meshnode.cluster.service.notices import Notices
from meshnode.cluster.service.pings import Pings
from meshnode.cluster.service.trust import Trust
from meshnode.cluster.service.twins import Twins
from meshnode.kernel.bus import EventBus
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import NodeIdentity, RootKey, root_from_seed
from meshnode.kernel.metrics import Metrics
from protocol.ids import NodeId
from protocol.node import Input, Node
from tests.protocol.test_node import Hubs
from tests.support.hub import ROOT_SEED, keys_of
from tests.support.recording_log import RecordingLog

T = TypeVar("T")
ROOT: RootKey = root_from_seed(ROOT_SEED)


class Facts:
    """The facts of one agent, by the clocks of its hubs."""

    version = "1.2.3"

    def __init__(self, hubs: Hubs, name: str) -> None:
        self._hubs = hubs
        self.name = name

    def uptime_s(self) -> float:
        return self._hubs.now - 1000.0

    def now(self) -> float:
        return self._hubs.now

    def wall(self) -> float:
        return self._hubs.wall


class Driver:
    """The part of the driver that the services use."""

    def __init__(self, hubs: Hubs, index: int) -> None:
        self._hubs = hubs
        self._index = index
        self.submitted: list[Input] = []

    @property
    def node(self) -> Node:
        return self._hubs.hub(self._index)

    def submit(self, event: Input) -> None:
        self.submitted.append(event)
        self._hubs.give(self._index, event)

    async def submit_durably(self, event: Input) -> None:
        await trio.lowlevel.checkpoint()
        self.submit(event)


class Links:
    """The part of the links that the services use."""

    def __init__(self, house: "House", me: NodeId) -> None:
        self._house = house
        self._me = me

    async def call(self, node_id: NodeId, method: str, params: object, answer: type[T], *, timeout_s: float) -> T:
        await trio.lowlevel.checkpoint()
        peer = self._house.members.get(node_id)
        if peer is None or node_id in self._house.unreachable:
            raise MeshError(ErrorCode.UNREACHABLE, "No address of it answers. Try again later.", retryable=True)
        if self._me not in peer.driver.node.roster:
            raise MeshError(ErrorCode.EVICTED, "This node was evicted.")
        known = peer.methods[method]
        request = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=known.params)
        reply = await known.handle(self._me, request)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(reply), type=answer)

    def facts(self) -> list[Any]:
        return []


class Member:
    """One node's services."""

    def __init__(self, house: "House", index: int, folder: Path) -> None:
        seed, public, node_id = keys_of(index)
        self.index, self.folder = index, folder
        folder.mkdir(mode=0o700)
        self.identity = NodeIdentity(node_id, public, folder / "node.key", seed)
        self.driver, self.links = Driver(house.hubs, index), Links(house, node_id)
        self.bus, facts, self.log = EventBus(epoch="e"), Facts(house.hubs, f"n{index}"), RecordingLog()
        self.nodes = Nodes(hub=self.driver.node, facts=facts, bus=self.bus, metrics=Metrics(), notices=Notices())
        self.trust = Trust(
            data_dir=folder, identity=self.identity, root=ROOT if index == 0 else None, nodes=self.nodes,
            driver=self.driver, links=self.links,  # type: ignore[arg-type]  # the parts that Trust uses
            facts=facts, bus=self.bus, log=self.log,
        )  # fmt: skip
        self.methods = peer_methods(
            self.trust,
            Pings(links=self.links, nodes=self.nodes),  # type: ignore[arg-type]  # as above
            Twins(hub=self.driver.node, links=self.links, notices=Notices(), log=RecordingLog()),  # type: ignore[arg-type]  # as above
        )

    def observe(self, event: object) -> None:
        """As the composition root has it."""
        self.nodes.observe(event)
        self.trust.observe(event)


class House:
    """Members 0 to size - 1, of whom 0 founded the mesh and holds its root key."""

    def __init__(self, folder: Path, size: int = 3) -> None:
        self.hubs = Hubs(size)
        self.unreachable: set[NodeId] = set()
        self.members: dict[NodeId, Member] = {}
        for index in range(size):
            member = Member(self, index, folder / f"n{index}")
            self.members[member.identity.node_id] = member
            self.hubs.observers[member.identity.node_id] = member.observe
        self.hubs.run(6.0)

    def __getitem__(self, index: int) -> Member:
        return self.members[keys_of(index)[2]]

    def id(self, index: int) -> NodeId:
        return keys_of(index)[2]
