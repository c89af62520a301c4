"""Ballots and electorates as values, and how they are written down.

Which of them may replace which is the business of ledger (a follower's rule) and coordination (a coordinator's).
"""

from collections.abc import Collection
from typing import Annotated

import msgspec

from protocol.election.messages import NOBODY, ElectorateOffer, ElectorateRequest, Version
from protocol.trust.view import RosterView, members_in
from protocol.wire import limits


class Ballot(msgspec.Struct, frozen=True, order=True, array_like=True, gc=False):
    """A claim to coordinate. Ordered by term, then by the bytes of the leader's short id."""

    term: int = 0
    leader: bytes = NOBODY


class Electorate(msgspec.Struct, frozen=True, array_like=True):
    """Who votes, in which version. Voters are short ids."""

    version: Version = Version()
    voters: frozenset[Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]] = frozenset()

    @property
    def ballot(self) -> Ballot:
        """Whose electorate it is."""
        return Ballot(self.version.term, self.version.by)

    @property
    def need(self) -> int:
        """How many voters are more than half."""
        return len(self.voters) // 2 + 1

    def restamped(self, ballot: Ballot) -> "Electorate":
        """The same voters as the first electorate of a new coordinator."""
        return Electorate(Version(ballot.term, ballot.leader, 0), self.voters)

    def toggled(self, voter: bytes) -> "Electorate":
        """The next of the same coordinator: with this voter if it was out, without it if it was in."""
        version = Version(self.version.term, self.version.by, self.version.number + 1)
        return Electorate(version, self.voters ^ {voter})

    def offer(self, request: ElectorateRequest, roster: RosterView) -> ElectorateOffer:
        """As a link message: a bit for each member if whoever asks has this roster, 125 bytes for 1,000 of them."""
        if request.roster != roster.digest:
            return ElectorateOffer(self.version, sorted(self.voters))
        marks, others = bytearray((len(roster) + 7) // 8), list[bytes]()
        for voter in sorted(self.voters):
            member = roster.node(voter)
            index = None if member is None else roster.index(member)
            if index is None:
                others.append(voter)
            else:
                marks[index >> 3] |= 1 << (index & 7)
        return ElectorateOffer(self.version, others, roster.digest, bytes(marks))


NO_ELECTORATE = Electorate()
FOUNDING_VERSION = Version(0, NOBODY, 1)


def founded(voter: bytes) -> Electorate:
    """The first electorate of a mesh: its founder."""
    return Electorate(FOUNDING_VERSION, frozenset({voter}))


def offered(offer: ElectorateOffer, roster: RosterView) -> Electorate | None:
    """The electorate of a link message; one named twice counts once. None: of another roster, or too many."""
    if not offer.roster:
        return Electorate(offer.version, frozenset(offer.voters))
    if offer.roster != roster.digest:
        return None
    members = members_in(int.from_bytes(offer.members, "little"), roster)
    voters = frozenset([*offer.voters, *(bytes(roster.short(member)) for member in members)])
    return Electorate(offer.version, voters) if len(voters) <= limits.ROSTER_MAX else None


def apply_toggle(held: Electorate, version: Version, base: Version, toggled: Collection[bytes]) -> Electorate | None:
    """The electorate `version` that a beacon describes as a change of `base`, if that is what is held."""
    if held.version != base or not held.voters:
        return None
    voters = held.voters.symmetric_difference(toggled)
    return Electorate(version, voters) if 0 < len(voters) <= limits.ROSTER_MAX else None
