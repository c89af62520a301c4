"""A session at its entry, driven by hand: the effects of its last step, and a clock that its timers move."""

from random import Random

from protocol.effects import SetTimer, TimerFired
from protocol.sharding.events import (
    Accuse,
    CancelSession,
    Emit,
    Ensure,
    EnsureAnswered,
    Fail,
    Finish,
    OpenSession,
    PiecesReceived,
    SessionAccepted,
)
from protocol.sharding.patience import SessionParameters
from protocol.sharding.pipelines import Pipeline, Ready, Span
from protocol.sharding.session import Session

PROMPT = (5, 6, 7)


def pipeline(*nodes: str, name: bytes = b"pipeline", context: int = 100) -> Pipeline:
    spans = tuple(Span(node, index, index + 1) for index, node in enumerate(nodes))
    return Pipeline(name, "model", context, 4, spans, 1000)


class Entry:
    """One session, the effects of its last step, and a clock that its timers move."""

    def __init__(
        self, max_tokens: int = 20, stages_min: int = 1, engine: str = "", named: Pipeline | None = None, **changes
    ) -> None:
        self.session = Session(
            stem=b"s" * 14, model="model", prompt=PROMPT, max_tokens=max_tokens, context=100, rng=Random(1),
            stages_min=stages_min, engine=engine, params=SessionParameters(**changes),
        )  # fmt: skip
        self.now = 1000.0
        self.timers: dict = {}
        self.all: list = []
        self.out = self._note(self.session.start(self.now, named))

    def _note(self, effects: list) -> list:
        for effect in effects:
            if isinstance(effect, SetTimer):
                self.timers[effect.key] = effect.at
            elif hasattr(effect, "key"):
                self.timers.pop(effect.key, None)
        self.all += effects
        return effects

    def tell(self, event) -> list:
        self.out = self._note(self.session.handle(event, self.now))
        return self.out

    def wait(self, seconds: float) -> list:
        """Let time pass; what the timers brought about."""
        until, seen = self.now + seconds, []
        while self.timers and min(self.timers.values()) <= until:
            key = min(self.timers, key=lambda key: self.timers[key])
            self.now = max(self.now, self.timers.pop(key))
            seen += self.tell(TimerFired(key))
        self.now = until
        return seen

    def last(self, kind: type):
        return next((effect for effect in reversed(self.all) if isinstance(effect, kind)), None)

    def ready(self, *nodes: str, **changes) -> list:
        return self.tell(EnsureAnswered(self.last(Ensure).ask, Ready(pipeline(*nodes, **changes))))

    def pieces(self, index: int, *tokens: int, peer: str = "c", finish: int = 0, session: bytes | None = None) -> list:
        texts = tuple(b"%d" % token for token in tokens)
        return self.tell(PiecesReceived(peer, session or self.session.id, index, tokens, texts, finish))

    @property
    def emitted(self) -> list[int]:
        tokens: list[int] = []
        for effect in self.all:
            if isinstance(effect, Emit):
                assert effect.index == len(tokens)
                tokens += effect.tokens
        return tokens


def streaming(**changes) -> Entry:
    """A session that has its first three tokens from a, b, c."""
    entry = Entry(**changes)
    entry.ready("a", "b", "c")
    entry.tell(SessionAccepted("a", entry.session.id, 2))
    entry.pieces(0, 10, 11, 12)
    return entry


def kinds(effects: list) -> list[type]:
    return [
        type(effect)
        for effect in effects
        if type(effect) in (Ensure, OpenSession, CancelSession, Emit, Accuse, Finish, Fail)
    ]
