"""What this node's records say of tasks: all of one, a light index of all, and writing.

The index has what lists, keys of idempotency and the scheduler's readings need, and leaves long things (long
arguments, environment, input) in the records. It is built from them at the start, and mended whenever one changes.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.records import Begun, RecordWriter
from meshnode.tasks.core.showing import stands
from protocol.ids import NodeId
from protocol.node import Node
from protocol.placement.scheduling_events import Known
from protocol.placement.standing import Standing
from protocol.placement.tasks import (
    ATTEMPTS,
    NO_WISH,
    ORDERS,
    WISHES,
    Attempt,
    AttemptId,
    Order,
    TaskId,
    Wish,
    attempt_key,
    task_key,
)
from protocol.records.events import RecordChanged, RecordWithdrawn
from protocol.records.record import Record, open_record

PAGE: Final = 500
COMMAND_KEPT_CHARS_MAX: Final = 200
"""Longer ones are read from the records when a list shows them."""

UNREADABLE: Final = (msgspec.MsgspecError, RecursionError)
TaskKey = tuple[NodeId, TaskId]
"""Whose task, and which."""

Place = tuple[int, TaskId, NodeId]
"""Where a task stands among all: by the time of its submission (ms)."""

Value = TypeVar("Value", Order, Wish, Attempt)


@dataclass(slots=True)
class Entry:
    """One task in the index. `order` without environment and input, and without long arguments (`is_cut`)."""

    order: Order
    is_cut: bool = False
    wish: Wish = NO_WISH
    attempts: dict[tuple[NodeId, AttemptId], Attempt] = field(default_factory=dict)
    standing: Standing | None = None  # as `TaskRecords.standing` found it last

    def known(self) -> Known:
        """As the rules take it; what they decide needs nothing that is left out."""
        return Known(self.order, self.wish, tuple((node, attempt) for (node, _), attempt in self.attempts.items()))


class TaskRecords:
    """Reads are from this node's own copy; writes are durable here when they return. `changed` is told of a task one of
    whose records changed, and must not block; `own_came` of a record of this node's that somebody else brought.
    """

    def __init__(
        self,
        *,
        hub: Node,
        writer: RecordWriter,
        changed: Callable[[TaskKey], None],
        own_came: Callable[[TaskKey, Attempt], None],
    ) -> None:
        self._hub = hub
        self._writer = writer
        self._changed = changed
        self._own_came = own_came
        self._entries: dict[TaskKey, Entry] = {}
        self._by_task: dict[TaskId, list[NodeId]] = {}
        self._unowned: dict[TaskId, dict[tuple[NodeId, AttemptId], Attempt]] = {}
        self._by_key: dict[tuple[NodeId, str], TaskId] = {}
        self._ordered: list[Place] = []
        self._members = b""  # the digest of the roster for which standings were found
        self.loaded = trio.Event()

    # ---- reading ----------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> dict[TaskKey, Entry]:
        """All that is known, of any member; not to be changed."""
        return self._entries

    def standing(self, entry: Entry) -> Standing:
        """Where a task of the index stands: found once for each change of it, or of who is a member."""
        roster = self._hub.roster
        if roster.digest != self._members:
            self._members = roster.digest
            for each in self._entries.values():
                each.standing = None
        if entry.standing is None:
            entry.standing = stands(entry.known(), lambda node: node in roster)
        return entry.standing

    def newest(self, behind: tuple[int, TaskId] | None = None) -> Iterator[tuple[TaskKey, Entry]]:
        """All tasks, the newest first; only those behind this one. Nothing may change before it is read to its end."""
        index = len(self._ordered) if behind is None else bisect_left(self._ordered, behind)
        while index > 0:
            index -= 1
            _, task, submitter = self._ordered[index]
            yield (submitter, task), self._entries[submitter, task]

    def find(self, task: TaskId) -> TaskKey | None:
        """Whose task this is. Nobody draws an id twice; where one copies another's, the one known first counts."""
        submitters = self._by_task.get(task)
        return (submitters[0], task) if submitters else None

    def of_idempotency(self, submitter: NodeId, key: str) -> Order | None:
        """The whole order that was submitted under this key."""
        task = self._by_key.get((submitter, key))
        return None if task is None else self.order((submitter, task))

    def order(self, key: TaskKey) -> Order | None:
        """The whole order."""
        record = self.order_record(key)
        return None if record is None else _read(record, Order)

    def order_record(self, key: TaskKey) -> Record | None:
        """The order's signed record."""
        return self._hub.records.get(ORDERS, task_key(*key))

    def wish(self, key: TaskKey) -> Wish:
        """What people want of it."""
        record = self._hub.records.get(WISHES, task_key(*key))
        return (record and _read(record, Wish)) or NO_WISH

    def listed(self, key: TaskKey) -> Known | None:
        """All that a list shows: the order without environment and input."""
        entry = self._entries.get(key)
        return self.known(key) if entry is None or entry.is_cut else entry.known()

    def known(self, key: TaskKey) -> Known | None:
        """All that the records say, the order whole."""
        entry, order = self._entries.get(key), self.order(key)
        if entry is None or order is None:
            return None
        return Known(order, entry.wish, tuple((node, attempt) for (node, _), attempt in entry.attempts.items()))

    def own_attempts(self) -> Iterator[tuple[TaskKey, Attempt]]:
        """Those that this node wrote, of tasks whose order is here."""
        me = self._hub.me
        for key, entry in list(self._entries.items()):
            for (executor, _), attempt in list(entry.attempts.items()):
                if executor == me:
                    yield key, attempt

    def orphans(self, task: TaskId | None = None) -> list[tuple[TaskId, Attempt]]:
        """Attempts that this node wrote of tasks whose order was deleted: it had each order before it wrote one."""
        tasks = list(self._unowned) if task is None else [task]
        me = self._hub.me
        return [
            (one, attempt) for one in tasks for (node, _), attempt in self._unowned.get(one, {}).items() if node == me
        ]

    # ---- writing ----------------------------------------------------------------------------------------------------

    def begin_order(self, order: Order) -> Begun:
        """Sign an order and begin to store it. Raises MeshError as RecordWriter, when `durable` is waited for."""
        return self._writer.begin_put(ORDERS, task_key(order.submitter, order.task), msgspec.msgpack.encode(order))

    async def drop_order(self, key: TaskKey) -> None:
        """Delete this node's own order. Raises MeshError."""
        await self._writer.delete(ORDERS, task_key(*key))

    async def put_wish(self, key: TaskKey, wish: Wish) -> None:
        """Raises MeshError FORBIDDEN where this node may not."""
        if key[0] != self._hub.me and self._hub.roster.role(self._hub.me) != "admin":
            raise MeshError(
                ErrorCode.FORBIDDEN, "Another node submitted that task: cancel or repeat it there, or on an admin."
            )
        await self._writer.put(WISHES, task_key(*key), msgspec.msgpack.encode(wish))

    async def put_attempt(self, task: TaskId, attempt: Attempt) -> None:
        """Write this node's record of an attempt. Raises MeshError."""
        key = attempt_key(self._hub.me, task, attempt.attempt)
        await self._writer.put(ATTEMPTS, key, msgspec.msgpack.encode(attempt))

    async def drop_attempt(self, task: TaskId, attempt: AttemptId) -> None:
        """Delete this node's record of an attempt. Raises MeshError."""
        await self._writer.delete(ATTEMPTS, attempt_key(self._hub.me, task, attempt))

    async def take_order(self, peer: NodeId, blob: bytes) -> Order:
        """Take an order's signed record out of a call; durable here when it returns. Raises MeshError."""
        order = order_in(blob)
        if order is None:
            raise MeshError(ErrorCode.BAD_REQUEST, "What was sent is no record of a task.")
        known = self.order_record((order.submitter, order.task))
        if known is None or known.blob != blob or peer != self._hub.me:
            await self._writer.take(peer, blob)
        return order

    # ---- the index --------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Build the index, a page at a time, so that the node stays awake meanwhile."""
        for collection in (ORDERS, WISHES, ATTEMPTS):
            cursor: bytes | None = None
            while True:
                page = self._hub.records.scan(collection, b"", cursor, PAGE)
                for record in page.records:
                    self._take(collection, record.key, record)
                await trio.lowlevel.checkpoint()
                cursor = page.cursor
                if cursor is None:
                    break
        self.loaded.set()

    def observe(self, event: object) -> None:
        """Hear of every event of the protocol."""
        if not isinstance(event, RecordChanged | RecordWithdrawn) or event.collection not in (ORDERS, WISHES, ATTEMPTS):
            return
        # What is there now counts, not what the event tells: while the index is built, some are read ahead of theirs.
        key = self._take(event.collection, event.key, self._hub.records.get(event.collection, event.key))
        if key is None:
            return
        if event.collection == ATTEMPTS and isinstance(event, RecordChanged) and not event.token:
            attempt = None if event.deleted else _read(event.record, Attempt)
            if attempt is not None and event.record.author == self._hub.me:
                self._own_came(key, attempt)
        self._changed(key)

    def _take(self, collection: str, raw: bytes, record: Record | None) -> TaskKey | None:
        """What a key holds now; returns the task that it is about, if anything of it is known."""
        parts = raw.decode("ascii", "replace").split("/")
        node, task = NodeId(parts[0]), parts[1] if len(parts) > 1 else ""
        if collection == ATTEMPTS:
            return self._take_attempt((node, parts[2] if len(parts) > 2 else ""), task, record)
        key = (node, task)
        entry = self._entries.get(key)
        if collection == ORDERS:
            self._take_order(key, entry, None if record is None else _read(record, Order))
        elif entry is not None:
            entry.wish = (record and _read(record, Wish)) or NO_WISH
            entry.standing = None
        return key if entry is not None or key in self._entries else None

    def _take_order(self, key: TaskKey, entry: Entry | None, order: Order | None) -> None:
        if entry is not None and entry.order.key:
            self._by_key.pop((key[0], entry.order.key), None)
        if order is None:
            if entry is not None:
                self._forget(key, entry)
            return
        is_cut = len(order.shell) + sum(map(len, order.argv)) > COMMAND_KEPT_CHARS_MAX
        light = msgspec.structs.replace(order, env=(), stdin=b"")
        if is_cut:
            light = msgspec.structs.replace(light, argv=order.argv[:1], shell=order.shell[:64])
        if order.key:
            self._by_key[key[0], order.key] = key[1]
        if entry is not None:
            self._place(key, entry.order, None)
            self._place(key, None, light)
            entry.order, entry.is_cut, entry.standing = light, is_cut, None
            return
        submitters = self._by_task.setdefault(key[1], [])
        submitters.append(key[0])
        attempts = self._unowned.pop(key[1], {}) if len(submitters) == 1 else {}
        self._entries[key] = Entry(light, is_cut, self.wish(key), attempts)
        self._place(key, None, light)

    def _place(self, key: TaskKey, old: Order | None, new: Order | None) -> None:
        """Keep the order of all."""
        if old is not None:
            index = bisect_left(self._ordered, (old.at_ms, key[1], key[0]))
            del self._ordered[index]
        if new is not None:
            insort(self._ordered, (new.at_ms, key[1], key[0]))

    def _forget(self, key: TaskKey, entry: Entry) -> None:
        del self._entries[key]
        self._place(key, entry.order, None)
        submitters = self._by_task[key[1]]
        submitters.remove(key[0])
        if not submitters:
            del self._by_task[key[1]]
            if entry.attempts:
                self._unowned[key[1]] = entry.attempts

    def _take_attempt(self, name: tuple[NodeId, AttemptId], task: TaskId, record: Record | None) -> TaskKey | None:
        key = self.find(task)
        attempts = self._unowned.setdefault(task, {}) if key is None else self._entries[key].attempts
        attempt = None if record is None else _read(record, Attempt)
        if attempt is None:
            attempts.pop(name, None)
            if key is None and not attempts:
                del self._unowned[task]
        else:
            attempts[name] = attempt
        if key is not None:
            self._entries[key].standing = None
        return key


def order_in(blob: bytes) -> Order | None:
    """What a record of an order says, unverified; None if it is none."""
    record = open_record(blob)
    if record is None or record.collection != ORDERS or record.deleted:
        return None
    order = _read(record, Order)
    return order if order is not None and record.key == task_key(order.submitter, order.task) else None


def _read(record: Record, kind: type[Value]) -> Value | None:
    """What another version or a lying member wrote otherwise is passed over."""
    try:
        return msgspec.msgpack.decode(record.value, type=kind)
    except UNREADABLE:
        return None
