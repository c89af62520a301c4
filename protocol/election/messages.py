"""The election's messages: lease beacons and follow statements (datagrams), electorates (links)."""

from typing import Annotated

import msgspec

from protocol.wire import limits

_Short = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
_Counter = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Beacon(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=16):
    """I coordinate in `term`; this is my beat number `beat`. `version` names the electorate I count by."""

    term: _Counter
    beat: _Counter
    version_term: _Counter
    version_number: _Counter
    lease_ms: Annotated[int, msgspec.Meta(ge=0, le=600_000)]


class Follow(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=17):
    """I follow you in `term` and hold to it for the lease of beat `beat`; I hold this electorate version.

    `term` above the beacon's means: no, I follow (`term`, `leader`); claim higher or follow it too.
    """

    term: _Counter
    leader: _Short
    beat: _Counter
    version_term: _Counter
    version_number: _Counter


class ElectorateRequest(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=16):
    """You named an electorate version that I do not hold: send it."""


class ElectorateOffer(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=17):
    """An electorate: who votes, in a version (term, number)."""

    version_term: _Counter
    version_number: _Counter
    voters: Annotated[list[_Short], msgspec.Meta(max_length=limits.ROSTER_MAX)]
