"""A circuit breaker for each node: closed, open with a growing pause, half-open with a few probes.

Only what is the node's own fault counts (standing.blames_node, calls that nobody answered): a task that fails says
nothing of the machine that it failed on.
"""

from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class BreakerParameters:
    """Times in seconds."""

    failures_max: int = 3  # in a row; with the last of them it opens
    pause_s: float = 30.0
    pause_s_max: float = 600.0
    probes_max: int = 2  # attempts under way while it is half open
    successes_min: int = 2  # in a row; with the last of them it closes


class Breaker:
    """One node's. Monotonic seconds come in as `now`."""

    def __init__(self, params: BreakerParameters) -> None:
        self._params = params
        self._is_open = False
        self._until = 0.0
        self._pause_s = params.pause_s
        self._failures = 0
        self._successes = 0
        self._probes: set[str] = set()
        self.words = ""  # of the last failure

    @property
    def failures(self) -> int:
        """In a row."""
        return self._failures

    def state(self, now: float) -> State:
        """Open until its pause is over, half open until the probes have shown something."""
        if not self._is_open:
            return "closed"
        return "open" if now < self._until else "half_open"

    def left_s(self, now: float) -> float:
        """How long it stays open."""
        return max(0.0, self._until - now) if self._is_open else 0.0

    def shut_words(self, now: float) -> str:
        """Why nothing may be placed there now; empty: it may."""
        if self.admits(now):
            return ""
        often = f"it failed {self._failures} times in a row"
        soon = f"is tried again in {self.left_s(now):.0f} s" if now < self._until else "is being tried again"
        return f"{often}, and {soon}; the last failure: {self.words}"

    def admits(self, now: float) -> bool:
        """Whether an attempt may be placed there now."""
        if not self._is_open:
            return True
        return now >= self._until and len(self._probes) < self._params.probes_max

    def placed(self, attempt: str) -> None:
        """An attempt goes there; it is a probe if the breaker is half open."""
        if self._is_open:
            self._probes.add(attempt)

    def over(self, attempt: str) -> None:
        """That attempt ended, or came to nothing, and says neither good nor bad."""
        self._probes.discard(attempt)

    def succeeded(self, attempt: str) -> bool:
        """It went well as far as the node goes. Whether this closed the breaker."""
        self._failures = 0
        if not self._is_open:
            return False
        if attempt not in self._probes:
            return False  # of before it opened: it proves nothing
        self._probes.discard(attempt)
        self._successes += 1
        if self._successes < self._params.successes_min:
            return False
        self._is_open, self._successes, self._pause_s, self.words = False, 0, self._params.pause_s, ""
        self._probes.clear()
        return True

    def failed(self, attempt: str, words: str, now: float) -> float:
        """The node is at fault. How long it is shunned if this opened the breaker, else 0."""
        self.words = words
        self._failures += 1
        was_probe = attempt in self._probes
        self._probes.discard(attempt)
        if self._is_open:
            if not was_probe or now < self._until:
                return 0.0
            self._pause_s = min(self._params.pause_s_max, 2.0 * self._pause_s)
        elif self._failures < self._params.failures_max:
            return 0.0
        self._is_open, self._successes = True, 0
        self._until = now + self._pause_s
        self._probes.clear()
        return self._pause_s
