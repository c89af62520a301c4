"""A coordinator's count of the promises made to it: who stated which electorate, and until when each lease counts.

Nothing here is durable: a coordinator that restarts has no leases and claims a new term. Times are those of LeaseClock.
"""

from dataclasses import dataclass
from math import inf
from typing import Final

from protocol.election.electorate import NO_ELECTORATE, Electorate
from protocol.election.messages import LEASE_MS_MAX, Version
from protocol.ids import NodeId

SET_BACK_S: Final = 0.1
"""A wall clock that fell behind the monotonic one by more than this was set, not slewed."""


class LeaseClock:
    """A clock that runs at least as fast as real time, also while the machine sleeps.

    The monotonic clock of some systems stands still in suspend, and a lease counted on it would outlive the promise. So
    each step takes the larger of what the monotonic and the wall clock say has passed. A wall clock that was set
    forward ends leases early, and so does one that was set back: it might hide a sleep. Either costs one beat. What
    stays hidden is a wall clock that is set back by less than the machine then sleeps, between the last look before the
    sleep and the first one after it; where `now` counts sleep (CLOCK_BOOTTIME), not even that.
    """

    def __init__(self, now: float, wall: float) -> None:
        self._now = now
        self._wall = wall
        self._time = 0.0

    def peek(self, now: float, wall: float) -> float:
        """Lease time at this instant, in seconds; changes nothing."""
        passed, passed_wall = now - self._now, wall - self._wall
        if passed_wall < passed - SET_BACK_S:
            passed += LEASE_MS_MAX / 1000
        return self._time + max(passed, passed_wall, 0.0)

    def advance(self, now: float, wall: float) -> float:
        """The same, and remembers it."""
        self._time = self.peek(now, wall)
        self._now, self._wall = now, wall
        return self._time


@dataclass(slots=True)
class Voice:
    """What one follower of this coordinator said last."""

    node: NodeId
    stated: Version  # the highest electorate version that it stated while following this ballot
    until: float = -inf  # its promise counts until then, in lease time


class Tally:
    """Voices by short id, and the question whether a majority of an electorate stands behind this coordinator."""

    def __init__(self, drift_max: float) -> None:
        self._counted = 1.0 - drift_max
        self._beats: dict[int, tuple[float, float]] = {}  # beat -> (sent at, counted until), oldest first
        self._known = NO_ELECTORATE  # the electorate that `holds` was asked about last ...
        self._until = -inf  # ... and up to when it held then; since then it can only hold longer
        self.voices: dict[bytes, Voice] = {}

    def sent(self, beat: int, lease_s: float, time: float) -> None:
        """Beat number `beat` goes out now with this lease."""
        while self._beats:
            oldest = next(iter(self._beats))
            if self._beats[oldest][1] > time:
                break
            del self._beats[oldest]
        self._beats[beat] = (time, time + lease_s * self._counted)

    def heard(self, node: NodeId, short: bytes, stated: Version, promised_beat: int | None) -> None:
        """A follower answered. Its promise is counted from the moment at which this node *sent* the beat.

        The follower counts from the later moment at which it received it, so this node always stops first.
        """
        voice = self.voices.get(short)
        if voice is None:
            voice = self.voices[short] = Voice(node, stated)
        # A statement that was overtaken on the way takes nothing back: what a follower holds only rises.
        voice.stated = max(voice.stated, stated)
        if promised_beat is not None and promised_beat in self._beats:
            voice.until = max(voice.until, self._beats[promised_beat][1])

    def holds(self, electorate: Electorate, time: float) -> bool:
        """Whether more than half of these voters, each stating this or a later version, hold to this node now.

        Asked after every event, so it counts only when the last answer does not settle it.
        """
        if self._known is not electorate or self._until <= time:
            self._known, self._until = electorate, self.until(electorate)
        return self._until > time

    def until(self, electorate: Electorate) -> float:
        """Up to when they do, with the promises heard so far; the past, if they do not."""
        ends = sorted(self._ends(electorate), reverse=True)
        return ends[electorate.need - 1] if len(ends) >= electorate.need else -inf

    def have(self, electorate: Electorate, time: float) -> int:
        """How many of these voters state this version and hold to this node now."""
        return sum(end > time for end in self._ends(electorate))

    def following(self, electorate: Electorate) -> int:
        """How many of these voters follow this ballot, whatever they promised."""
        return len(electorate.voters & self.voices.keys())

    def _ends(self, electorate: Electorate) -> list[float]:
        voices, version = self.voices, electorate.version
        found = (voices.get(voter) for voter in electorate.voters)
        return [voice.until for voice in found if voice is not None and voice.stated >= version]
