"""Bugs in the shared records and in resource heartbeats."""

from protocol.heartbeats.machine import Heartbeats
from protocol.records.judge import Judge
from protocol.records.machine import Records
from simulations.bugs.bug import Bug, Patches


def _last_arrival_wins(patches: Patches) -> None:
    patches.set(Judge, "_wins", lambda self, record, row, collection: True)


def _no_repair(patches: Patches) -> None:
    patches.set(Records, "_begin_repair", lambda self, now, wall, out: None)


def _budget_ignored(patches: Patches) -> None:
    patches.set(Heartbeats, "period_s", lambda self: 2.0)


def records_bugs() -> tuple[Bug, ...]:
    """All bugs of this file."""
    return (
        Bug(
            "last-arrival-wins",
            "of two versions the one that arrives last counts, not the later one",
            _last_arrival_wins,
            "records",
        ),
        Bug("no-repair", "differences that a push did not reach are never repaired", _no_repair, "records"),
        Bug(
            "budget-ignored",
            "resource heartbeats come as often in a large mesh as in a small one",
            _budget_ignored,
            "resources",
            20,
        ),
    )
