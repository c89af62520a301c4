"""How a task is submitted: durable here and, where there is one, on a second node, before anybody is told that it was
taken. It stands where the agent's desk stands.
"""

from collections.abc import Callable

import msgspec

from protocol.ids import NodeId
from protocol.placement.commands import Submitted
from protocol.placement.tasks import ORDERS, Order, task_key
from simulations.tasks.member import Member

HOLDERS_TRIED_MAX = 3

_submitted = msgspec.msgpack.Decoder(Submitted)
Answered = Callable[[str, list[NodeId]], None]


class Submitting:
    """One submission at one member. `answered` hears "" and who holds the order, or why it was not taken."""

    def __init__(self, member: Member, order: Order, answered: Answered) -> None:
        self._member = member
        self._key = (order.submitter, order.task)
        self._answered = answered
        self._holders: list[NodeId] = []
        self._refusal = ""
        self._waits = 2
        member.writer.put(ORDERS, task_key(*self._key), msgspec.msgpack.encode(order), self._stored)
        blob = member.index.order_blob(self._key)
        if blob is None:
            self._done()
        else:
            self._queue(blob)

    def _stored(self, ok: bool) -> None:
        if ok:
            self._holders.append(self._member.me)
        else:
            self._refusal = "it could not be stored"
        self._done()

    def _done(self) -> None:
        self._waits -= 1
        if self._waits:
            return
        if self._refusal:
            self._member.writer.drop_order(self._key)
        self._answered(self._refusal, self._holders)

    def _queue(self, blob: bytes) -> None:
        member = self._member
        me, leader = member.me, member.hub.election.coordinator

        def queued(body: bytes | None) -> None:
            answer = None if body is None else _submitted.decode(body)
            if answer is not None and answer.code == "overloaded":
                self._refusal = answer.words
                self._done()
            elif answer is not None and not answer.code and leader is not None and leader != me:
                self._holders.append(leader)
                self._done()
            else:
                others = [node for node in member.hub.membership.view.up if node not in (me, leader)]
                tried = member.fabric.rng.sample(sorted(others), min(HOLDERS_TRIED_MAX, len(others)))
                self._hold(blob, tried)

        if leader is None:
            queued(None)
        else:
            member.call(leader, lambda other, answer: other.submit_asked(me, blob, answer), queued)

    def _hold(self, blob: bytes, tried: list[NodeId]) -> None:
        if not tried:
            self._done()
            return
        me, node = self._member.me, tried.pop()

        def replied(body: bytes | None) -> None:
            if body:
                self._holders.append(node)
                self._done()
            else:
                self._hold(blob, tried)

        self._member.call(node, lambda other, answer: other.hold(me, blob, answer), replied)
