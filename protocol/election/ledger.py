"""What a node must remember to keep its word: whom it follows, whom it promised a lease, which electorate it holds.

Every method that changes something durable returns the Persist that makes it so; the machine puts it before whatever
it then says to others. When to follow or promise is decided in machine; this module only never lets a word be broken.
"""

from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec

from protocol.effects import Effect, Persist
from protocol.election.electorate import NO_ELECTORATE, Ballot, Electorate, founded
from protocol.election.messages import NOBODY

MACHINE: Final = "election"
_BALLOT: Final = b"ballot"
_PROMISE: Final = b"promise"
_ELECTORATE: Final = b"electorate"

_encode = msgspec.msgpack.Encoder(order="sorted").encode
T = TypeVar("T")


class Promise(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """To whom the last lease was promised, in which term, and the longest lease of it that is not over yet."""

    leader: bytes = NOBODY
    term: int = 0
    lease_ms: int = 0


def _load(durable: Mapping[bytes, bytes], key: bytes, default: T) -> T:
    stored = durable.get(key)
    return default if stored is None else msgspec.msgpack.decode(stored, type=type(default))


class Ledger:
    """A follower's durable word. Raises msgspec.DecodeError at construction if what was stored is damaged."""

    def __init__(self, me: bytes, durable: Mapping[bytes, bytes], *, founder: bool) -> None:
        self._me = me
        self.ballot: Ballot = _load(durable, _BALLOT, Ballot())
        self.promise: Promise = _load(durable, _PROMISE, Promise())
        self.held: Electorate = _load(durable, _ELECTORATE, NO_ELECTORATE)
        self._founds = founder and not self.held.voters
        self.promised_until = 0.0

    def start(self, now: float) -> list[Effect]:
        """The process runs again. How much of a promised lease is left is unknown, so all of it is kept once more."""
        if self.promise.leader not in (NOBODY, self._me):
            self.promised_until = now + self.promise.lease_ms / 1000
        if self._founds:
            self._founds = False
            return self.hold(founded(self._me))
        return []

    def follow(self, ballot: Ballot) -> list[Effect]:
        """Follow a ballot higher than all before. Raises ValueError on a lower one; nothing changed then."""
        if ballot < self.ballot:
            raise ValueError("ballots only rise")
        if ballot == self.ballot:
            return []
        self.ballot = ballot
        return [Persist(MACHINE, _BALLOT, _encode(ballot))]

    def hold(self, electorate: Electorate) -> list[Effect]:
        """Hold an electorate higher than all before. Raises ValueError on a lower one; nothing changed then."""
        if electorate.version <= self.held.version:
            raise ValueError("electorate versions only rise")
        self.held = electorate
        return [Persist(MACHINE, _ELECTORATE, _encode(electorate))]

    def free(self, now: float) -> bool:
        """Whether a promise to another node than the followed leader no longer stands in the way of one to it."""
        return self.promise.leader in (NOBODY, self.ballot.leader) or now >= self.promised_until

    def lease_runs(self, leader: bytes, now: float) -> bool:
        """Whether a lease promised to this leader is not over."""
        return self.promise.leader == leader and now < self.promised_until

    def promise_lease(self, lease_ms: int, now: float) -> list[Effect]:
        """Promise the followed leader a lease from now on. The caller has asked `free`."""
        renewed = self.promise.leader == self.ballot.leader
        until = now + lease_ms / 1000
        self.promised_until = max(self.promised_until, until) if renewed else until
        longest = max(lease_ms, self.promise.lease_ms) if renewed else lease_ms
        promise = Promise(self.ballot.leader, self.ballot.term, longest)
        if promise == self.promise:
            return []
        self.promise = promise
        return [Persist(MACHINE, _PROMISE, _encode(promise))]

    def release(self, ballot: Ballot, now: float) -> bool:
        """The leader of `ballot` gives its leases back. False if the promise is a later one or not to it.

        Not persisted: after a restart the lease is waited out although nobody counts on it, which is only slower.
        """
        if self.promise.leader != ballot.leader or self.promise.term > ballot.term or now >= self.promised_until:
            return False
        self.promised_until = now
        return True
