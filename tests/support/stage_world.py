"""Nodes with stages over real links and real engines: what the tests of frames between nodes are made of.

Who holds which stage is told by the test, as a coordinator would; reports to it are kept.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
import trio.testing

from meshnode.kernel.calls import Granted
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.llm.service.calls import Attach, Calls
from meshnode.llm.service.entries import Entries
from meshnode.llm.service.hosts import Hosts
from protocol.effects import Persist
from protocol.election.events import CoordinatorChanged
from protocol.election.fence import Fence
from protocol.ids import NodeId, node_id_bytes
from protocol.sharding.frames import Accepted, Open, Pieces, encode
from protocol.sharding.hosting import Hosting
from protocol.sharding.offers import Speed
from protocol.sharding.pipelines import LoadStage, NodeReport, Pipeline, Span, StageCommand, StageReport
from protocol.sharding.sampling import Sampling
from tests.kernel.links.world import Mesh, Node, mesh, settle

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = tuple((index * 7) % 300 + 5 for index in range(20))
CONTEXT = 512


class Cuts:
    """Files of layers by (first, end), as the weights service has them."""

    def __init__(self, files: dict[tuple[int, int], str]) -> None:
        self.files = files

    async def stage_file(
        self, digest: str, first: int, end: int, *, tail: bool, progress: Callable[[int, int, str], None]
    ) -> tuple[str, bool]:
        await trio.lowlevel.checkpoint()
        return self.files[first, end], tail


class Lent:
    threads = 1
    is_measured = True

    def __init__(self) -> None:
        self.whole_only: list[str] = []

    def cannot_split(self, architecture: str) -> None:
        self.whole_only.append(architecture)


@dataclass
class Member:
    """One node of the mesh, with hosts and an entry of its own."""

    node: Node
    calls: Calls
    hosts: Hosts
    entries: Entries
    lent: Lent
    reports: list[NodeReport] = field(default_factory=list)

    @property
    def id(self) -> NodeId:
        return self.node.node_id

    def stage(self, pipeline: Pipeline) -> StageReport:
        """What it reports of its stage."""
        return next(one for one in self.reports[-1].stages if one.pipeline.id == pipeline.id)

    async def ask(self, pipeline: Pipeline, *, session: bytes, prompt: Sequence[int] = PROMPT) -> list[int]:
        """A whole greedy answer through the pipeline."""
        tokens: list[int] = []
        async with self.entries.raw(session) as heard:
            await self.entries.open(pipeline, session, self.opening(session, prompt))
            while True:
                with trio.fail_after(20):
                    message = await heard.receive()
                assert isinstance(message, Accepted | Pieces), message
                if isinstance(message, Pieces):
                    tokens += message.tokens
                    if message.finish:
                        return tokens

    def opening(self, session: bytes, prompt: Sequence[int] = PROMPT, sampling: Sampling = GREEDY) -> bytes:
        return encode(Open(session, node_id_bytes(self.id), tuple(prompt), sampling))


class World:
    """See the module. `width`: of the model's states."""

    width = 256

    def __init__(self, links: Mesh, nursery: trio.Nursery, files: dict[tuple[int, int], str]) -> None:
        self.links = links
        self.nursery = nursery
        self.cuts = Cuts(files)
        self.members: list[Member] = []
        self._made = 0

    async def add(self) -> Member:
        node = await self.links.add()
        calls = Calls(me=node.node_id, links=node.links, log=node.log)

        async def persist(effect: Persist) -> None:
            await trio.lowlevel.checkpoint()

        async def report(to: NodeId, told: object) -> None:
            await trio.lowlevel.checkpoint()
            assert isinstance(told, NodeReport)
            member.reports.append(told)

        async def probe(pipeline: Pipeline) -> None:
            await trio.lowlevel.checkpoint()

        async def remember(speed: Speed) -> None:
            await trio.lowlevel.checkpoint()

        lent = Lent()
        hosts = Hosts(
            machine=Hosting(me=node.node_id, fence=Fence({})),
            calls=calls,
            weights=self.cuts,
            lent=lent,
            persist=persist,
            report=report,
            probe=probe,
            remember=remember,
            weight_bytes=lambda model, first, end: 1,
            architecture=lambda model: "llama",
            hear=lambda pipeline, span, stats: None,
            now=trio.current_time,
            log=node.log,
        )
        member = Member(node, calls, hosts, Entries(calls=calls, hosts=hosts, log=node.log), lent)

        async def attach(peer: NodeId, wanted: Attach) -> Granted:
            return hosts.attach(peer, wanted)

        # The links' own table of methods was made before the service was.
        node.methods["llm.attach"] = PeerMethod(Attach, attach)
        node.links._calls._methods = node.methods
        self.members.append(member)
        self.nursery.start_soon(hosts.run)
        self.nursery.start_soon(member.entries.run)
        await trio.testing.wait_all_tasks_blocked()
        return member

    async def load(self, *holders: Member) -> Pipeline:
        """Have these hold the stages, one each, and wait until all are ready."""
        pipeline = self.planned([holder.id for holder in holders])
        for holder in holders:
            await self.hold(holder, pipeline)
        await settle(lambda: all(self.is_ready(holder, pipeline) for holder in holders), within_s=30)
        return pipeline

    def planned(self, nodes: Sequence[NodeId]) -> Pipeline:
        """A pipeline over these nodes."""
        edges = sorted(self.cuts.files)
        self._made += 1
        spans = tuple(Span(node, first, end, 1, 0, 0) for node, (first, end) in zip(nodes, edges, strict=True))
        return Pipeline(bytes([self._made]) * 8, "0" * 64, CONTEXT, 4, spans)

    async def hold(self, holder: Member, pipeline: Pipeline) -> None:
        """A coordinator's command."""
        holder.hosts.submit(CoordinatorChanged(1, holder.id, True))
        assert await holder.hosts.command(holder.id, StageCommand(1, LoadStage(pipeline))) == ""

    def is_ready(self, holder: Member, pipeline: Pipeline) -> bool:
        told = holder.reports[-1].stages if holder.reports else ()
        return any(one.pipeline.id == pipeline.id and one.state == "ready" for one in told)


@asynccontextmanager
async def stages(folder: Path, files: Sequence[tuple[str, int]]) -> AsyncIterator[World]:
    """`files`: path and count of layers of each stage, as `cut` gives them."""
    spans: dict[tuple[int, int], str] = {}
    first = 0
    for path, layers in files:
        spans[first, first + layers] = path
        first += layers
    async with AsyncExitStack() as stack:
        links = await stack.enter_async_context(mesh(folder / "links"))
        async with trio.open_nursery() as nursery:
            with trio.fail_after(90):
                yield World(links, nursery, spans)
            nursery.cancel_scope.cancel()
