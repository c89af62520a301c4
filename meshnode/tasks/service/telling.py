"""Tells observers of the bus what becomes of tasks: once for each change that a person would see."""

from collections.abc import Callable

from meshnode.tasks.model import TaskSubmitted, TaskUpdated
from meshnode.tasks.service.desk import Desk
from meshnode.tasks.service.records import TaskKey, TaskRecords
from protocol.placement.scheduling_events import Known

Seen = tuple[str, int, bool, str]


class Telling:
    """It must be told of changed tasks. What was there before the start is no news."""

    def __init__(self, *, records: TaskRecords, desk: Desk, publish: Callable[[object], object]) -> None:
        self._records = records
        self._desk = desk
        self._publish = publish
        self._seen: dict[TaskKey, Seen] = {}

    def start(self) -> None:
        """The index is built: whatever changes from now on is news."""
        for key, entry in self._records.entries.items():
            self._seen[key] = self._sight(entry.known())

    def changed(self, key: TaskKey) -> None:
        """Records of this task changed."""
        if not self._records.loaded.is_set():
            return
        entry = self._records.entries.get(key)
        if entry is None:
            self._seen.pop(key, None)
            return
        before, now = self._seen.get(key), self._sight(entry.known())
        if before == now:
            return
        self._seen[key] = now
        known = self._records.known(key)
        if known is not None:
            task = self._desk.shown(known, whole=False)
            self._publish(TaskSubmitted(task) if before is None else TaskUpdated(task))

    def _sight(self, known: Known) -> Seen:
        where = self._desk.stands(known)
        attempt = where.counts[1].attempt if where.counts else ""
        return where.state, known.wish.generation, known.wish.cancelled, attempt
