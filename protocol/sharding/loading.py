"""Loads, at the coordinator: one at a time for a model, joined by all who want it; what is loaded is watched and let
go.

The coordinator keeps nothing durable. What is loaded where, it learns from the reports of the nodes: a new one first
listens for `gather_s`, adopts what is whole, joins what is being loaded, and lets go of what belongs to nothing. A
pipeline is ready only after a token went through all its stages. Planning is the planner's (it takes a while, so it is
an effect here); engines are the nodes' (hosting.py), and every command carries the term for their fence.
"""

from typing import Final, assert_never

from protocol.effects import CancelTimer, Rng, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft
from protocol.sharding.held import Ask, Held, Load, LoadingEffect, LoadingParameters, LoadingState, suits
from protocol.sharding.pipelines import (
    LOAD_WORDS_CHARS_MAX,
    AnswerEnsure,
    AskGone,
    CommandFailed,
    EnsureAsked,
    Loading,
    MembersUp,
    Planned,
    Ready,
    Refused,
    Reported,
    UnloadStage,
    UnloadWanted,
)
from protocol.sharding.tending import Tending

SWEEP_TIMER: Final = ("loading", "sweep")

LoadingInput = (
    EnsureAsked
    | AskGone
    | Planned
    | Reported
    | MembersUp
    | CommandFailed
    | UnloadWanted
    | CoordinatorChanged
    | PeerDown
    | PeerLeft
    | TimerFired
)


