"""Writes records of tasks at one node, and says when they are durable, as the agent's record writer does."""

from collections.abc import Callable

import msgspec

from protocol.ids import NodeId
from protocol.placement.tasks import ORDERS, WISHES, Wish, task_key
from protocol.records.events import DeleteRecord, PutRecord, TakeRecord
from simulations.beside import Beside
from simulations.computer import Computer
from simulations.tasks.index import TaskKey

FIRST_TOKEN = 2_000_000
Done = Callable[[bool], None]


class Writer:
    """One for each process. `done` hears whether it is durable here."""

    def __init__(self, beside: Beside, computer: Computer) -> None:
        self._beside = beside
        self._computer = computer
        self._waiting: dict[int, Done] = {}
        self._number = FIRST_TOKEN

    def put(self, collection: str, key: bytes, value: bytes, done: Done) -> None:
        """A value of this node's."""
        self._computer.input(PutRecord(collection, key, value, self._token(done)))

    def take(self, peer: NodeId, blob: bytes, done: Done) -> None:
        """A signed record that came in a call."""
        self._computer.input(TakeRecord(peer, blob, self._token(done)))

    def drop_order(self, key: TaskKey) -> None:
        """This node's own."""
        self._computer.input(DeleteRecord(ORDERS, task_key(*key), self._token(lambda ok: None)))

    def wish(self, key: TaskKey, wish: Wish) -> None:
        """What a person wants of a task."""
        self.put(WISHES, task_key(*key), msgspec.msgpack.encode(wish), lambda ok: None)

    def done(self, token: int, *, ok: bool) -> None:
        """The hub said what became of a write."""
        done = self._waiting.pop(token, None)
        if done is not None:
            self._beside.later(0.0, self._computer, lambda: done(ok))  # not in the midst of what the hub tells

    def _token(self, done: Done) -> int:
        self._number += 1
        self._waiting[self._number] = done
        return self._number
