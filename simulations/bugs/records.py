"""Bugs in the shared records and in resource heartbeats."""

from typing import Any

from protocol.heartbeats.machine import Heartbeats
from protocol.records.clock import HybridClock
from protocol.records.judge import Judge
from protocol.records.machine import Records
from protocol.records.tree import Shelf
from simulations.bugs.bug import Bug, Patches


def _last_arrival_wins(patches: Patches) -> None:
    patches.set(Judge, "_wins", lambda self, record, row, collection: True)


def _no_repair(patches: Patches) -> None:
    patches.set(Records, "_begin_repair", lambda self, now, wall, out: None)


def _any_future_counts(patches: Patches) -> None:
    patches.set(HybridClock, "limit", lambda self, wall: 2**63)
    patches.set(Shelf, "is_ahead", lambda self, key_hash: False)


def _budget_ignored(patches: Patches) -> None:
    patches.set(Heartbeats, "period_s", lambda self: 2.0)


def records_bugs() -> tuple[Bug, ...]:
    """All bugs of this file."""
    return (
        Bug("last-arrival-wins", "of two versions the one that arrives last counts, not the later one", _last_arrival_wins, "records"),
        Bug("no-repair", "differences that a push did not reach are never repaired", _no_repair, "records"),
        Bug("any-future-counts", "a record from the year 2040 is taken like any other", _any_future_counts, "records"),
        Bug("budget-ignored", "resource heartbeats come as often in a large mesh as in a small one", _budget_ignored, "resources"),
    )
