"""How a task stands: derived from its order, the wish, the attempts and who is a member, alike on every node.

Nothing here looks at a clock or at who is up: two nodes with the same records and roster say the same. Whether an
attempt whose node is not heard is given up is the coordinator's to decide (scheduling.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from protocol.ids import NodeId
from protocol.placement.tasks import Attempt, Mode, Wish

State = Literal["pending", "placed", "running", "completed", "failed", "cancelled", "lost"]

ENDED_STATES: Final[frozenset[State]] = frozenset({"completed", "failed", "cancelled", "lost"})
DEAD_LETTER_STATES: Final[frozenset[State]] = frozenset({"failed", "lost"})

RETRY_S: Final = 1.0
RETRY_S_MAX: Final = 300.0
LOSSES_MAX: Final = 5
"""An attempt that is lost with its node does not count as a try, but a task that takes nodes down with it must end."""

ATTEMPTS_PER_GENERATION_MAX: Final = 200
NO_SUCH_COMMAND: Final = 127
NOT_EXECUTABLE: Final = 126


class Terms(Protocol):
    """What of an order matters here."""

    @property
    def submitter(self) -> NodeId: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def retries(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Standing:
    """`counts`: the attempt whose output is the task's, with its executor. `live`: those that have not ended, at
    members. `number`: of the next attempt. `pause_s` after `failed_ms` (the executor's wall clock) it is due again.
    """

    state: State
    words: str
    counts: tuple[NodeId, Attempt] | None = None
    live: tuple[tuple[NodeId, Attempt], ...] = ()
    tries: int = 0
    losses: int = 0
    number: int = 1
    pause_s: float = 0.0
    failed_ms: int = 0

    @property
    def is_ended(self) -> bool:
        """Nothing more happens to it without a new wish."""
        return self.state in ENDED_STATES

    @property
    def is_dead_letter(self) -> bool:
        """It ended badly, and a person may look into it, try it again or delete it."""
        return self.state in DEAD_LETTER_STATES

    @property
    def again_at_ms(self) -> int:
        """When a pending task is due; 0: now."""
        return self.failed_ms + round(self.pause_s * 1000) if self.pause_s else 0

    @property
    def may_follow_lost(self) -> bool:
        """Whether another attempt may follow one whose node is gone."""
        return self.losses + len(self.live) <= LOSSES_MAX


def is_done(attempt: Attempt) -> bool:
    """Whether it did what was asked."""
    return attempt.ending == "exited" and attempt.code == 0


def never_began(attempt: Attempt) -> bool:
    """Whether its executor says that nothing of it ever ran."""
    return attempt.ending in ("refused", "no_input") or (attempt.ending == "cancelled" and not attempt.started_ms)


def blames_node(attempt: Attempt) -> bool:
    """Whether it ended by no fault of the task's."""
    if attempt.ending == "refused":
        return attempt.code not in (NO_SUCH_COMMAND, NOT_EXECUTABLE)
    return attempt.ending == "lost"


def ending_words(attempt: Attempt) -> str:
    """How it ended, for people."""
    words = f": {attempt.words}" if attempt.words else ""
    match attempt.ending:
        case None:
            return "running" if attempt.started_ms else "placed"
        case "exited":
            return f"exit code {attempt.code}{words}"
        case "signalled":
            return f"signal {attempt.code}{words}"
        case "timed_out":
            return f"its time was over{words}"
        case "cancelled":
            return f"stopped{words}"
        case "refused" | "no_input":
            return f"not started{words}"
        case "lost":
            return f"lost{words}"


def standing(
    terms: Terms, wish: Wish, attempts: Sequence[tuple[NodeId, Attempt]], is_member: Callable[[NodeId], bool]
) -> Standing:
    """Where the task stands. Only attempts of the wished generation count."""
    mine = sorted(
        (each for each in attempts if each[1].generation == wish.generation),
        key=lambda each: (each[1].number, each[1].attempt, each[0]),
    )
    number = 1 + max((attempt.number for _, attempt in mine), default=0)
    done = [each for each in mine if is_done(each[1])]
    if done:
        first = min(done, key=lambda each: (each[1].ended_ms, each[1].attempt, each[0]))
        return Standing("completed", "exit code 0", counts=first, number=number)
    live = tuple(each for each in mine if each[1].ending is None and is_member(each[0]))
    failures = [each for each in mine if each[1].ending in ("exited", "signalled", "timed_out", "refused")]
    halted = "" if is_member(terms.submitter) else "its submitter was evicted"
    if wish.cancelled or wish.deleted:
        halted = "cancelled"
    begun = [each for each in mine if not never_began(each[1])]
    lost = [each for each in begun if each not in live and each not in failures]
    facts = _Facts(terms, mine, live, failures, lost, halted, number)
    if live:
        return _live(facts)
    if terms.mode == "at_most_once" and begun:
        return _begun_once(facts, begun)
    return _between(facts)


@dataclass(frozen=True, slots=True)
class _Facts:
    terms: Terms
    mine: list[tuple[NodeId, Attempt]]
    live: tuple[tuple[NodeId, Attempt], ...]
    failures: list[tuple[NodeId, Attempt]]
    lost: list[tuple[NodeId, Attempt]]
    """Begun, and neither alive nor failed: lost, evicted with its node, or stopped by nobody's wish."""
    halted: str
    number: int

    def standing(self, state: State, words: str, counts: tuple[NodeId, Attempt] | None = None) -> Standing:
        last = self.mine[-1] if self.mine else None
        return Standing(
            state,
            words,
            counts=counts or last,
            live=self.live,
            tries=len(self.failures),
            losses=len(self.lost),
            number=self.number,
        )


def _live(facts: _Facts) -> Standing:
    started = [each for each in facts.live if each[1].started_ms]
    words = f"is being stopped: {facts.halted}" if facts.halted else ""
    if len(facts.live) > 1 and not words:
        words = f"{len(facts.live)} attempts run; the first to end counts"
    return facts.standing("running" if started else "placed", words, (started or facts.live)[0])


def _begun_once(facts: _Facts, begun: list[tuple[NodeId, Attempt]]) -> Standing:
    """An at_most_once task of which something may have run, and nothing does now."""
    for executor, attempt in begun:
        if attempt.ending is None:
            words = f"{executor} was evicted while it ran there; it may have done anything from nothing to all"
            return facts.standing("lost", words, (executor, attempt))
        if attempt.ending == "lost":
            return facts.standing("lost", ending_words(attempt), (executor, attempt))
    executor, attempt = begun[-1]
    state: State = "cancelled" if facts.halted and attempt.ending == "cancelled" else "failed"
    return facts.standing(state, ending_words(attempt), (executor, attempt))


def _between(facts: _Facts) -> Standing:
    """Nothing runs, and it could be tried again as far as its mode goes."""
    failures, tries = facts.failures, len(facts.failures)
    last = max(failures, key=lambda each: (each[1].ended_ms, each[1].attempt)) if failures else None
    if last is not None and tries > facts.terms.retries:
        times = f" (tried {tries} times)" if tries > 1 else ""
        return facts.standing("failed", ending_words(last[1]) + times, last)
    if facts.halted:
        return facts.standing("cancelled", facts.halted)
    if len(facts.lost) > LOSSES_MAX:
        words = f"its attempts were lost {len(facts.lost)} times, and it may be the cause; last: "
        return facts.standing("lost", words + ending_words(facts.lost[-1][1]), facts.lost[-1])
    if len(facts.mine) >= ATTEMPTS_PER_GENERATION_MAX:
        return facts.standing("failed", f"{len(facts.mine)} attempts came to nothing")
    unfed = [each for each in facts.mine if each[1].ending == "no_input"]
    if last is None and not unfed:
        return facts.standing("pending", "")
    latest = max((*failures, *unfed), key=lambda each: (each[1].ended_ms, each[1].attempt))
    if latest[1].ending == "no_input":
        words, count = f"it is tried again; the last time {ending_words(latest[1])}", len(unfed)
    else:
        words = f"try {tries + 1} of {facts.terms.retries + 1} follows; the last one: {ending_words(latest[1])}"
        count = tries
    pause_s = min(RETRY_S_MAX, RETRY_S * 2.0 ** min(count - 1, 30))
    made = facts.standing("pending", words)
    return Standing(
        made.state, made.words, made.counts, (), tries, made.losses, made.number, pause_s, latest[1].ended_ms
    )
