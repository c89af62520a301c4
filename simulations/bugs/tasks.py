"""Bugs of tasks: what starts too early, twice or too much; what is forgotten, and what starves."""

from typing import Any

from protocol.election.fence import Fence
from protocol.membership.events import RosterShrank
from protocol.placement import queueing
from protocol.placement.executing import Executing
from protocol.placement.executing_events import AttemptWritten, Recovered
from protocol.placement.noting import Noting
from protocol.placement.scheduling import Scheduling
from protocol.placement.scheduling_events import ReadTasks
from simulations.bugs.bug import Bug, Patches

_HARD = "split,pause"  # coordinators that are alone for a while


def _begun_before_written(patches: Patches) -> None:
    def write(self: Any, held: Any) -> None:
        original(self, held)
        if held.phase == "writing":
            written = AttemptWritten(held.record.attempt, True, held.record.started_ms)
            self._out += self.handle(written, 0.0) if not held.stop else ()

    original = patches.set(Executing, "_write", write)


def _fence_open(patches: Patches) -> None:
    def admit(self: Any, term: Any, leader: Any) -> Any:
        _, effects = original(self, term, leader)
        return True, effects

    original = patches.set(Fence, "admit", admit)


def _notes_ignored(patches: Patches) -> None:
    patches.set(Noting, "of", lambda self, key: ())


def _one_holder_is_enough(patches: Patches) -> None:
    def held(self: Any, node: Any, attempt: Any) -> int:
        original(self, node, attempt)
        return int(self._need)

    original = patches.set(Noting, "_held", held)
    patches.set(Noting, "is_held", lambda self, attempt: bool(self._holders.get(attempt)))


def _notes_not_collected(patches: Patches) -> None:
    patches.set(Noting, "_has_collected", property(lambda self: True))


def _notes_go_with_the_end(patches: Patches) -> None:
    patches.set(Noting, "over", Noting.forget)


def _queue_not_read(patches: Patches) -> None:
    def coordinate(self: Any, term: int, quorate: bool, now: float) -> None:
        original(self, term, quorate, now)
        self._s.out[:] = [effect for effect in self._s.out if not isinstance(effect, ReadTasks)]
        self._s.is_reading = False

    original = patches.set(Scheduling, "_coordinate", coordinate)


def _urgent_always_first(patches: Patches) -> None:
    patches.set(queueing, "SHARE_FACTOR", 1e6)
    patches.set(queueing, "AGEING_S", 1e9)
    patches.set(queueing, "LAG_MAX", 1e12)


def _evicted_goes_on(patches: Patches) -> None:
    def handle(self: Any, event: Any, now: float) -> Any:
        return [] if isinstance(event, RosterShrank) else original(self, event, now)

    original = patches.set(Executing, "handle", handle)


def _past_forgotten(patches: Patches) -> None:
    def handle(self: Any, event: Any, now: float) -> Any:
        if isinstance(event, Recovered):
            event = type(event)(tuple(one for one in event.found if one.state == "running"), event.at_ms)
        return original(self, event, now)

    original = patches.set(Executing, "handle", handle)


def task_bugs() -> tuple[Bug, ...]:
    """All bugs of this file."""
    return (
        Bug("begun-before-written", "an attempt is started before it is written down", _begun_before_written, "tasks"),
        Bug("old-terms-obeyed", "an executor starts what a former coordinator commands", _fence_open, "tasks"),
        Bug("notes-ignored", "a coordinator does not care what notes say", _notes_ignored, "tasks"),
        Bug(
            "one-holder-is-enough",
            "an at_most_once task starts before a majority knows",
            _one_holder_is_enough,
            "tasks",
            pattern=_HARD,
        ),
        Bug(
            "notes-not-collected",
            "a new coordinator does not wait for the notes of a majority",
            _notes_not_collected,
            "tasks",
            pattern=_HARD,
        ),
        Bug("notes-end-with-the-task", "notes go when their task ends", _notes_go_with_the_end, "tasks"),
        Bug("queue-not-read", "a new coordinator does not read what waits", _queue_not_read, "tasks"),
        Bug("urgent-always-first", "urgent tasks always come first", _urgent_always_first, "tasks", pattern="busy"),
        Bug("evicted-goes-on", "tasks of evicted submitters go on", _evicted_goes_on, "tasks"),
        Bug("past-forgotten", "a restarted agent forgets what ran on without it", _past_forgotten, "tasks"),
    )
