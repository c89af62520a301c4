"""The fence at each executor: it keeps the highest coordinator that it ever obeyed and refuses older ones.

Exactly one instance guards everything that a node executes for a coordinator. It depends on no clock and on no quorum:
even a coordinator that woke from a year's sleep cannot get past it.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from protocol.effects import Effect, Persist
from protocol.election.electorate import Ballot
from protocol.ids import NodeId, short_id

FENCE_MACHINE: Final = "fence"
TERM_LEAP_MAX: Final = 2**20
"""A command so far ahead of everything obeyed is refused: it would use the counter up and shut out everybody else."""

_OBEYED: Final = b"obeyed"


class Fence:
    """Highest (term, leader) obeyed. `durable` is what was persisted under FENCE_MACHINE."""

    def __init__(self, durable: Mapping[bytes, bytes]) -> None:
        stored = durable.get(_OBEYED)
        self._obeyed = Ballot() if stored is None else msgspec.msgpack.decode(stored, type=Ballot)
        self._durable = stored
        self._leader = (NodeId(""), b"")  # who was named last: it is the same one for hours

    @property
    def term(self) -> int:
        """The highest term admitted."""
        return self._obeyed.term

    def admit(self, term: int, leader: NodeId) -> tuple[bool, list[Effect]]:
        """Whether a command of (term, leader) may be obeyed, and what must be durable before it is.

        Refused ones change nothing. Term 0 is nobody's. A second command of a new coordinator gets the Persist as well
        until `persisted` was called: it must not be obeyed before the first one's is durable.
        """
        if leader != self._leader[0]:
            self._leader = (leader, short_id(leader))
        ballot = Ballot(term, self._leader[1])
        if not 0 < term <= self._obeyed.term + TERM_LEAP_MAX or ballot < self._obeyed:
            return False, []
        self._obeyed = ballot
        value = msgspec.msgpack.encode(ballot)
        return True, [] if value == self._durable else [Persist(FENCE_MACHINE, _OBEYED, value)]

    def persisted(self, effects: Sequence[Effect]) -> None:
        """These effects of `admit` are durable now; later commands of the same coordinator need not wait again."""
        for effect in effects:
            if isinstance(effect, Persist):
                self._durable = effect.value
