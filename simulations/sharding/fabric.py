"""Models over a whole simulated mesh: one Member for each running process, what lies between them, and the faults.

It watches a world as a checker does, because that is where starts, crashes and published events can be seen.
"""

from functools import partial
from math import inf
from random import Random
from typing import Final, Protocol

from protocol.ids import NodeId
from protocol.sharding.fitting import Wish
from protocol.sharding.held import LoadingParameters
from protocol.sharding.offers import Links, NodeOffer, Speed
from protocol.sharding.pipelines import FEW_NODES, Layout, Planned, PlanWanted, Span
from protocol.sharding.plans import Refusal
from protocol.sharding.selftests import Findings, Pair, Wanted, choose
from protocol.sharding.shapes import ModelShape
from simulations.beside import Beside
from simulations.computer import DOWN, Computer
from simulations.sharding.member import Client, Member
from simulations.sharding.toy import VOCABULARY
from simulations.wires import Wires
from simulations.world import World

GB: Final = 10**9
CONTEXT: Final = 256
VERSIONS: Final = ("1.0", "1.0", "1.0", "1.1", "1.1", "0.9")  # of engines, by computer
ODD: Final = frozenset({"0.9"})  # what these hand on, others misread; all the others compute alike


def toy_shape(name: str, layers: int) -> ModelShape:
    """A model of so many layers of one gigabyte."""
    return ModelShape(
        digest=name, name=name, architecture="toy", quantisation="F32", n_embd=64, n_vocab=VOCABULARY,
        context_max=4096, layer_bytes=(GB,) * layers, kv_bytes_per_token=(1000,) * layers, embed_bytes=GB // 10,
        output_bytes=GB // 10, cuts=tuple(range(1, layers)),
    )  # fmt: skip


SHAPES: Final = {shape.digest: shape for shape in (toy_shape("large", 12), toy_shape("small", 3))}


def version_of(computer: Computer) -> str:
    """Which engine it runs."""
    return VERSIONS[computer.index % len(VERSIONS)]


class Watcher(Protocol):
    """Who wants to see what clients get, beside what every checker sees."""

    def asked(self, client: Client) -> None: ...
    def emitted(self, client: Client, index: int, tokens: tuple[int, ...], pieces: tuple[bytes, ...]) -> None: ...
    def ended(self, client: Client) -> None: ...
    def accused(self, by: Computer, peer: Computer, words: str) -> None: ...


