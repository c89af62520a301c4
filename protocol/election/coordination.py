"""What a node does while it coordinates: beacons, the count of promises, reading and changing the electorate.

Lives for one ballot of one process. Whether to claim, to step down or to climb over a higher term is machine's
decision; the argument why two of these are never quorate at once is docs/decisions/0003-coordinator-and-electorate.md.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from math import inf
from typing import Final

import msgspec

from protocol.effects import Effect, Publish, Send, SendLink, SetTimer
from protocol.election.electorate import NO_ELECTORATE, Ballot, Electorate
from protocol.election.events import ElectorateChanged, QuorumChanged
from protocol.election.ledger import MACHINE, Ledger
from protocol.election.messages import Beacon, ElectorateRequest, Follow, Version
from protocol.election.parameters import ElectionParameters
from protocol.election.tally import Tally
from protocol.ids import NodeId
from protocol.trust.view import RosterView

BEAT: Final = (MACHINE, "beat")
RETRY: Final = (MACHINE, "retry")
REFORM: Final = (MACHINE, "reform")
LAPSE: Final = (MACHINE, "lapse")


class Moment(msgspec.Struct, frozen=True, gc=False):
    """One instant on both clocks: the monotonic one, and the lease clock that never runs slower than real time."""

    now: float
    time: float


class Coordination:
    """One claim to coordinate. `up` maps the peers that membership says are up to their short ids; it is shared."""

    def __init__(
        self,
        *,
        me: NodeId,
        ballot: Ballot,
        roster: RosterView,
        up: Mapping[NodeId, bytes],
        ledger: Ledger,
        params: ElectionParameters,
        quorate_from: float = -inf,
    ) -> None:
        """`quorate_from`: lease time before which it is not quorate, whoever follows."""
        self._me = me
        self._quorate_from = quorate_from
        self.ballot = ballot
        self._roster = roster
        self._up = up
        self._ledger = ledger
        self._params = params
        self._tally = Tally(params.drift_max)
        self._committed: Electorate | None = None  # the electorate that counts; the held one may be a step ahead
        self._base = Version()
        self._toggled: tuple[bytes, ...] = ()
        self._beat = 0
        self._round: deque[NodeId] = deque()
        self._round_size = 0
        self._round_at = 0.0
        self._retry_s = params.retry_s
        self._ask_at = 0.0
        self._change_at = 0.0  # not before
        self._changed_at = 0.0  # the change under way was made then
        self._clean_digest = b""  # of a roster that holds every voter
        self._told: tuple[bool, int] | None = None
        self._recount = False  # a beat has passed: a changed count is worth telling

    # ---- reading -----------------------------------------------------------------------------------------------

    def quorate(self, time: float) -> bool:
        """Whether more than half of the electorate holds to this node at this lease time."""
        return time >= self._quorate_from and self._committed is not None and self._tally.holds(self._committed, time)

    def status(self, time: float) -> QuorumChanged:
        """The quorum in figures and words."""
        electorate = self._committed or self._ledger.held
        voters, need = len(electorate.voters), electorate.need
        if not voters:
            return QuorumChanged(False, 0, 1, 0, "no electorate known: no voter of this mesh answers")
        if self._ledger.held.ballot != self.ballot:
            have = self._tally.following(electorate)
            return QuorumChanged(False, have, need, voters, f"{have} of {voters} voters follow, {need} needed")
        have = self._tally.have(electorate, time)
        if time < self._quorate_from:
            words = f"restarted: what its run before was promised lasts {self._quorate_from - time:.0f} s more"
            return QuorumChanged(False, have, need, voters, words)
        return QuorumChanged(self.quorate(time), have, need, voters, f"{have} of {voters} voters answer")

    # ---- life --------------------------------------------------------------------------------------------------

    def open(self, at: Moment) -> list[Effect]:
        """Begin: tell everybody, and start to count."""
        effects = self.beat(at)
        self._retry_s = self._params.retry_s
        effects.append(SetTimer(RETRY, at.now + self._retry_s))
        return effects

    def impose(self, voters: frozenset[bytes], at: Moment) -> list[Effect]:
        """Begin with an electorate that no majority confirmed: an operator's word takes its place (ForgetLost)."""
        # No base: that several voters are gone cannot be told as one toggle, so followers ask for the whole.
        self._base, self._toggled = Version(), ()
        stamped = Electorate(self._ledger.held.version, voters).restamped(self.ballot)
        return self._ledger.hold(stamped) + self.open(at)

    def release(self, successor: Follow | None) -> list[Effect]:
        """Give every promise back and say who coordinates now, if known. Nothing of this object is used after it."""
        beacon = Beacon(self.ballot.term, self._beat + 1, 0, False, False, Version(), Version(), [])
        messages = (beacon,) if successor is None else (beacon, successor)
        self._committed = None
        return [Send(voice.node, messages) for voice in self._tally.voices.values() if voice.node != self._me]

    def beat(self, at: Moment) -> list[Effect]:
        """The beat's timer: the next slice of peers gets its beacon, and what waits for time to pass is looked at."""
        if not self._round:
            self._round.extend(self._up)
            self._round_size = max(1, len(self._round))
            self._round_at = at.now
        targets = list(islice(self._round, self._params.slice_nodes))
        for _ in targets:
            self._round.popleft()
        effects = self._beacons(targets, at)
        next_at = self._round_at + self._period()
        if self._round:
            next_at = at.now + self._period() * len(targets) / self._round_size
        effects.append(SetTimer(BEAT, next_at))
        self._recount = True
        return effects + self.advance(at)

    def retry(self, at: Moment) -> list[Effect]:
        """Beacons again to those who did not answer the last push, less and less often."""
        held, voices = self._ledger.held, self._tally.voices
        stamped = held.ballot == self.ballot
        behind = (
            node
            for node, short in self._up.items()
            if short not in voices or (stamped and short in held.voters and voices[short].stated < held.version)
        )
        targets = list(islice(behind, self._params.slice_nodes))
        if not targets:
            return []
        effects = self._beacons(targets, at)
        self._retry_s *= 2
        if self._retry_s < self._period():
            effects.append(SetTimer(RETRY, at.now + self._retry_s))
        return effects

    def greet(self, peer: NodeId, at: Moment) -> list[Effect]:
        """This peer came up, or does not know that this node coordinates."""
        return self._beacons([peer], at)

    def renew(self, at: Moment) -> list[Effect]:
        """This node's own promise to somebody else ran out: it may count itself now."""
        return self._count_self(self._beat, at) + self.advance(at)

    def answered(self, sender: NodeId, short: bytes, follow: Follow, at: Moment) -> list[Effect]:
        """A peer follows this very ballot."""
        beat = follow.beat if follow.promised else None
        self._tally.heard(sender, short, follow.version, beat)
        if self._told == (True, 0) and self._committed is self._ledger.held and short in self._committed.voters:
            return []  # the steady state: one more lease renewed
        return self.advance(at)

    # ---- the electorate ----------------------------------------------------------------------------------------

    def learned(self, electorate: Electorate, at: Moment) -> list[Effect]:
        """A peer sent the electorate that it holds. Taken only while reading: later this node makes them itself."""
        held = self._ledger.held
        if held.ballot == self.ballot or not held.version < electorate.version or electorate.ballot >= self.ballot:
            return []
        if not electorate.voters:
            return []
        self._ask_at = 0.0
        effects = self._ledger.hold(electorate)
        return effects + self._count_self(self._beat, at) + self.advance(at)

    def advance(self, at: Moment) -> list[Effect]:
        """Take every step that the answers so far allow: read and re-stamp, take up the change under way, change."""
        effects: list[Effect] = []
        if self._ledger.held.ballot != self.ballot:
            effects += self._read(at)
        while self._ledger.held.ballot == self.ballot:
            held = self._ledger.held
            if self._committed is not held:
                if not self._tally.holds(held, at.time):
                    effects += self._revert(at)
                    break
                effects += self._commit(held)
            change = self._next_change(at)
            if change is None:
                break
            if at.now < self._change_at:
                effects.append(SetTimer(REFORM, self._change_at))
                break
            effects += self._change(change, at)
        return effects

    def _read(self, at: Moment) -> list[Effect]:
        """Find the highest electorate among a majority of itself and make it this ballot's own (as Paxos reads).

        A follower that went down after it answered is left out: as if it had not answered.
        """
        held = self._ledger.held
        voices = {short: voice for short, voice in self._tally.voices.items() if voice.node in self._readable()}
        highest = max(voices.values(), key=lambda voice: voice.stated)
        if highest.stated > held.version:
            if at.now < self._ask_at:
                return []
            self._ask_at = at.now + self._params.ask_s
            return [SendLink(highest.node, ElectorateRequest(self._roster.digest)), SetTimer(REFORM, self._ask_at)]
        if not held.voters or len(held.voters & voices.keys()) < held.need:
            return []
        self._base, self._toggled = held.version, ()
        effects = self._ledger.hold(held.restamped(self.ballot))
        return effects + self._push(at)

    def _readable(self) -> set[NodeId]:
        return {self._me, *self._up}

    def _commit(self, held: Electorate) -> list[Effect]:
        """A majority states and promises under this electorate: from now on it is the one that counts."""
        before = self._committed
        self._committed = held
        if before is None:
            return []
        added = [self._roster.node(voter) for voter in held.voters - before.voters]
        removed = self._node_of(before.voters - held.voters)
        return [Publish(ElectorateChanged(added[0] if added else None, removed, len(held.voters)))]

    def _node_of(self, voters: frozenset[bytes]) -> NodeId | None:
        """The id of the voter that went, where it is still known: an evicted one is only known by what it said."""
        for voter in voters:
            voice = self._tally.voices.get(voter)
            return voice.node if voice is not None else self._roster.node(voter)
        return None

    def _next_change(self, at: Moment) -> bytes | None:
        """The voter to take out or in: evicted ones first, then members that follow and are up. None: nothing to do."""
        committed = self._committed
        if committed is None or not self.quorate(at.time):
            return None
        if self._roster.digest != self._clean_digest:
            gone = sorted(voter for voter in committed.voters if self._roster.node(voter) is None)
            if not gone:
                self._clean_digest = self._roster.digest
            for voter in gone:
                rest = Electorate(committed.version, committed.voters - {voter})
                # Without this, a change could be begun that the voters left over cannot carry.
                if rest.voters and self._tally.until(rest) > at.time:
                    return voter
        for short, voice in self._tally.voices.items():
            if short in committed.voters or voice.until <= at.time:
                continue
            if voice.node in self._roster and (voice.node == self._me or voice.node in self._up):
                return short
        return None

    def _change(self, voter: bytes, at: Moment) -> list[Effect]:
        held = self._ledger.held
        self._base, self._toggled = held.version, (voter,)
        self._change_at = at.now + len(held.voters) / self._params.pushes_per_s_max
        self._changed_at = at.now
        return self._ledger.hold(held.toggled(voter)) + self._push(at)

    def _revert(self, at: Moment) -> list[Effect]:
        """The change under way found no majority in time, say because the newcomer died: take it back.

        The versions since the last committed one then differ in this one voter only, so their majorities still meet.
        """
        late = at.now - self._changed_at > self._params.revert_s
        if not (late and len(self._toggled) == 1 and self.quorate(at.time)):
            return []
        return self._change(self._toggled[0], at)

    def _push(self, at: Moment) -> list[Effect]:
        """Tell the voters of the electorate just made at once, and again until they answer."""
        concerned = self._ledger.held.voters.union(self._toggled)
        effects = self._beacons([node for node, short in self._up.items() if short in concerned], at)
        self._retry_s = self._params.retry_s
        return [*effects, SetTimer(RETRY, at.now + self._retry_s)]

    # ---- beacons -----------------------------------------------------------------------------------------------

    def _period(self) -> float:
        return self._params.lease_for(len(self._roster)) / self._params.beats_per_lease

    def _beacons(self, nodes: Iterable[NodeId], at: Moment) -> list[Effect]:
        """One new beat to these peers. This node's own promise is renewed with it."""
        self._beat += 1
        lease_s = self._params.lease_for(len(self._roster))
        self._tally.sent(self._beat, lease_s, at.time)
        effects = self._count_self(self._beat, at)
        held, quorate, lease_ms = self._ledger.held, self.quorate(at.time), int(lease_s * 1000)
        stamps = (held.version, self._base, list(self._toggled))
        term, beat = self.ballot.term, self._beat
        voter = Beacon(term, beat, lease_ms, quorate, True, *stamps)
        other = Beacon(term, beat, lease_ms, quorate, False, *stamps)
        for node in nodes:
            short = self._up.get(node) or self._roster.short(node)
            effects.append(Send(node, (voter if short in held.voters else other,)))
        return effects

    def _count_self(self, beat: int, at: Moment) -> list[Effect]:
        """This node is a follower of itself, under the same rule: not before a promise to another has run out."""
        short, held = self.ballot.leader, self._ledger.held
        if not self._ledger.free(at.now):
            self._tally.heard(self._me, short, held.version, None)
            return []
        lease_ms = int(self._params.lease_for(len(self._roster)) * 1000)
        effects = self._ledger.promise_lease(lease_ms, at.now)
        self._tally.heard(self._me, short, held.version, beat)
        return effects

    # ---- reporting ---------------------------------------------------------------------------------------------

    def report(self, at: Moment) -> list[Effect]:
        """Publish the quorum when it changed; a coordinator that gained or lost it also tells its followers at once."""
        quorate, told = self.quorate(at.time), self._told
        flipped = told is not None and told[0] != quorate
        if not flipped and (told == (True, 0) or not self._recount):
            return []  # counting voters after every answer would cost a large mesh a tenth of a core
        self._recount = False
        status = self.status(at.time)
        told = (quorate, 0 if quorate else status.have)
        if told == self._told:
            return []
        self._told = told
        effects: list[Effect] = [Publish(status)]
        if status.quorate:
            effects.append(self._watch(at))
        if flipped:
            self._round.clear()
            effects += self.beat(at)
        return effects

    def lapse(self, at: Moment) -> list[Effect]:
        """The leases that made this node quorate may have run out; if not, look again when the present ones do."""
        return [self._watch(at)] if self.quorate(at.time) else []

    def _watch(self, at: Moment) -> SetTimer:
        until = self._tally.until(self._committed or NO_ELECTORATE)
        return SetTimer(LAPSE, at.now + max(until - at.time, 0.0))
