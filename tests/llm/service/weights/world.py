"""Nodes with weights of their own over real links, sharing one board of records: what these tests are made of."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import trio

from meshnode.kernel.database import open_database
from meshnode.kernel.database.migrations import read_migrations
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.kernel.offload import InlineOffload
from meshnode.llm.peers.weights import weight_methods
from meshnode.llm.service.pull.introducing import Described
from meshnode.llm.service.pull.pulls import Pulls, Target
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.records import ModelRecords
from meshnode.llm.service.weights.weights import Weights
from meshnode.llm.store import WeightStore
from protocol.ids import NodeId
from protocol.records.ledger import Page
from protocol.records.record import Record
from tests.kernel.links.world import Mesh, Node, mesh
from tests.support.tiny_models import tiny_model

PURPOSE = "llm"
DISK = 10**13


class Granted(msgspec.Struct, array_like=True):
    token: bytes


class Board:
    """Records as every node has them at once."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, bytes], Record] = {}
        self.count = 0

    def get(self, collection: str, key: bytes) -> Record | None:
        return self.rows.get((collection, key))

    def scan(self, collection: str, prefix: bytes = b"", cursor: bytes | None = None, limit: int = 100) -> Page:
        keys = sorted(key for its, key in self.rows if its == collection and key.startswith(prefix))
        keys = [key for key in keys if cursor is None or key > cursor]
        found = tuple(self.rows[collection, key] for key in keys[:limit])
        return Page(found, keys[limit - 1] if len(keys) > limit else None)

    def digest(self, collection: str) -> bytes:
        return repr(sorted((key, row.version) for (its, key), row in self.rows.items() if its == collection)).encode()

    async def put(self, collection: str, key: bytes, value: bytes) -> None:
        await trio.lowlevel.checkpoint()
        assert len(value) <= 64 * 1024
        self.count += 1
        self.rows[collection, key] = Record(collection, key, value, self.count, False, None, b"", self.count, b"")

    async def delete(self, collection: str, key: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.rows.pop((collection, key), None)


class Network:
    """Calls and streams over a node's links; to itself without them."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def call(self, node: NodeId, method: str, params: Any, returns: type[Any], *, timeout_s: float) -> Any:
        if node == self.node.node_id:
            return await self.node.methods[method].handle(node, params)
        return await self.node.links.call(node, method, params, returns, timeout_s=timeout_s)

    def accept(self, peer: NodeId, serve: Callable[[BulkStream], Awaitable[None]]) -> object:
        grant = self.node.links.grant_bulk(peer, PURPOSE)

        async def wait() -> None:
            try:
                stream = await grant.accept()
                async with stream:
                    await serve(stream)
            except MeshError:
                return

        self.node.links.spawn(wait)
        return Granted(grant.token)

    @asynccontextmanager
    async def stream(self, node: NodeId, method: str, params: object) -> AsyncGenerator[BulkStream, None]:
        granted = await self.node.links.call(node, method, params, Granted, timeout_s=10)
        stream = await self.node.links.open_bulk(node, granted.token, PURPOSE)
        try:
            yield stream
        finally:
            stream.cut("it is not needed any more")


@dataclass
class Member:
    """One node."""

    node: Node
    weights: Weights
    pulls: Pulls
    folder: Path
    scope: trio.CancelScope
    in_use: set[str] = field(default_factory=set)
    pinned: set[str] = field(default_factory=set)

    @property
    def id(self) -> NodeId:
        return self.node.node_id

    async def stage(self, manifest: Manifest, first: int, last: int, *, tail: bool = False) -> Path:
        path, _ = await self.weights.stage_file(
            manifest.digest, first, last, tail=tail, progress=lambda done, total, words: None
        )
        return Path(path)

    async def pull(self, ref: str, *, node: NodeId | None = None, whole: bool = False) -> list[Any]:
        return [told async for told in self.pulls.pull(ref, node=node, whole=whole)]

    def on_disk(self) -> int:
        """Bytes that files of weights take here, without holes."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*.gguf"))


