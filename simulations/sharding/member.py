"""One computer's part in serving models: performs the effects of the session, loading and hosting machines.

It stands where the agent's llm service stands and decides nothing. The hub beside it (membership, election) is the real
one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from protocol.effects import CancelTimer, Persist, Publish, SetTimer, TimerFired, TimerKey
from protocol.election.events import CoordinatorChanged
from protocol.election.fence import FENCE_MACHINE, Fence
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft
from protocol.sharding.events import (
    Accuse,
    CancelSession,
    ClientLeft,
    Emit,
    Ensure,
    EnsureAnswered,
    EnsureFailed,
    Fail,
    Finish,
    OpenSession,
    PiecesReceived,
    Progressed,
    SessionAccepted,
    SessionInput,
    SessionRefused,
    StageErred,
    StopFound,
    StreamLost,
)  # fmt: skip
from protocol.sharding.hosting import (
    AnswerCommand,
    Hosting,
    HostingInput,
    RebindEngine,
    ReportDone,
    RunProbe,
    SendReport,
    StageCommanded,
    StartEngine,
    StopEngine,
)  # fmt: skip
from protocol.sharding.loading import LoadingInput, LoadingMachine
from protocol.sharding.pipelines import (
    Answer,
    AnswerEnsure,
    CommandFailed,
    CommandStage,
    EnsureAsked,
    EnsureRequest,
    MembersUp,
    NodeReport,
    PlanWanted,
    Reported,
    StageCommand,
)  # fmt: skip
from protocol.sharding.session import STEM_BYTES, Session
from simulations.computer import Computer
from simulations.sharding.stages import Stages
from simulations.sharding.toy import Running

if TYPE_CHECKING:
    from simulations.sharding.fabric import Fabric

_encode = msgspec.msgpack.Encoder().encode
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_requests = msgspec.msgpack.Decoder(EnsureRequest)
_commands = msgspec.msgpack.Decoder(StageCommand)
_reports = msgspec.msgpack.Decoder(NodeReport)


@dataclass(slots=True)
class Client:
    """Somebody who wants an answer, and what it got."""

    session: Session
    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    began: float
    leaves_after: int | None = None
    stops_after: int | None = None
    tokens: list[int] = field(default_factory=list)
    token_at: float = 0.0
    gap_s: float = 0.0
    recoveries: int = 0
    end: str = ""
    words: str = ""
    ended_at: float = 0.0


class Member:
    """All of it for one process of one computer."""

    def __init__(self, fabric: "Fabric", computer: Computer) -> None:
        self.fabric = fabric
        self.computer = computer
        self.run = computer.run
        self.loading = LoadingMachine(me=computer.node_id, rng=fabric.rng, params=fabric.params)
        durable = computer.disk.tables.setdefault(FENCE_MACHINE, {})
        self.hosting = Hosting(me=computer.node_id, fence=Fence(durable))
        self.stages = Stages(self)
        self.clients: dict[bytes, Client] = {}
        self.coordinator: NodeId | None = None
        self._timers: dict[TimerKey, int] = {}
        self._token = 0
        self._asks: dict[int, Callable[[bytes], None]] = {}
        self._calls: dict[int, Callable[[bytes], None]] = {}
        self._number = 0

    # ---- inputs ------------------------------------------------------------------------------------------------------

    def published(self, event: object) -> None:
        """The hub published something."""
        if isinstance(event, CoordinatorChanged):
            self.coordinator = event.leader
            self.loaded(event)
            self.hosted(event)
            self.loaded(
                MembersUp(frozenset({self.computer.node_id, *self.computer.program.believed_up(self.computer)}))
            )
        elif isinstance(event, PeerDown | PeerLeft):
            self.loaded(event)
            for stem in list(self.clients):
                self.client(stem, event)

    def peer_lost(self, peer: Computer) -> None:
        """Every stream with this computer broke."""
        self.stages.peer_lost(peer)
        for stem in list(self.clients):
            self.client(stem, StreamLost(peer.node_id, "reset by peer"))

    def loaded(self, event: LoadingInput) -> None:
        """Something for the coordinator's machine."""
        for effect in self.loading.handle(event, self.computer.now()):
            match effect:
                case AnswerEnsure(ask, answer):
                    reply = self._asks.pop(ask, None)
                    if reply is not None:
                        reply(_encode(answer))
                case PlanWanted():
                    self.later(self.fabric.rng.uniform(0.01, 0.2), partial(self._planned, effect))
                case CommandStage(node, command):
                    self._command(node, command)
                case Publish(published):
                    self.fabric.noted(self, published)
                case _:
                    self._timer(effect)

    def hosted(self, event: HostingInput) -> None:
        """Something for the machine that holds stages."""
        for effect in self.hosting.handle(event, self.computer.now()):
            match effect:
                case AnswerCommand(call, words):
                    self._calls.pop(call)(words.encode())
                case StartEngine(pipeline, span):
                    self.stages.start(pipeline, span)
                case RebindEngine(old, pipeline, span):
                    self.stages.rebind(old, pipeline, span)
                case StopEngine(pipeline):
                    self.stages.stop(pipeline)
                case RunProbe(pipeline, number):
                    self.stages.probe(pipeline, number)
                case SendReport(to, report):
                    self._report(to, report)
                case Persist(machine, key, value):
                    assert value is not None
                    self.computer.disk.tables.setdefault(machine, {})[key] = value
                case SetTimer() | CancelTimer():
                    self._timer(effect)
                case _:
                    raise TypeError(f"hosting cannot ask for {effect!r}")

    def client(self, stem: bytes, event: SessionInput) -> None:
        """Something for a session."""
        client = self.clients.get(stem)
        if client is not None:
            self._session(client, client.session.handle(event, self.computer.now()))

    def client_frame(self, peer: NodeId, session: bytes, kind: str, what: tuple[object, ...]) -> None:
        """A frame of a stage for a session of this entry."""
        event: SessionInput
        if kind == "accepted":
            event = SessionAccepted(peer, session, *what)  # type: ignore[arg-type]  # as stages.py packs them
        elif kind == "refused":
            event = SessionRefused(peer, session, *what)  # type: ignore[arg-type]  # as stages.py packs them
        elif kind == "error":
            event = StageErred(peer, session, *what)  # type: ignore[arg-type]  # as stages.py packs them
        else:
            event = PiecesReceived(peer, session, *what[:4])  # type: ignore[arg-type]  # as stages.py packs them
        self.client(session[:STEM_BYTES], event)

    def ask(self, model: str, prompt: tuple[int, ...], max_tokens: int, *, leaves_after: int | None = None,
            stops_after: int | None = None, stages_min: int = 1) -> Client:  # fmt: skip
        """A client comes to this computer."""
        stem = self.fabric.rng.randbytes(STEM_BYTES)
        session = Session(
            stem=stem, model=model, prompt=prompt, max_tokens=max_tokens, context=self.fabric.context,
            rng=self.fabric.rng, stages_min=stages_min,
        )  # fmt: skip
        client = Client(session, model, prompt, max_tokens, self.fabric.world.now, leaves_after, stops_after)
        self.clients[stem] = client
        self.fabric.asked(client)
        self._session(client, session.start(self.computer.now()))
        return client

    # ---- effects of sessions -----------------------------------------------------------------------------------------

    def _session(self, client: Client, effects: Sequence[object]) -> None:
        stem = client.session.id[:STEM_BYTES]
        for effect in effects:
            match effect:
                case Ensure():
                    self._ensure(stem, effect)
                case OpenSession(to, session, pipeline, prompt, generated):
                    running = Running(session, self.computer.index, prompt, generated, client.max_tokens)
                    lost = partial(self.client, stem, StreamLost(to, "it could not be opened"))
                    self.send(to, ("open", session), partial(_opened, running, pipeline), lost)
                case _:
                    self._more(client, stem, effect)

    def _more(self, client: Client, stem: bytes, effect: object) -> None:
        match effect:
            case CancelSession(to, session):
                self.send(to, ("open", session), partial(_cancelled, session))
            case Emit(index, tokens, pieces):
                self._emitted(client, stem, index, tokens, pieces)
            case Accuse(peer, words):
                self.fabric.accused(self, peer, words)
            case Progressed(stage):
                client.recoveries += stage == "recovering"
            case Finish(reason):
                self._ended(client, stem, reason, "")
            case Fail(code, words):
                self._ended(client, stem, code, words)
            case SetTimer() | CancelTimer():
                self._timer(effect)
            case _:
                raise TypeError(f"a session cannot ask for {effect!r}")

    def _emitted(self, client: Client, stem: bytes, index: int, tokens: tuple[int, ...],
                 pieces: tuple[bytes, ...]) -> None:  # fmt: skip
        now = self.fabric.world.now
        if client.token_at:
            client.gap_s = max(client.gap_s, now - client.token_at)
        client.token_at = now
        self.fabric.emitted(client, index, tokens, pieces)
        client.tokens += tokens
        if client.leaves_after is not None and len(client.tokens) >= client.leaves_after:
            self.later(0.0, lambda: self.client(stem, ClientLeft()))
        if client.stops_after is not None and len(client.tokens) >= client.stops_after:
            self.later(0.0, lambda: self.client(stem, StopFound()))

    def _ended(self, client: Client, stem: bytes, end: str, words: str) -> None:
        client.end, client.words, client.ended_at = end, words, self.fabric.world.now
        self.fabric.ended(client)
        self.later(2.0, lambda: self.clients.pop(stem, None))

    def cancelled(self, session: bytes) -> None:
        """CANCEL came."""
        for pipeline in list(self.stages.engines):
            self.stages.cancel(session, pipeline)

    def _ensure(self, stem: bytes, effect: Ensure) -> None:
        coordinator = self.coordinator
        if coordinator is None:
            self.later(0.01, lambda: self.client(stem, EnsureFailed(effect.ask, "no coordinator is known")))
            return
        failed, failure = effect.complaint or (None, "")
        request = EnsureRequest(effect.model, effect.context, effect.without, failed, failure, effect.stages_min)
        body = _encode(request)
        me = self.computer.node_id

        def replied(answer: bytes | None) -> None:
            if answer is None:
                self.client(stem, EnsureFailed(effect.ask, "the coordinator did not answer"))
            else:
                self.client(stem, EnsureAnswered(effect.ask, _answers.decode(answer)))

        self.call(coordinator, lambda other, answer: other.ensure_asked(me, body, answer), replied)

    # ---- calls -------------------------------------------------------------------------------------------------------

    def ensure_asked(self, peer: NodeId, body: bytes, answer: Callable[[bytes], None]) -> None:
        """`llm.ensure` came."""
        self._number += 1
        self._asks[self._number] = answer
        self.loaded(EnsureAsked(self._number, peer, _requests.decode(body)))

    def stage_commanded(self, peer: NodeId, body: bytes, answer: Callable[[bytes], None]) -> None:
        """`llm.stage` came."""
        self._number += 1
        self._calls[self._number] = answer
        self.hosted(StageCommanded(peer, _commands.decode(body), self._number))

    def _command(self, node: NodeId, command: StageCommand) -> None:
        body, me = _encode(command), self.computer.node_id
        order = command.order
        pipeline = order.pipeline if isinstance(order.pipeline, bytes) else order.pipeline.id

        def replied(words: bytes | None) -> None:
            if words is None or words:
                said = "it did not answer" if words is None else words.decode()
                self.loaded(CommandFailed(node, pipeline, said))

        self.call(node, lambda other, answer: other.stage_commanded(me, body, answer), replied)

    def _report(self, to: NodeId, report: NodeReport) -> None:
        body, me = _encode(report), self.computer.node_id

        def reported(other: "Member", answer: Callable[[bytes], None]) -> None:
            other.loaded(Reported(me, _reports.decode(body)))
            answer(b"")

        self.call(to, reported, lambda reply: self.hosted(ReportDone(to, reply is not None)))

    def _planned(self, wanted: PlanWanted) -> None:
        self.loaded(self.fabric.plan(self, wanted))

    # ---- the driver --------------------------------------------------------------------------------------------------

    def send(self, node: NodeId, stream: object, deliver: Callable[["Member"], None],
             lost: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        """One frame of a bulk stream."""
        target = self.fabric.world.find(node)
        assert target is not None  # nobody makes nodes up
        self.fabric.wires.send(self.computer, target, stream, lambda: deliver(self.fabric.members[target.index]), lost)

    def call(self, node: NodeId, deliver: Callable[["Member", Callable[[bytes], None]], None],
             replied: Callable[[bytes | None], None]) -> None:  # fmt: skip
        """One call."""
        target = self.fabric.world.find(node)
        assert target is not None  # nobody makes nodes up
        self.fabric.wires.call(
            self.computer, target, lambda answer: deliver(self.fabric.members[target.index], answer), replied
        )

    def later(self, delay: float, call: Callable[[], object]) -> None:
        """Run something in this process, if it still is there then."""
        self.fabric.world.after(delay, self.fabric.run, self.computer, self.run, call)

    def _timer(self, effect: SetTimer | CancelTimer) -> None:
        if isinstance(effect, CancelTimer):
            self._timers.pop(effect.key, None)
            return
        self._token += 1
        token = self._timers[effect.key] = self._token
        self.later(max(0.0, effect.at - self.computer.now()) + 1e-6, lambda: self._fire(effect.key, token, effect.at))

    def _fire(self, key: TimerKey, token: int, at: float) -> None:
        if self._timers.get(key) != token:
            return
        if self.computer.now() < at:  # its clock runs slower than the world's
            self.later(at - self.computer.now() + 1e-6, lambda: self._fire(key, token, at))
            return
        del self._timers[key]
        if key[0] == "session":
            self.client(bytes.fromhex(str(key[1])), TimerFired(key))
        elif key[0] == "loading":
            self.loaded(TimerFired(key))
        else:
            self.hosted(TimerFired(key))

    @property
    def sizes(self) -> Sequence[tuple[str, int, int]]:
        """(name, entries, limit) of what must stay bounded."""
        return (
            ("timers of models", len(self._timers), 3 * len(self.clients) + 8),
            ("asks", len(self._asks), 200),
            ("calls", len(self._calls), 8),
            ("pipelines", len(self.loading.pipelines), 24),
            ("stages", len(self.hosting.stages), 16),
        )


def _opened(running: Running, pipeline: bytes, member: Member) -> None:
    member.stages.open(running, pipeline)


def _cancelled(session: bytes, member: Member) -> None:
    member.cancelled(session)
