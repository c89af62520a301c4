"""Real links nodes on loopback, in one process: what the tests of links and of their attacks are made of."""

import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import (
    NodeIdentity,
    RootKey,
    found_root,
    issue_leaf,
    load_or_make_identity,
    root_certificate,
)
from meshnode.kernel.links import LinkEvent, Links, LinkSettings, PeerMethod, make_contexts
from meshnode.kernel.links.greeting import greet
from meshnode.kernel.links.tls import TlsStream
from protocol.effects import FrameReceived, LinkLost, LinkOpened
from protocol.ids import Address, NodeId, node_id_bytes
from protocol.wire.frames import Hello, HelloOk
from protocol.wire.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN

LOOPBACK = "127.0.0.1"


class Notes:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str, dict[str, Any]]] = []

    def debug(self, event: str, /, **fields: Any) -> None:
        self.records.append(("debug", event, fields))

    def info(self, event: str, /, **fields: Any) -> None:
        self.records.append(("info", event, fields))

    def warning(self, event: str, /, **fields: Any) -> None:
        self.records.append(("warning", event, fields))

    def error(self, event: str, /, **fields: Any) -> None:
        self.records.append(("error", event, fields))

    def exception(self, event: str, /, **fields: Any) -> None:
        self.records.append(("exception", event, fields))


class Roster:
    """A gate over plain sets: admitted keys, and tombstones that win."""

    def __init__(self) -> None:
        self.members: dict[NodeId, bytes] = {}
        self.evicted: set[bytes] = set()
        self.tombstones: dict[NodeId, bytes] = {}

    def admit(self, node_id: NodeId, public_key: bytes) -> MeshError | None:
        if public_key in self.evicted:
            return MeshError(ErrorCode.EVICTED, "That node was evicted. Ask an admin for a new invitation.")
        if self.members.get(node_id) != public_key:
            return MeshError(ErrorCode.NOT_A_MEMBER, "That node is no member of this mesh. Join it first.")
        return None

    def tombstone(self, node_id: NodeId) -> bytes:
        return self.tombstones.get(node_id, b"")


class Book:
    """An address book over a dict; notes what it was asked to remember."""

    def __init__(self) -> None:
        self.known: dict[NodeId, list[Address]] = {}
        self.remembered: list[tuple[NodeId, Address]] = []

    def addresses(self, node_id: NodeId) -> Sequence[Address]:
        return list(self.known.get(node_id, ()))

    def remember(self, node_id: NodeId, address: Address) -> None:
        self.remembered.append((node_id, address))


class Text(msgspec.Struct):
    """Parameters and answers of the tests' methods."""

    text: str = ""
    number: int = 0
    data: bytes = b""


@dataclass
class Node:
    """One node: its links, and everything they were given."""

    identity: NodeIdentity
    leaf: bytes
    links: Links
    gate: Roster
    book: Book
    log: Notes
    methods: dict[str, PeerMethod[Any]]
    receive: trio.MemoryReceiveChannel[LinkEvent]
    events: list[LinkEvent] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    arrived: trio.Event = field(default_factory=trio.Event)
    stopped: trio.Event = field(default_factory=trio.Event)

    @property
    def node_id(self) -> NodeId:
        return self.identity.node_id

    @property
    def address(self) -> Address:
        assert self.links.port is not None
        return Address(LOOPBACK, self.links.port)

    async def collect(self) -> None:
        """Play the driver: take events as they come."""
        async for event in self.receive:
            self.events.append(event)
            self.arrived.set()
            self.arrived = trio.Event()

    async def until(self, kind: type[LinkEvent], peer: "Node | None" = None, count: int = 1) -> LinkEvent:
        """Wait until `count` events of that kind (and peer) have come; return the last of them."""
        with trio.fail_after(20):
            while True:
                found = [e for e in self.events if isinstance(e, kind) and (peer is None or e.peer == peer.node_id)]
                if len(found) >= count:
                    return found[count - 1]
                await self.arrived.wait()

    def frames(self) -> list[bytes]:
        return [e.data for e in self.events if isinstance(e, FrameReceived)]

    def kinds(self) -> list[str]:
        names = {LinkOpened: "opened", LinkLost: "lost", FrameReceived: "frame"}
        return [names[type(e)] for e in self.events]

    async def stop(self) -> None:
        self.scope.cancel()
        with trio.fail_after(10):
            await self.stopped.wait()