class Offers:
    def __init__(self) -> None:
        self.known: dict[str, tuple[str, Described]] = {}

    def find(self, name: str) -> tuple[str, Described] | None:
        return self.known.get(name)


class World:
    """Members that see each other's records at once."""

    def __init__(self, links: Mesh, nursery: trio.Nursery, folder: Path, stack: AsyncExitStack) -> None:
        self.links = links
        self.nursery = nursery
        self.folder = folder
        self.stack = stack
        self.board = Board()
        self.members: list[Member] = []
        self.down: set[NodeId] = set()
        self.plan: list[Target] = []
        self.offers = Offers()
        self.deleters: set[NodeId] | None = None  # None: whoever wants to

    def may_delete(self, peer: NodeId) -> None:
        if self.deleters is not None and peer not in self.deleters:
            raise MeshError(ErrorCode.FORBIDDEN, "Only admins delete models from other nodes.")

    def alive(self) -> Sequence[NodeId]:
        return [member.id for member in self.members if member.id not in self.down]

    async def add(
        self, *, bytes_max: int = 0, token: str = "", hub: str = "https://huggingface.co", disk: int = DISK
    ) -> Member:
        node = await self.links.add()
        folder = self.folder / f"models{len(self.members)}"
        database = await self.stack.enter_async_context(
            open_database(
                self.folder / f"{len(self.members)}.db",
                read_migrations("llm", "meshnode.llm"),
                wall=0,
                inline=True,
            )
        )
        in_use: set[str] = set()
        pinned: set[str] = set()
        network, store, client = Network(node), WeightStore(database), httpx2.AsyncClient()
        self.stack.push_async_callback(client.aclose)
        ticks = iter(range(1, 10**9))
        weights = Weights(
            me=node.node_id,
            records=ModelRecords(me=node.node_id, reads=self.board, writes=self.board),
            store=store,
            network=network,
            alive=self.alive,
            client=client,
            folder=folder,
            bytes_max=bytes_max,
            hub=hub,
            token=token,
            in_use=in_use.__contains__,
            pinned=pinned.__contains__,
            may_delete=self.may_delete,
            other_names=lambda: sorted(self.offers.known),
            disk=lambda where: (disk, disk),
            offload=InlineOffload(),
            wall=lambda: float(next(ticks)),
            logger=node.log,
        )
        pulls = Pulls(
            weights=weights,
            store=store,
            network=network,
            alive=self.alive,
            planner=lambda manifest: list(self.plan),
            offers=self.offers,
            name_of=lambda node: f"node {node[:4]}",
            client=client,
            hub=hub,
            token=token,
            offload=InlineOffload(),
            wall=lambda: float(next(ticks)),
            logger=node.log,
        )
        node.methods.update(weight_methods(weights))
        member = Member(node, weights, pulls, folder, trio.CancelScope(), in_use, pinned)
        # The links' own table of methods was made before the service was.
        node.links._calls._methods = node.methods
        self.members.append(member)
        await self.nursery.start(self._run, member)
        return member

    async def _run(self, member: Member, task_status: trio.TaskStatus[None]) -> None:
        with member.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(lambda task_status: member.weights.run(task_status=task_status))
                await nursery.start(lambda task_status: member.pulls.run(task_status=task_status))
                task_status.started()


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    """Members are stopped at the end."""
    async with AsyncExitStack() as stack:
        links = await stack.enter_async_context(mesh(folder / "links"))
        async with trio.open_nursery() as nursery:
            made = World(links, nursery, folder, stack)
            with trio.fail_after(60):
                yield made
            nursery.cancel_scope.cancel()


def model(architecture: str = "llama", kind: str = "Q8_0", layers: int = 8) -> bytes:
    return tiny_model(architecture, kind, layers=layers).bytes()
