"""Submitting: an order is signed and stored here and, at the same time, at a second node; then it is acknowledged."""

import base64
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio
from msgspec import structs

from meshnode.kernel.calls import PeerCalls
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.tasks.core.submitting import input_of, order_of, same_wish
from meshnode.tasks.model import Submission
from meshnode.tasks.service.inputs import Inputs
from meshnode.tasks.service.records import TaskRecords
from meshnode.tasks.service.scheduling import SUBMIT_S
from meshnode.tasks.service.wire import Hold
from protocol.ids import NodeId
from protocol.node import Node
from protocol.placement.commands import Submit, Submitted
from protocol.placement.tasks import STDIN_INLINE_BYTES_MAX, TASK_ID_CHARS, Order, TaskId

HOLD_S: Final = 3.0
HOLDERS_TRIED_MAX: Final = 3
SUBMITS_AT_ONCE_MAX: Final = 64
RETRY_AFTER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Taken:
    """Who holds an order durably, and what the coordinator said to it, if it did."""

    held: tuple[NodeId, ...]
    answer: Submitted | None


class Submits:
    """One per node."""

    def __init__(
        self,
        *,
        hub: Node,
        calls: PeerCalls,
        records: TaskRecords,
        inputs: Inputs,
        find_node: Callable[[str], NodeId],
        now: Callable[[], float],
        wall: Callable[[], float],
        log: Logger,
    ) -> None:
        self._hub = hub
        self._calls = calls
        self._records = records
        self._inputs = inputs
        self._find_node = find_node
        self._now = now
        self._wall = wall
        self._log = log
        self._under_way: dict[TaskId, Order] = {}
        self._full_until = 0.0
        self._full_words = ""

    async def submit(self, said: Submission) -> tuple[Order, Taken | None]:
        """The order, and where it went; None: it was known before.

        Raises MeshError: what is wrong with it; CONFLICT for a key that was used for something else; OVERLOADED with
        `detail.retry_after_s`, nothing of it was kept; and as the records do.
        """
        hub = self._hub
        if hub.me not in hub.roster:
            raise MeshError(
                ErrorCode.EVICTED, "This node is no member of its mesh any more. `meshnode status` says what to do."
            )
        order = await self._order(said)
        before = self._before(order)
        if before is not None:
            return before, None
        self._admit()
        self._under_way[order.task] = order
        try:
            if order.has_input_file:
                order = await self._with_holders(order)
            return order, await self._stored(order)
        finally:
            del self._under_way[order.task]

    async def _order(self, said: Submission) -> Order:
        """What is asked, whose input is here, if it was sent ahead; a short one goes into the order after all."""
        sha256, sent = input_of(said), None
        if sha256 is not None:
            size = await self._inputs.used(sha256)
            if size is None:
                raise MeshError(
                    ErrorCode.NOT_FOUND,
                    "`input` is not on this node. Send it to `POST /api/tasks/inputs` first; what no task names is "
                    "deleted after an hour.",
                    detail={"field": "input"},
                )
            if size > STDIN_INLINE_BYTES_MAX:
                sent = (sha256, size)
            else:
                short = base64.b64encode(await self._inputs.whole(sha256)).decode("ascii")
                said = structs.replace(said, input="", stdin_base64=short)
        return order_of(
            said,
            task=self._drawn(),
            me=self._hub.me,
            at_ms=int(self._wall() * 1000),
            find_node=self._find_node,
            sent=sent,
        )

    async def _with_holders(self, order: Order) -> Order:
        """With who else has its input durably, which is seen to first: the order names them, and is signed."""
        needs = order.needs
        wanted = [NodeId(node) for node in (needs.node, needs.preferred) if node]
        holders = await self._inputs.copied(order.stdin_sha256, order.stdin_bytes, wanted)
        return structs.replace(order, stdin_holders=holders)

    def _drawn(self) -> TaskId:
        return secrets.token_hex(TASK_ID_CHARS // 2)

    def _before(self, order: Order) -> Order | None:
        """What was submitted here under the same key. Raises MeshError CONFLICT when it was something else."""
        if not order.key:
            return None
        found = [one for one in self._under_way.values() if one.key == order.key]
        known = found[0] if found else self._records.of_idempotency(order.submitter, order.key)
        if known is not None and self._records.wish((known.submitter, known.task)).deleted:
            return None
        if known is not None and not same_wish(known, order):
            raise MeshError(
                ErrorCode.CONFLICT,
                f"The key {order.key!r} was used for another task ({known.task}). Use a new key for a new task.",
                detail={"id": known.task},
            )
        return known

    def _admit(self) -> None:
        left_s = self._full_until - self._now()
        if left_s > 0:
            raise _full(self._full_words, left_s)
        if len(self._under_way) >= SUBMITS_AT_ONCE_MAX:
            raise _full(f"{len(self._under_way)} tasks are being submitted here at once.", RETRY_AFTER_S)

    async def _stored(self, order: Order) -> Taken:
        """Where it went. When the queue is full, it is taken back."""
        begun = self._records.begin_order(order)
        held = [self._hub.me]
        answers: list[Submitted] = []

        async def elsewhere(blob: bytes) -> None:
            leader = self._hub.election.coordinator
            if leader is not None:
                answer = await self._queued(leader, blob)
                if answer is not None and answer.code in ("", "overloaded"):
                    answers.append(answer)
                if answers and answers[0].code:
                    return
                if answers and leader != self._hub.me:
                    held.append(leader)
                    return
            other = await self._held_elsewhere(blob, leader)
            if other is not None:
                held.append(other)

        async with trio.open_nursery() as nursery:
            if begun.record is not None:
                nursery.start_soon(elsewhere, begun.record.blob)
            try:
                await begun.durable()
            except MeshError:
                nursery.cancel_scope.cancel()
                raise
        answer = answers[0] if answers else None
        if answer is not None and answer.code:
            await self._records.drop_order((order.submitter, order.task))
            self._full_until = self._now() + answer.retry_after_s
            self._full_words = answer.words
            raise _full(answer.words, answer.retry_after_s)
        return Taken(tuple(held), answer)

    async def _queued(self, leader: NodeId, blob: bytes) -> Submitted | None:
        """What the coordinator says to it; None when it did not answer: it will find the record by itself."""
        try:
            return await self._calls.call(leader, "tasks.submit", Submit(blob), Submitted, timeout_s=SUBMIT_S)
        except MeshError as error:
            self._log.debug("the coordinator did not take a task", leader=leader, why=error.message)
            return None

    async def _held_elsewhere(self, blob: bytes, leader: NodeId | None) -> NodeId | None:
        """A node other than this one and the coordinator that holds it now, if one is up and can."""
        up = [node for node in self._hub.membership.view.up if node not in (self._hub.me, leader)]
        tried = secrets.SystemRandom().sample(up, min(len(up), HOLDERS_TRIED_MAX))
        for node in tried:
            try:
                await self._calls.call(node, "tasks.hold", Hold(blob), bool, timeout_s=HOLD_S)
            except MeshError as error:
                self._log.debug("a node did not hold a task", node=node, why=error.message)
            else:
                return node
        return None


def _full(words: str, retry_after_s: float) -> MeshError:
    return MeshError(
        ErrorCode.OVERLOADED,
        f"No more tasks are taken now: {words.rstrip('.') or 'the queue is full'}. Try again in a while.",
        retryable=True,
        detail={"retry_after_s": max(RETRY_AFTER_S, retry_after_s)},
    )
