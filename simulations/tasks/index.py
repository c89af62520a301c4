"""What one node's records say of tasks: every order, wish and attempt, mended whenever a record changes."""

from typing import TypeVar

import msgspec

from protocol.ids import NodeId
from protocol.node import Node
from protocol.placement.scheduling_events import Known
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
    task_key,
)
from protocol.records.record import Record, open_record

COLLECTIONS = (ORDERS, WISHES, ATTEMPTS)
PAGE = 500
TaskKey = tuple[NodeId, TaskId]
Value = TypeVar("Value", Order, Wish, Attempt)


class Index:
    """Empty until it is loaded; what changes meanwhile is taken in."""

    def __init__(self, hub: Node) -> None:
        self._hub = hub
        self.orders: dict[TaskKey, Order] = {}
        self.wishes: dict[TaskKey, Wish] = {}
        self.attempts: dict[TaskId, dict[tuple[NodeId, AttemptId], Attempt]] = {}

    def load(self) -> None:
        """Take in what the hub found on its disk."""
        for collection in COLLECTIONS:
            cursor: bytes | None = None
            while True:
                page = self._hub.records.scan(collection, b"", cursor, PAGE)
                for record in page.records:
                    self.take(collection, record.key)
                cursor = page.cursor
                if cursor is None:
                    break

    def take(self, collection: str, raw: bytes) -> TaskKey | None:
        """What a key holds now; returns the task that it is about, if its order is here or just went."""
        record = self._hub.records.get(collection, raw)
        node, task, *attempt = raw.decode("ascii").split("/")
        key = (NodeId(node), task)
        if collection == ATTEMPTS:
            known = self.attempts.setdefault(task, {})
            made = record and _read(record, Attempt)
            if made:
                known[NodeId(node), attempt[0]] = made
            else:
                known.pop((NodeId(node), attempt[0]), None)
            return next((one for one in self.orders if one[1] == task), None)
        was_known = key in self.orders
        if collection == ORDERS:
            order = record and _read(record, Order)
            if order:
                self.orders[key] = order
            else:
                self.orders.pop(key, None)
        else:
            self.wishes[key] = (record and _read(record, Wish)) or NO_WISH
        return key if was_known or key in self.orders else None

    def known(self, key: TaskKey) -> Known | None:
        """All that the records say of it."""
        order = self.orders.get(key)
        if order is None:
            return None
        attempts = self.attempts.get(key[1], {})
        wish = self.wishes.get(key, NO_WISH)
        return Known(order, wish, tuple((node, attempt) for (node, _), attempt in attempts.items()))

    def own(self) -> list[tuple[TaskKey, Attempt]]:
        """What this node wrote of tasks whose order is here."""
        me = self._hub.me
        return [
            (key, attempt)
            for key in self.orders
            for (node, _), attempt in self.attempts.get(key[1], {}).items()
            if node == me
        ]

    def order_blob(self, key: TaskKey) -> bytes | None:
        """The order's signed record."""
        record = self._hub.records.get(ORDERS, task_key(*key))
        return None if record is None else record.blob


def order_in(blob: bytes) -> Order | None:
    """What a record of an order says; None if it is none."""
    record = open_record(blob)
    if record is None or record.collection != ORDERS or record.deleted:
        return None
    order = _read(record, Order)
    return order if order is not None and record.key == task_key(order.submitter, order.task) else None


def _read(record: Record, kind: type[Value]) -> Value | None:
    try:
        return msgspec.msgpack.decode(record.value, type=kind)
    except msgspec.MsgspecError:
        return None
