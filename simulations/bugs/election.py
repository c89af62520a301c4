"""Bugs in who coordinates: promises broken or forgotten, majorities that are none, fences with holes."""

from typing import Any

from protocol.effects import Persist
from protocol.election.electorate import Electorate
from protocol.election.fence import Fence
from protocol.election.ledger import Ledger
from protocol.election.tally import Tally
from simulations.bugs.bug import Bug, Patches


def _lease_counted_too_long(patches: Patches) -> None:
    def make(self: Any, drift_max: float) -> None:
        original(self, drift_max)
        self._counted = 1.6

    original = patches.set(Tally, "__init__", make)


def _promise_not_kept(patches: Patches) -> None:
    patches.set(Ledger, "free", lambda self, now: True)


def _promise_forgotten(patches: Patches) -> None:
    def start(self: Any, now: float) -> Any:
        effects = original(self, now)
        self.promised_until = 0.0
        return effects

    original = patches.set(Ledger, "start", start)


def _ballot_not_durable(patches: Patches) -> None:
    def follow(self: Any, ballot: Any) -> Any:
        original(self, ballot)
        return []

    original = patches.set(Ledger, "follow", follow)


def _half_is_enough(patches: Patches) -> None:
    patches.set(Electorate, "need", property(lambda self: max(1, len(self.voters) // 2)))


def _fence_open(patches: Patches) -> None:
    patches.set(Fence, "admit", lambda self, term, leader: (True, []))


def _fence_forgets(patches: Patches) -> None:
    def admit(self: Any, term: int, leader: Any) -> Any:
        obeys, effects = original(self, term, leader)
        return obeys, [effect for effect in effects if not isinstance(effect, Persist)]

    original = patches.set(Fence, "admit", admit)


def election_bugs() -> tuple[Bug, ...]:
    """All bugs of this file."""
    return (
        Bug(
            "lease-counted-too-long",
            "a coordinator counts a lease for longer than it was promised",
            _lease_counted_too_long,
        ),
        Bug(
            "promise-not-kept", "a node that promised a lease promises another one before it is over", _promise_not_kept
        ),
        Bug(
            "promise-forgotten",
            "a restarted node does not wait for the lease that it promised",
            _promise_forgotten,
            nodes=3,
            pattern="crash,split",
        ),
        Bug(
            "ballot-not-durable",
            "whom a node follows is not on disk, so that terms fall after a crash",
            _ballot_not_durable,
        ),
        Bug("half-is-enough", "half of the electorate counts as a majority", _half_is_enough),
        Bug("fence-open", "executors obey commands of any term", _fence_open),
        Bug("fence-forgets", "what an executor obeyed is not on disk", _fence_forgets),
    )