class Fabric(Beside):
    """See the module."""

    name = "fabric"

    def __init__(self, seed: int, params: LoadingParameters) -> None:
        super().__init__()
        self.rng = Random(f"sharding/{seed}")
        self.params = params
        self.context = CONTEXT
        self.peaceful = False  # no faults in this run, and no slow frames
        self.members: dict[int, Member] = {}
        self.capacity: dict[int, int] = {}
        self.liars: set[int] = set()
        self.ever_lied: set[int] = set()
        self.findings: dict[int, dict[Pair, float]] = {}  # durable: what each computer found out about versions
        self.tests = 0
        self._testing: set[tuple[int, Pair]] = set()
        self.watchers: list[Watcher] = []
        self.lies = self.loads = self.takeovers = self.overcommitted = self.accusations = 0

    # ---- a checker's eyes --------------------------------------------------------------------------------------------

    def attached(self, world: World) -> None:
        """Begin."""
        super().attached(world)
        self.wires = Wires(world, self.rng, self.run)

    def started(self, computer: Computer) -> None:
        """A process was built: it gets its own machines, which know nothing."""
        self.capacity.setdefault(computer.index, self.rng.choice((3, 5, 5, 7, 9)) * GB)
        self.members[computer.index] = Member(self, computer)

    def crashed(self, computer: Computer) -> None:
        """Engines die with their agent; the peers hear of it soon, or late."""
        super().crashed(computer)
        self.members.pop(computer.index, None)
        late = self.rng.random() < 0.3
        for member in list(self.members.values()):
            delay = self.rng.uniform(4.0, 8.0) if late else self.rng.uniform(0.0, 0.1)
            member.later(delay, partial(member.peer_lost, computer))

    def published(self, computer: Computer, event: object) -> None:
        """What the hub says reaches the machines beside it at once."""
        member = self.members.get(computer.index)
        if member is not None:
            member.published(event)

    # ---- planning ----------------------------------------------------------------------------------------------------

    def plan(self, member: Member, wanted: PlanWanted) -> Planned:
        """What a service does about PlanWanted: the real planner over what nodes offer."""
        computer = member.computer
        shape = SHAPES[wanted.model]
        seen = {computer.node_id, *computer.program.believed_up(computer)}
        offers = []
        for other in self.members.values():
            node = other.computer.node_id
            if node in seen and node not in wanted.without:
                free = self.capacity[other.computer.index] - other.stages.used_bytes
                free += wanted.freed.get(node, (0, 0))[0] - wanted.taken.get(node, (0, 0))[0]
                # Some are twice as fast as others, always the same ones.
                speed = Speed(GB, 0.01 * (1 + other.computer.index % 2), 0.001)
                offers.append(
                    NodeOffer(
                        node=node,
                        name=repr(other.computer),
                        ram_free_bytes=max(0, free),
                        speed=speed,
                        version=version_of(other.computer),
                    )
                )
        if len(offers) < wanted.stages_min:
            return Planned(wanted.job, None, FEW_NODES, f"{len(offers)} nodes can run models.")
        wish = Wish(context=wanted.context, slots=self.params.slots, stages_min=wanted.stages_min)
        kept = {NodeId(span.node): (span.first, span.end) for span in wanted.kept}
        known = Findings(self.findings.get(computer.index, {}))
        made, tests = choose(shape, wish, kept, offers, Links(), known)
        for test in tests:
            self._test(member, test)
        if isinstance(made, Refusal):
            code = "no_memory" if made.code == "no_nodes" else made.code
            return Planned(wanted.job, None, code, made.words, made.short_bytes)
        spans = tuple(Span(stage.node, stage.first, stage.end, stage.ram_bytes) for stage in made.stages)
        return Planned(wanted.job, Layout(spans, VOCABULARY, made.reasons[0]))

    def misread(self, source: Computer, node: NodeId, chunk: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """What the next stage makes of what a stage hands on: engines that do not agree make nonsense of it."""
        target = self.world.find(node)
        assert target is not None  # nobody makes nodes up
        if chunk is None or (version_of(source) in ODD) == (version_of(target) in ODD):
            return chunk
        return tuple((token + 1) % VOCABULARY for token in chunk)

    def _test(self, member: Member, wanted: Wanted) -> None:
        """Two computers' versions are tested against each other, for a while; if one of them dies, nothing is known."""
        key = (member.computer.index, wanted.pair)
        if key in self._testing:
            return
        self._testing.add(key)

        def ended() -> None:
            self._testing.discard(key)
            if member.run != member.computer.run:
                return
            versions = []
            for node in wanted.nodes:
                computer = self.world.find(node)
                if computer is None or computer.state == DOWN or computer.paused:
                    return
                versions.append(version_of(computer))
            self.tests += 1
            differs = len({version in ODD for version in versions}) > 1
            self.findings.setdefault(member.computer.index, {})[wanted.pair] = inf if differs else 0.0

        self.world.after(self.rng.uniform(0.5, 3.0), ended)

    # ---- what members tell -------------------------------------------------------------------------------------------

    def asked(self, client: Client) -> None:
        """A client came."""
        for watcher in self.watchers:
            watcher.asked(client)

    def emitted(self, client: Client, index: int, tokens: tuple[int, ...], pieces: tuple[bytes, ...]) -> None:
        """Tokens reached a client."""
        for watcher in self.watchers:
            watcher.emitted(client, index, tokens, pieces)

    def ended(self, client: Client) -> None:
        """A client got its end."""
        for watcher in self.watchers:
            watcher.ended(client)

    def accused(self, member: Member, peer: NodeId, words: str) -> None:
        """A session says that a peer lies."""
        self.accusations += 1
        accused = self.world.find(peer)
        assert accused is not None  # nobody makes nodes up
        for watcher in self.watchers:
            watcher.accused(member.computer, accused, words)

    def noted(self, member: Member, event: object) -> None:
        """A loading machine published something; --tell prints it."""
        self.world.tell_published(member.computer, event)