class LoadingMachine:
    """See the module. Timers: ("loading", "sweep"). Never raises on what a peer sent."""

    def __init__(self, *, me: NodeId, rng: Rng, params: LoadingParameters | None = None) -> None:
        self._me = me
        self._s = LoadingState(rng, params or LoadingParameters())
        self._tending = Tending(self._s)
        self._swept_until = 0.0

    # ---- reading -----------------------------------------------------------------------------------------------------

    @property
    def is_coordinator(self) -> bool:
        """Whether this node loads for its side of the mesh."""
        return self._s.term is not None

    @property
    def pipelines(self) -> tuple[Held, ...]:
        """What this coordinator answers for."""
        return tuple(self._s.held.values())

    @property
    def loads(self) -> tuple[Load, ...]:
        """Loads under way, at most one a model."""
        return tuple(self._s.loads.values())

    @property
    def pinned(self) -> frozenset[str]:
        """Models that somebody wants kept, by digest."""
        return frozenset(self._s.pinned)

    @property
    def waiting(self) -> int:
        """Asks without an answer."""
        return len(self._s.asks)

    # ---- events ------------------------------------------------------------------------------------------------------

    def handle(self, event: LoadingInput, now: float) -> list[LoadingEffect]:
        """One event at monotonic time `now`."""
        match event:
            case CoordinatorChanged(term, leader, _):
                self._coordinate(term if leader == self._me else None, now)
            case EnsureAsked():
                self._asked(event, now)
            case AskGone(ask):
                self._s.asks.pop(ask, None)
            case _ if self._s.term is None:
                pass
            case Planned():
                self._tending.planned(event, now)
            case MembersUp(nodes):
                self._s.unheard = set(nodes)
            case Reported(node):
                self._tending.reported(event, now)
                self._gathered(node, now)
            case CommandFailed(node, pipeline, words):
                self._tending.command_failed(node, pipeline, words, now)
            case UnloadWanted(model):
                for held in [held for held in self._s.held.values() if held.pipeline.model == model]:
                    self._tending.lose(held, "unloaded by a user", now)
            case PeerDown(peer) | PeerLeft(peer):
                self._tending.lost(peer, now)
                self._gathered(peer, now)
            case TimerFired():
                self._sweep(now)
            case _:
                assert_never(event)
        return self._settled(now)

    def _settled(self, now: float) -> list[LoadingEffect]:
        """Answer what can be answered, and keep looking as long as there is something to look after."""
        if self._s.term is not None:
            for model in dict.fromkeys(ask.request.model for ask in self._s.asks.values()):
                self._serve(model, now)
            busy = self._s.held or self._s.loads or self._s.asks or self._s.strays or self._s.pinned
            if busy and self._swept_until <= now:
                self._swept_until = now + self._s.params.sweep_s
                self._s.out.append(SetTimer(SWEEP_TIMER, self._swept_until))
        out, self._s.out = self._s.out, []
        return out

    def _gathered(self, node: NodeId, now: float) -> None:
        """Reports are whole: one from everybody who is up is all there is to learn."""
        if node in self._s.unheard:
            self._s.unheard.discard(node)
            if not self._s.unheard:
                self._s.gathering_until = min(self._s.gathering_until, now)

    def _coordinate(self, term: int | None, now: float) -> None:
        if self._s.term is not None and term is not None:
            self._s.term = term  # of a new term, but what it knows holds
            return
        if term == self._s.term:
            return
        self._s.held.clear()
        self._s.loads.clear()
        self._s.strays.clear()
        self._s.pressed.clear()
        self._s.silent.clear()
        self._s.unheard.clear()
        self._s.pinned.clear()
        self._s.term = term
        self._s.gathering_until = now + self._s.params.gather_s
        self._swept_until = 0.0
        if term is None:
            for ask in list(self._s.asks):
                self._s.answer(ask, Refused("no_coordinator", "The coordinator changed; ask the new one.", True))
            self._s.out.append(CancelTimer(SWEEP_TIMER))

    # ---- asks --------------------------------------------------------------------------------------------------------

    def _asked(self, event: EnsureAsked, now: float) -> None:
        if self._s.term is None:
            refused = Refused("no_coordinator", "This node does not coordinate; ask the one that does.", True)
            self._s.out.append(AnswerEnsure(event.ask, refused))
        elif len(self._s.asks) >= self._s.params.asks_max:
            refused = Refused("overloaded", f"{self._s.params.asks_max} requests wait for models already.", True)
            self._s.out.append(AnswerEnsure(event.ask, refused))
        else:
            if event.request.pinned:
                self._s.pinned[event.request.model] = now + self._s.params.pin_s
            self._s.asks[event.ask] = Ask(event.peer, event.request, now + self._s.params.answer_s)
            failed = event.request.failed
            if failed is not None and failed in self._s.held:
                self._tending.complained(self._s.held[failed], event.request.failure, now)

    def _serve(self, model: str, now: float) -> None:
        """Give asks of this model what there is; begin a load where there is nothing that will come by itself."""
        coming = model in self._s.loads or now < self._s.gathering_until
        first: Ask | None = None
        for ask, asked in [(ask, asked) for ask, asked in self._s.asks.items() if asked.request.model == model]:
            fitting = [held for held in self._s.held.values() if suits(held, asked.request)]
            ready = [held for held in fitting if held.state == "ready"]
            if ready:
                best = min(ready, key=lambda held: (held.active / held.pipeline.slots, held.since, held.pipeline.id))
                best.used_at = now
                self._s.answer(ask, Ready(best.pipeline))
            elif not any(held.state in ("loading", "probing") for held in fitting):
                first = first or asked
        if first is not None and not coming:
            self._tending.begin(first.request, now)

    # ---- time --------------------------------------------------------------------------------------------------------

    def _sweep(self, now: float) -> None:
        self._swept_until = 0.0
        for model in [model for model, until in self._s.pinned.items() if until <= now]:
            del self._s.pinned[model]
        for ask, asked in list(self._s.asks.items()):
            if asked.due <= now:
                self._s.answer(ask, self._progress(asked.request.model, now))
        for held in list(self._s.held.values()):
            self._tending.look_after(held, now)
        for load in list(self._s.loads.values()):
            self._tending.look_after_load(load, now)
        for name, stray in list(self._s.strays.items()):
            if now >= self._s.gathering_until and now - stray.since > self._s.params.orphan_s:
                del self._s.strays[name]
                for node in stray.nodes:
                    self._s.command(node, UnloadStage(name))
        self._relieve(now)

    def _relieve(self, now: float) -> None:
        """Where memory runs short, the pipeline that was idle for longest goes, one at a time."""
        if not self._s.pressed or any(held.state == "unloading" for held in self._s.held.values()):
            return
        idle = [
            held
            for held in self._s.held.values()
            if self._tending.may_evict(held) and self._s.pressed.intersection(held.pipeline.nodes)
        ]
        if idle:
            oldest = min(idle, key=lambda held: (held.used_at, held.pipeline.id))
            self._tending.lose(oldest, "memory runs short on a node that holds a stage of it", now)

    def _progress(self, model: str, now: float) -> Loading:
        load = self._s.loads.get(model)
        if now < self._s.gathering_until:
            return Loading("a new coordinator is learning what is loaded")
        if load is None:
            return Loading("checking whether it still answers")
        held = self._s.held.get(load.pipeline) if load.pipeline is not None else None
        if held is None:
            return Loading(load.words)
        layers = sum(span.end - span.first for span in held.pipeline.stages)
        done = sum(
            (span.end - span.first) * held.reports[NodeId(span.node)].share
            for span in held.pipeline.stages
            if span.node in held.reports
        )
        words = "waiting for the first token" if held.state == "probing" else f"loading: {load.words}"
        return Loading(words[:LOAD_WORDS_CHARS_MAX], min(1.0, done / layers))
