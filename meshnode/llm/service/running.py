"""One generation while it runs: drives the session machine with frames, timers and the client; gives out its tokens.

The machine decides (protocol/sharding/session.py); here its effects become calls and frames, and what others send
becomes its events. Text is made of the tokens elsewhere.
"""

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, assert_never

import trio

from meshnode.kernel.driver import Timers
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.llm.service.entries import Entries
from protocol.effects import CancelTimer, SetTimer, TimerFired
from protocol.ids import NodeId, node_id_bytes
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
    StageAlive,
    StageErred,
    StopFound,
    StreamLost,
)
from protocol.sharding.frames import (
    Accepted,
    Cancel,
    Message,
    Open,
    Pieces,
    Refused,
    StageError,
    encode,
)
from protocol.sharding.pipelines import Answer, EnsureRequest, Pipeline
from protocol.sharding.sampling import Sampling
from protocol.sharding.session import Session

AskEnsure = Callable[[EnsureRequest], Awaitable[Answer]]
"""Ask the coordinator. Raises MeshError."""

TAIL_S: Final = 1.0  # how long after the end a CANCEL may take to leave

INPUTS_MAX: Final = 8192
"""Frames that wait for a reader: more than any honest stage computes while a slow client is still suffered."""

Out = Emit | Progressed | Finish


class Running:
    """See the module. `events` gives what happens until the end; closing it ends the session everywhere. `named`: the
    pipeline that it begins with.
    """

    def __init__(
        self,
        *,
        machine: Session,
        sampling: Sampling,
        me: NodeId,
        entries: Entries,
        ensure: AskEnsure,
        spawn: Callable[..., None],
        now: Callable[[], float],
        log: Logger,
        named: Pipeline | None = None,
    ) -> None:
        self.machine = machine
        self._named = named
        self._sampling = sampling
        self._me = node_id_bytes(me)
        self._entries = entries
        self._ensure = ensure
        self._spawn = spawn
        self._now = now
        self._log = log
        self._timers = Timers()
        self._inputs: deque[SessionInput] = deque()
        self._wake = trio.Event()
        self._out: deque[Out] = deque()
        self._open: bytes | None = None
        self._pipelines: dict[NodeId, bytes] = {}
        self._failure: MeshError | None = None
        self._over = False
        self.first_heard_at: float | None = None

    @property
    def pipeline(self) -> Pipeline | None:
        """The one that it uses now."""
        return self.machine.pipeline

    def submit(self, event: SessionInput) -> None:
        """Feed the machine; it is handled by whoever iterates `events`."""
        self._inputs.append(event)
        self._wake.set()

    def stop_found(self) -> None:
        """A stop string stands in what was emitted."""
        self.submit(StopFound())

    async def events(self) -> AsyncGenerator[Out, None]:
        """Until Finish. Raises MeshError when the session fails."""
        try:
            self._perform(self.machine.start(self._now(), self._named))
            while True:
                while self._out:
                    event = self._out.popleft()
                    yield event
                    if isinstance(event, Finish):
                        return
                if self._failure is not None:
                    raise self._failure
                if self._inputs:
                    self._perform(self.machine.handle(self._inputs.popleft(), self._now()))
                    continue
                key = self._timers.take(self._now())
                if key is not None:
                    self._perform(self.machine.handle(TimerFired(key), self._now()))
                    continue
                self._wake = trio.Event()
                at = self._timers.next_at()
                with trio.move_on_after(3600.0 if at is None else max(0.0, at - self._now())):
                    await self._wake.wait()
        finally:
            self._perform(self.machine.handle(ClientLeft(), self._now()))
            self._over = True
            if self._open is not None:
                self._entries.forget(self._open)

    def _perform(self, effects: object) -> None:
        for effect in effects:  # type: ignore[attr-defined]  # a list of the machine's effects
            match effect:
                case SetTimer(key, at):
                    self._timers.set(key, at)
                case CancelTimer(key):
                    self._timers.cancel(key)
                case Emit() | Progressed() | Finish():
                    self._out.append(effect)
                case Fail(code, words, retryable):
                    self._failure = MeshError(ErrorCode(code), words, retryable=retryable)
                case Ensure():
                    self._spawn(self._ask, effect)
                case OpenSession():
                    self._begin(effect)
                case CancelSession(to, session):
                    pipeline = self._pipelines.get(to)
                    if pipeline is not None:
                        self._spawn(self._cancel, to, pipeline, session)
                case Accuse(peer, words):
                    self._log.warning("a peer broke the rules of a generation", peer=peer, what=words)
                    self._entries.drop(peer)
                case _:
                    assert_never(effect)

    # ---- outwards ---------------------------------------------------------------------------------------------------

    async def _ask(self, effect: Ensure) -> None:
        failed, failure = effect.complaint if effect.complaint is not None else (None, "")
        wish = (effect.model, effect.context, effect.without, failed, failure, effect.stages_min)
        request = EnsureRequest(*wish, engine=effect.engine)
        try:
            answer = await self._ensure(request)
        except MeshError as error:
            self.submit(EnsureFailed(effect.ask, error.message))
        else:
            self.submit(EnsureAnswered(effect.ask, answer))

    def _begin(self, effect: OpenSession) -> None:
        pipeline = self.machine.pipeline
        assert pipeline is not None  # the machine opens nothing else
        if self._open is not None:
            self._entries.forget(self._open)
        self._open = effect.session
        self._pipelines[effect.to] = pipeline.id
        self._entries.register(effect.session, self._heard, self._lost, self._alive)
        self._spawn(self._send_open, effect, pipeline)

    async def _send_open(self, effect: OpenSession, pipeline: Pipeline) -> None:
        frame = encode(
            Open(
                session=effect.session,
                entry=self._me,
                prompt=effect.prompt,
                sampling=self._sampling,
                generated=effect.generated,
            )
        )
        try:
            await self._entries.open(pipeline, effect.session, frame)
        except MeshError as error:
            self._lost(NodeId(str(error.detail.get("node_id", effect.to))), error.message)

    async def _cancel(self, to: NodeId, pipeline: bytes, session: bytes) -> None:
        with trio.move_on_after(TAIL_S):
            try:
                await self._entries.send(to, pipeline, encode(Cancel(session, self._me)))
            except MeshError:
                return  # who cannot be told has lost the stream, and ends the session for that

    # ---- inwards ----------------------------------------------------------------------------------------------------

    def _lost(self, node: NodeId, words: str) -> None:
        self.submit(StreamLost(node, words))

    def _alive(self, node: NodeId) -> None:
        self.submit(StageAlive(node))

    def _heard(self, node: NodeId, message: Message) -> None:
        if len(self._inputs) >= INPUTS_MAX:
            self._log.warning("a stage sends more than can be read", peer=node)
            self._entries.drop(node)
            return
        match message:
            case Accepted(session, _, cached):
                self.submit(SessionAccepted(node, session, cached))
            case Refused(session, code, words):
                self.submit(SessionRefused(node, session, code.value, words))
            case Pieces():
                self.submit(
                    PiecesReceived(
                        node,
                        message.session,
                        message.index,
                        message.tokens,
                        message.pieces,
                        int(message.finish),
                        message.alternatives,
                    )
                )
            case StageError(code, words, session, _, stage) if session is not None:
                self.submit(StageErred(node, session, code.value, words, stage))
            case _:
                self._log.warning("a stage sent what no generation asked for", peer=node, kind=type(message).__name__)