class Mesh:
    """A mesh of real nodes that all know each other, unless told otherwise."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.nursery = nursery
        self.root: RootKey = found_root()
        self.nodes: list[Node] = []
        self.raw: list[TlsStream] = []
        self._made = 0

    def make_identity(self) -> NodeIdentity:
        self._made += 1
        return load_or_make_identity(self.folder / f"n{self._made}")

    async def add(
        self,
        settings: LinkSettings | None = None,
        *,
        identity: NodeIdentity | None = None,
        methods: Mapping[str, PeerMethod[Any]] | None = None,
        boot: int = 1,
        collect: bool = True,
        events_max: int = 1000,
        known: bool = True,
    ) -> Node:
        """Start a node. `known`: everybody admits it and knows its address, and it everybody's."""
        identity = identity or self.make_identity()
        leaf = issue_leaf(self.root, identity.public_key)
        gate, book, log = Roster(), Book(), Notes()
        send, receive = trio.open_memory_channel[LinkEvent](events_max)
        answered = dict(methods or {})
        links = Links(
            me=identity.node_id,
            boot=boot,
            agent="test/1",
            contexts=make_contexts(identity, leaf, root_certificate(self.root)),
            gate=gate,
            book=book,
            events=send,
            settings=settings or quick(),
            logger=log,
        )
        node = Node(identity, leaf, links, gate, book, log, answered, receive)
        await self.nursery.start(self._run, node)
        if collect:
            self.nursery.start_soon(node.collect)
        gate.members[identity.node_id] = identity.public_key
        if known:
            for other in self.nodes:
                introduce(node, other)
        self.nodes.append(node)
        return node

    async def _run(self, node: Node, task_status: trio.TaskStatus[object]) -> None:
        try:
            with node.scope:
                await node.links.run(node.methods, task_status=task_status)
        finally:
            node.stopped.set()

    def client_context(self, identity: NodeIdentity, leaf: bytes | None = None) -> ssl.SSLContext:
        """A context to attack with, as far as this mesh's root vouches for that key."""
        leaf = leaf if leaf is not None else issue_leaf(self.root, identity.public_key)
        return make_contexts(identity, leaf, root_certificate(self.root)).client


def introduce(a: Node, b: Node) -> None:
    """Let two nodes admit each other and know each other's address."""
    for one, other in ((a, b), (b, a)):
        one.gate.members[other.node_id] = other.identity.public_key
        one.book.known[other.node_id] = [other.address]


def quick(**changes: Any) -> LinkSettings:
    """Settings for loopback on any free port."""
    fields: dict[str, Any] = {"host": LOOPBACK, "port": 0}
    return LinkSettings(**(fields | changes))


@asynccontextmanager
async def mesh(folder: Path) -> AsyncIterator[Mesh]:
    """A mesh whose nodes are stopped at the end."""
    async with trio.open_nursery() as nursery:
        made = Mesh(folder, nursery)
        try:
            yield made
        finally:
            for stream in made.raw:
                stream.cut("the test is over")
        nursery.cancel_scope.cancel()


async def settle(condition: Callable[[], object], *, within_s: float = 5.0) -> None:
    """Wait until a condition holds that no event announces; fail if it does not in time."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 -- for what no event announces
            await trio.sleep(0.005)


async def raw_connect(address: Address, context: ssl.SSLContext) -> TlsStream:
    """TCP and TLS and nothing else: what an attacker, or a peer of the tests' own, begins with."""
    sock = trio.socket.socket()
    await sock.connect(tuple(address))
    stream = TlsStream(sock, context, server_side=False)
    try:
        await stream.handshake()
    except BaseException:
        stream.cut("the handshake failed")
        raise
    return stream


def raw_hello(identity: NodeIdentity, **changes: Any) -> Hello:
    """A HELLO that is in order, but for the changes."""
    fields: dict[str, Any] = {
        "version_min": PROTOCOL_VERSION_MIN,
        "version_max": PROTOCOL_VERSION,
        "features": [],
        "node_id": node_id_bytes(identity.node_id),
        "boot": 1,
        "attempt": 1,
        "agent": "raw/1",
        "kind": 0,
    }
    return Hello(**(fields | changes))


async def raw_member(m: Mesh, target: Node, **changes: Any) -> tuple[NodeIdentity, TlsStream]:
    """A member of the tests' own whose control link with `target` stands; it does nothing by itself."""
    identity = m.make_identity()
    target.gate.members[identity.node_id] = identity.public_key
    stream = await raw_connect(target.address, m.client_context(identity))
    answer = await greet(stream, raw_hello(identity, **changes))
    assert isinstance(answer, HelloOk), answer
    m.raw.append(stream)
    return identity, stream
