"""Bugs in the shared records and in resource heartbeats."""

from typing import Any

from protocol.heartbeats.machine import Heartbeats
from protocol.records.judge import Judge
from protocol.records.machine import Records
from simulations.bugs.bug import Bug, Patches


def _own_record_wins(patches: Patches) -> None:
    def wins(self: Any, record: Any, row: Any, collection: Any) -> bool:
        current = self._ledger.record(row)
        if current is not None and current.author == self._me != record.author:
            return False
        return bool(original(self, record, row, collection))

    original = patches.set(Judge, "_wins", wins)


def _no_repair(patches: Patches) -> None:
    patches.set(Records, "_begin_repair", lambda self, now, wall, out: None)


def _budget_ignored(patches: Patches) -> None:
    patches.set(Heartbeats, "period_s", lambda self: 2.0)


def records_bugs() -> tuple[Bug, ...]:
    """All bugs of this file."""
    return (
        Bug("own-record-wins", "a node keeps what it wrote itself, whoever wrote later", _own_record_wins, "records"),
        Bug("no-repair", "differences that a push did not reach are never repaired", _no_repair, "records"),
        Bug(
            "budget-ignored",
            "resource heartbeats come as often in a large mesh as in a small one",
            _budget_ignored,
            "resources",
            20,
        ),
    )
