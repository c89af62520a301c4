"""The stages of one computer: toy engines that load, compute, hang, lie and die, and the frames between them.

It stands where the engine processes and the agent's relays stand: it does what hosting asks for and tells it what
happens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.sharding.events import FINISH_EOG, FINISH_LENGTH, FINISH_NONE
from protocol.sharding.hosting import EngineChanged, EngineUsed, ProbeEnded
from protocol.sharding.pipelines import Pipeline, Span
from simulations.computer import Computer
from simulations.sharding.toy import CHUNK, END, QUEUE_MAX, VOCABULARY, Engine, Kept, Running, next_token

if TYPE_CHECKING:
    from simulations.sharding.member import Member

STEP_S = 0.004
LIFE_S = 1.0
PROBE = bytes(16)  # the session id of probes


class Stages:
    """All engines of one process of a computer."""

    def __init__(self, member: "Member") -> None:
        self._member = member
        self._fabric = member.fabric
        self._computer = member.computer
        self._rng = member.fabric.rng
        self.engines: dict[bytes, Engine] = {}
        self.used_bytes = 0
        self._serial = 0
        self._busy_until: dict[int, float] = {}
        self._probes: dict[bytes, int] = {}

    # ---- what hosting asks for ---------------------------------------------------------------------------------------

    def start(self, pipeline: Pipeline, span: Span) -> None:
        """A new engine begins to load; without the memory for it it breaks."""
        self._serial += 1
        engine = Engine(pipeline, span, serial=self._serial)
        if self.used_bytes + span.ram_bytes > self._fabric.capacity[self._computer.index]:
            self._fabric.overcommitted += 1
            self._member.hosted(EngineChanged(pipeline.id, "broken", 0.0, "out_of_memory"))
            return
        self.engines[pipeline.id] = engine
        self.used_bytes += span.ram_bytes
        self._fabric.loads += 1
        self._later(self._rng.uniform(0.05, 0.5), engine, self._load)
        self._later(LIFE_S, engine, self._live)

    def rebind(self, old: bytes, pipeline: Pipeline, span: Span) -> None:
        """The engine serves in another pipeline."""
        engine = self.engines.pop(old)
        self._drop_sessions(engine, "the pipeline was mended")
        self._serial += 1
        again = Engine(pipeline, span, "ready", 1.0, engine.hung, self._serial)
        self.used_bytes += span.ram_bytes - engine.span.ram_bytes
        self.engines[pipeline.id] = again
        self._fabric.takeovers += 1
        self._later(LIFE_S, again, self._live)

    def stop(self, pipeline: bytes) -> None:
        """End an engine; it takes a moment."""
        engine = self.engines.get(pipeline)
        if engine is None:
            self._member.later(0.01, lambda: self._member.hosted(EngineChanged(pipeline, "gone")))
            return
        self._drop_sessions(engine, "the stage is unloaded")
        engine.state = "stopping"
        self._later(self._rng.uniform(0.02, 0.6), engine, self._stopped)

    def _stopped(self, engine: Engine) -> None:
        del self.engines[engine.pipeline.id]
        self.used_bytes -= engine.span.ram_bytes
        self._member.hosted(EngineChanged(engine.pipeline.id, "gone"))

    def probe(self, pipeline: bytes, number: int) -> None:
        """One token through all stages."""
        engine = self.engines.get(pipeline)
        if engine is None or engine.state != "ready":
            self._member.hosted(ProbeEnded(pipeline, number, False, "not ready"))
            return
        self._probes[pipeline] = number
        session = PROBE[:8] + number.to_bytes(8, "little")
        self._begin(engine, Running(session, self._computer.index, (1, 2, 3), (), 1))

    def _load(self, engine: Engine) -> None:
        if engine.hung:
            self._later(0.1, engine, self._load)
            return
        engine.share = min(1.0, engine.share + self._rng.uniform(0.1, 0.6))
        if engine.share < 1.0:
            self._member.hosted(EngineChanged(engine.pipeline.id, "loading", engine.share))
            self._later(self._rng.uniform(0.05, 0.5), engine, self._load)
        elif engine.state == "loading":
            engine.state = "ready"
            self._member.hosted(EngineChanged(engine.pipeline.id, "ready", 1.0))

    def break_engine(self, engine: Engine, words: str, blamed: int | None) -> None:
        """An engine died, or lost a neighbour: its agent notices."""
        if engine.state in ("stopping", "broken"):
            return
        self._drop_sessions(engine, words, blamed)
        if blamed is None or engine.state == "loading":
            engine.state = "broken"
        self._member.hosted(EngineChanged(engine.pipeline.id, "broken", 0.0, words, blamed))

    def peer_lost(self, peer: Computer) -> None:
        """All streams with this computer broke."""
        for engine in list(self.engines.values()):
            nodes, mine = engine.pipeline.nodes, engine.index
            near = {mine - 1, mine + 1} | ({len(nodes) - 1} if mine == 0 else {0} if engine.is_last else set())
            for index in sorted(near):
                if 0 <= index < len(nodes) and nodes[index] == peer.node_id:
                    self.break_engine(engine, "the stream to a neighbour is lost", index)
                    break
            for running in [running for running in engine.sessions.values() if running.entry == peer.index]:
                self.cancel(running.session, engine.pipeline.id)

    # ---- the first stage ---------------------------------------------------------------------------------------------

    def open(self, running: Running, pipeline: bytes) -> None:
        """OPEN came."""
        engine = self.engines.get(pipeline)
        if engine is None or engine.state != "ready" or engine.index != 0:
            self._to_entry(running.entry, running.session, "refused", "not_loaded", "no such pipeline is ready here")
            return
        if len(engine.sessions) >= engine.pipeline.slots + QUEUE_MAX:
            self._to_entry(running.entry, running.session, "refused", "busy", "every slot and the queue are taken")
            return
        engine.sessions[running.session] = running
        self._to_entry(running.entry, running.session, "accepted", 0)
        self._member.hosted(EngineUsed(pipeline, len(engine.sessions)))
        self._admit(engine)

    def cancel(self, session: bytes, pipeline: bytes) -> None:
        """CANCEL came, or the entry is gone."""
        engine = self.engines.get(pipeline)
        if engine is not None and engine.sessions.pop(session, None) is not None:
            self._close(engine, session)

    def _admit(self, engine: Engine) -> None:
        begun = sum(running.begun for running in engine.sessions.values())
        for running in list(engine.sessions.values()):
            if not running.begun and begun < engine.pipeline.slots:
                begun += 1
                self._begin(engine, running)

    def _begin(self, engine: Engine, running: Running) -> None:
        running.begun = True
        engine.sessions[running.session] = running
        tokens = [*running.prompt, *running.generated]
        for start in range(0, len(tokens), CHUNK):
            chunk = tuple(tokens[start : start + CHUNK])
            wants = start + CHUNK >= len(tokens)
            opened = (running.entry, len(running.prompt), running.max_tokens) if start == 0 else None
            self._compute(engine, running.session, start, chunk, wants, opened)
        running.sent = len(tokens)

    def tokens(self, pipeline: bytes, session: bytes, token: int, finish: int) -> None:
        """TOKENS came from the last stage."""
        engine = self.engines.get(pipeline)
        running = engine.sessions.get(session) if engine is not None else None
        if engine is None or running is None:
            return
        if session[:8] == PROBE[:8]:
            number = self._probes.get(pipeline, 0)
            self._member.hosted(ProbeEnded(pipeline, number, session[8:] == number.to_bytes(8, "little")))
        if finish or session[:8] == PROBE[:8]:
            del engine.sessions[session]
            self._close(engine, session)
        else:
            self._compute(engine, session, running.sent, (token,), True, None)
            running.sent += 1

    def _close(self, engine: Engine, session: bytes) -> None:
        self._hand_on(engine, session, 0, None, False, None)
        engine.sequences.pop(session, None)
        active = sum(each[:8] != PROBE[:8] for each in engine.sessions)
        self._member.hosted(EngineUsed(engine.pipeline.id, active))
        self._admit(engine)

    # ---- any stage ---------------------------------------------------------------------------------------------------

    def step(self, pipeline: bytes, session: bytes, start: int, chunk: tuple[int, ...] | None, wants: bool,
             opened: tuple[int, int, int] | None) -> None:  # fmt: skip
        """STEP came, or (no chunk) SEQ_CLOSE."""
        engine = self.engines.get(pipeline)
        if engine is None or engine.state != "ready":
            return
        if chunk is None:
            engine.sequences.pop(session, None)
            self._hand_on(engine, session, 0, None, False, None)
        else:
            self._compute(engine, session, start, chunk, wants, opened)

    def _compute(self, engine: Engine, session: bytes, start: int, chunk: tuple[int, ...], wants: bool,
                 opened: tuple[int, int, int] | None) -> None:  # fmt: skip
        now = self._fabric.world.now
        begin = max(now, self._busy_until.get(engine.serial, 0.0))
        done = begin + STEP_S * self._rng.uniform(0.5, 1.5) * (1 + len(chunk) / CHUNK)
        self._busy_until[engine.serial] = done

        def computed(engine: Engine) -> None:
            if engine.hung:
                self._later(0.05, engine, computed)
                return
            if opened is not None:
                engine.sequences[session] = Kept(*opened, said_at=self._fabric.world.now)
            kept = engine.sequences.get(session)
            if kept is None or engine.state != "ready":
                return
            engine.last_step_at = self._fabric.world.now
            if start > len(kept.tokens):
                words = f"step at {start}, {len(kept.tokens)} are kept"
                self._to_entry(kept.entry, session, "error", "out_of_order", words, engine.index)
                return
            del kept.tokens[start:]
            kept.tokens += chunk
            if not engine.is_last:
                self._hand_on(engine, session, start, chunk, wants, opened)
                self._maybe_blame(engine, kept, session)
            elif wants:
                self._sample(engine, kept, session)

        self._later(done - now, engine, computed)

    def _hand_on(self, engine: Engine, session: bytes, start: int, chunk: tuple[int, ...] | None, wants: bool,
                 opened: tuple[int, int, int] | None) -> None:  # fmt: skip
        if not engine.is_last:
            node = engine.pipeline.nodes[engine.index + 1]
            pipeline = engine.pipeline.id
            chunk = self._fabric.misread(self._computer, node, chunk)
            self._member.send(
                node,
                ("steps", pipeline),
                lambda other: other.stages.step(pipeline, session, start, chunk, wants, opened),
            )

    def _sample(self, engine: Engine, kept: Kept, session: bytes) -> None:
        token = next_token(kept.tokens)
        index = len(kept.tokens) - kept.prompt_tokens
        finish = FINISH_EOG if token == END else FINISH_LENGTH if index + 1 >= kept.max_tokens else FINISH_NONE
        tokens = () if token == END else (token,)
        kept.said_at = self._fabric.world.now
        kept.done = finish != FINISH_NONE
        if session[:8] != PROBE[:8]:
            self._say(kept, session, index, tokens, finish)
        pipeline = engine.pipeline.id
        first = engine.pipeline.nodes[0]
        self._member.send(
            first, ("tokens", pipeline), lambda other: other.stages.tokens(pipeline, session, token, finish)
        )

    def _say(self, kept: Kept, session: bytes, index: int, tokens: tuple[int, ...], finish: int) -> None:
        """PIECES, as they are or, on a liar's computer, as they are not."""
        pieces = tuple(b"t%d" % token for token in tokens)
        if self._computer.index in self._fabric.liars and self._rng.random() < 0.2:
            self._fabric.lies += 1
            match self._rng.randrange(9):
                case 0 if not finish:
                    kept.left_out = True
                    return  # and the next ones leave a gap
                case 1 if index and not kept.left_out:
                    index, tokens, pieces = index - 1, (0, *tokens), (b"", *pieces)
                case 2:
                    tokens = tuple(token + VOCABULARY for token in tokens)
                case 3:
                    pieces = (*pieces, b"more")
                case 4:
                    pieces = tuple(b"x" * 5000 for _ in tokens)
                case 5:
                    finish = FINISH_LENGTH
                case 6:
                    tokens, pieces = tokens * 300, pieces * 300
                case 7:
                    finish = 9
                case _:
                    self._to_entry(
                        kept.entry, session, "pieces", index, tokens, pieces, FINISH_EOG if not tokens else finish
                    )
                    if finish:
                        index, tokens, pieces = index + 1, (1,), (b"?",)
                    else:
                        session = session[:14] + b"\xff\xff"  # a try that never was
        self._to_entry(kept.entry, session, "pieces", index, tokens, pieces, finish)

    def _maybe_blame(self, engine: Engine, kept: Kept, session: bytes) -> None:
        """A liar's other trick: to say that what its neighbour sent is not finite."""
        if self._computer.index in self._fabric.liars and engine.index and self._rng.random() < 0.02:
            self._fabric.lies += 1
            self._to_entry(kept.entry, session, "error", "not_finite", "row 0 is not finite", engine.index - 1)

    def _live(self, engine: Engine) -> None:
        """Signs of life, and what the agent sees of its own engine."""
        now = self._fabric.world.now
        if engine.state == "stopping":
            return
        if not engine.hung and engine.state == "ready":
            for session, kept in engine.sequences.items() if engine.is_last else ():
                if not kept.done and now - kept.said_at >= 0.9 and session[:8] != PROBE[:8]:
                    kept.said_at = now
                    index = max(0, len(kept.tokens) - kept.prompt_tokens)
                    self._to_entry(kept.entry, session, "pieces", index, (), (), FINISH_NONE, True)
            for running in engine.sessions.values():
                if not running.begun:
                    self._to_entry(running.entry, running.session, "accepted", 0)
        self._later(LIFE_S, engine, self._live)

    # ---- ways out ----------------------------------------------------------------------------------------------------

    def _drop_sessions(self, engine: Engine, words: str, blamed: int | None = None) -> None:
        for running in engine.sessions.values():
            if running.session[:8] != PROBE[:8]:
                self._to_entry(running.entry, running.session, "error", "internal", words, blamed)
        engine.sessions.clear()
        engine.sequences.clear()

    def _to_entry(self, entry: int, session: bytes, kind: str, *what: object) -> None:
        computer = self._fabric.world.computers[entry]
        me = self._computer.node_id
        self._member.send(
            computer.node_id, ("entry", session[:14]), lambda other: other.client_frame(me, session, kind, what)
        )

    def _later(self, delay: float, engine: Engine, call: Callable[[Engine], None]) -> None:
        serial = engine.serial

        def run() -> None:
            current = self.engines.get(engine.pipeline.id)
            if current is engine and current.serial == serial:
                call(engine)

        self._member.later(delay, run)
