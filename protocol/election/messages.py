"""The election's messages: lease beacons and follow statements (datagrams), electorates (links).

What they mean for safety is argued in docs/decisions/0003-coordinator-and-electorate.md.
"""

from typing import Annotated

import msgspec

from protocol.wire import limits

_Short = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
_Counter = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_RosterDigest = Annotated[bytes, msgspec.Meta(max_length=8)]

LEASE_MS_MAX = 600_000
NOBODY = bytes(8)
"""Stands where no node is meant: the leader of term 0."""


class Version(msgspec.Struct, frozen=True, order=True, array_like=True, gc=False):
    """Which electorate: made by the coordinator `by` of `term`, as its `number`-th. Ordered field by field.

    The maker is part of it because two nodes may claim the same term; so no version is ever made twice.
    """

    term: _Counter = 0
    by: _Short = NOBODY
    number: _Counter = 0


class Beacon(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=16):
    """I coordinate in `term`; this is my beat number `beat`. Answered by Follow; never larger than 140 bytes.

    `lease_ms` 0 says instead: I stop coordinating, and whoever promised me a lease is free of it.
    """

    term: _Counter
    beat: _Counter
    lease_ms: Annotated[int, msgspec.Meta(ge=0, le=LEASE_MS_MAX)]
    quorate: bool  # at the moment of sending, by the sender's clock
    voter: bool  # whether the receiver is one in `version`
    version: Version  # the electorate that the sender holds
    base: Version  # `version` has the voters of `base`, but for ...
    toggled: Annotated[list[_Short], msgspec.Meta(max_length=1)]  # ... this one: put in if it was out, and vice versa


class Follow(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=17):
    """I follow (`term`, `leader`). Answers a Beacon, or comes unasked (`beat` 0) to a leader that has fallen silent.

    Names it the receiver in the term of its beacon, then it is a vote for reading electorates; with `promised` the
    sender also follows nobody else for the lease of that beat. Names it anybody else, then it is a refusal.
    """

    term: _Counter
    leader: _Short
    beat: _Counter
    promised: bool
    version: Version  # the electorate that the sender holds durably
    seen_term: _Counter  # the highest (term, leader) that the sender has heard of, followed or not
    seen_leader: _Short


class ElectorateRequest(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=16):
    """You named an electorate version that I do not hold: send what you hold."""

    roster: _RosterDigest = b""  # by which the receiver of the answer can read `members`


class ElectorateOffer(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=17):
    """An electorate, whole: who votes. Members of the roster asked for are bits, all others short ids, sorted."""

    version: Version
    voters: Annotated[list[_Short], msgspec.Meta(max_length=limits.ROSTER_MAX)]
    roster: _RosterDigest = b""  # empty: all voters are in `voters`
    members: Annotated[bytes, msgspec.Meta(max_length=limits.ROSTER_MAX // 8)] = b""
