"""Bringing views together again: link repair for stragglers, view reports after a partition, telling the falsely dead.

After a partition of a large mesh, hundreds of nodes are falsely dead at once. Hundreds of refutations would cost each
node tens of kilobytes; instead, a few signed view reports (one bit per member) from distinct witnesses of the other
side bring back all of them.
"""

from collections.abc import Iterable, Sequence
from math import inf

from protocol.ids import NodeId
from protocol.membership.broadcasts import ITEM_OVERHEAD_BYTES
from protocol.membership.events import PeerUp
from protocol.membership.state import State
from protocol.membership.suspicion import Suspicions
from protocol.membership.view import View, addresses_of, alive_of
from protocol.trust.view import members_in
from protocol.wire import limits
from protocol.wire.messages import Alive, Gossip, ViewOffer, ViewReply, ViewReport
from protocol.wire.statements import Stated

TELL_PAUSE_S = 1.0
DIFFERS_MAX_S = 30.0  # a difference that lasts so long is repaired although the view still changes
COMPARED_RECENTLY_S = 60.0  # whoever was compared with in this time lets others go first
REPLY_STATEMENTS_MAX = 4000  # in answer to one offer ...
STATEMENTS_PER_REPLY = 256  # ... and in one frame of it: with the longest statements, and all wishes, well below 1 MiB
REPORT_LIFETIME_S = 3.0
REPORT_LAG_S = 5.0  # a report that arrives so soon after a death may have been made before it
REPORTS_MAX = 64
REPORT_ROSTER_MAX = (limits.STATEMENT_BYTES_MAX - 128) * 8  # a bit a member; beyond, no report fits a statement
PROOF_BYTES_MAX = limits.DATAGRAM_BODY_BYTES_MAX - 40


def peer_up(view: View, peer: NodeId) -> PeerUp:
    """The event that says that this peer is up, from its newest statement."""
    alive = alive_of(view.known[peer])
    return PeerUp(peer, alive.boot, addresses_of(alive), alive.version_min, alive.version_max)


class Healing:
    """Differences noticed, repairs under way, reports collected."""

    def __init__(self, state: State, suspicions: Suspicions) -> None:
        self._s = state
        self._suspicions = suspicions
        self._differs_since: float | None = None
        self._differed_at = 0.0
        self._last_sync = -1e9
        self._compared: dict[NodeId, float] = {}  # with whom, and when, in COMPARED_RECENTLY_S
        self._told: dict[NodeId, float] = {}
        self._contested_at: float | None = None
        self._reports: dict[NodeId, tuple[float, int]] = {}  # witness -> (when, bits)
        self._report_numbers: dict[NodeId, tuple[int, int]] = {}
        self._own_report: tuple[int, float, Stated] | None = None

    # ---- differences of views -----------------------------------------------------------------------------------

    def compare(self, peer: NodeId, digest: bytes) -> None:
        """A ping or ack brought the peer's view digest."""
        s = self._s
        if digest == s.view.digest.to_bytes(8, "big"):
            # That one peer agrees says nothing of those that do not: two camps would never look at each other.
            if s.now >= self._differed_at + s.params.sync_wait_s:
                self._differs_since = None
            return
        self._differed_at = s.now
        first_seen = self._differs_since is None
        if self._differs_since is None:
            self._differs_since = s.now
        # Gossip is still at work while a view changes; a link repair is for what gossip missed.
        if s.young():
            settled = s.view.changed_at + s.params.sync_wait_young_s
        else:
            settled = inf if first_seen else max(self._differs_since, s.view.changed_at) + s.params.sync_wait_s
            # In a mesh where somebody always changes, or one member sees to that, no view would ever be repaired.
            settled = min(settled, self._differs_since + DIFFERS_MAX_S)
        if s.now >= settled:
            self.sync(peer)

    def sync(self, peer: NodeId) -> None:
        """Compare views with a peer over the link, at most once per pause, later with one of late."""
        s = self._s
        pause_s = s.params.sync_pause_young_s if s.young() else s.params.sync_pause_s
        fresh = s.now - COMPARED_RECENTLY_S
        # A member that says all the time that it differs would else take every turn, and no other view be compared.
        if s.now < self._last_sync + (2 * pause_s if self._compared.get(peer, fresh) > fresh else pause_s):
            return
        self._compared = {other: at for other, at in self._compared.items() if at > fresh}
        # The pause is jittered so that a mesh that differs in one place does not repair in step.
        self._last_sync = s.now + s.rng.uniform(0.0, pause_s)
        self._compared[peer] = s.now
        if self._differs_since is not None:
            self._differs_since = s.now
        self.offer(peer)

    def offer(self, peer: NodeId) -> None:
        """Open a comparison of views with this peer."""
        s = self._s
        s.link(peer, ViewOffer(s.roster.digest, s.view.entries()))

    def offered(self, peer: NodeId, offer: ViewOffer) -> None:
        """Answer a ViewOffer with what this node has on the members where the two differ."""
        s = self._s
        statements: list[bytes] = []
        wanted: list[bytes] = []
        comparable = offer.roster == s.roster.digest
        for index, member in enumerate(s.roster.members()):
            theirs = offer.entries[4 * index : 4 * index + 4] if comparable else b""
            stated = s.view.known.get(member)
            up = stated is not None and member in s.view.up
            mine = (stated.token & 0xFFFFFFFF).to_bytes(4, "big") if stated is not None and up else b"\0\0\0\0"
            if theirs == mine or (not up and theirs == b""):
                continue
            if up and stated is not None:
                statements.append(stated.blob)
            elif member in s.view.left:
                statements.append(s.view.left[member].blob)
            else:
                statements += [proof.blob for proof in self._suspicions.accusations(member)]
            if theirs not in (b"", b"\0\0\0\0"):
                wanted.append(s.roster.short(member))
        self._reply(peer, statements, wanted)

    def _reply(self, peer: NodeId, statements: Sequence[bytes], wanted: list[bytes]) -> None:
        """In as many frames as it takes; the first one brings the wishes."""
        told = statements[:REPLY_STATEMENTS_MAX]
        for start in range(0, max(1, len(told)), STATEMENTS_PER_REPLY):
            self._s.link(peer, ViewReply(list(told[start : start + STATEMENTS_PER_REPLY]), [] if start else wanted))

    def wanted(self, peer: NodeId, shorts: Iterable[bytes]) -> None:
        """Send the statements that the peer asked for, each once however often it is named."""
        s = self._s
        statements: list[bytes] = []
        for raw in dict.fromkeys(shorts):
            member = s.roster.node(raw)
            if member is None:
                continue
            if member in s.view.up:
                statements.append(s.view.known[member].blob)
            else:
                statements += [proof.blob for proof in self._suspicions.accusations(member)]
        if statements:
            self._reply(peer, statements, [])

    # ---- the falsely dead ----------------------------------------------------------------------------------------

    def contact(self, sender: NodeId) -> None:
        """A member that is not up in this view spoke to us, provenly itself and now."""
        s = self._s
        down = s.view.down.get(sender)
        if down is not None and not down.proof:
            # Nobody else bore witness against it: its own word is enough.
            self.revive(sender)
        elif down is not None:
            self.tell(sender)
        elif sender not in s.view.left:
            self.sync(sender)

    def tell(self, peer: NodeId) -> None:
        """Tell a member that this view has it dead: with the proof, or with a report when many views must change."""
        s = self._s
        if s.now < self._told.get(peer, -1e9) + TELL_PAUSE_S:
            return
        self._told[peer] = s.now
        if s.view.witnessed_down() >= s.params.report_mass and self._may_report():
            s.send(peer, Gossip([self._report().blob]))
            return
        room, items = PROOF_BYTES_MAX, list[bytes]()
        for stated in self._suspicions.accusations(peer)[: s.params.witnesses_max]:
            # Another version may have made them longer; one that gets through is enough to be refuted.
            room -= len(stated.blob) + ITEM_OVERHEAD_BYTES
            if room >= 0:
                items.append(stated.blob)
        if items:
            s.send(peer, Gossip(items))

    def _may_report(self) -> bool:
        """A newcomer's view is what others believed a while ago: its report would be a witness to nothing, thrice."""
        s = self._s
        return s.now >= s.born_at + s.params.report_age_s and len(s.roster) <= REPORT_ROSTER_MAX

    def _report(self) -> Stated:
        s = self._s
        bits = s.view.bits()
        if self._own_report is not None and self._own_report[0] == bits and s.now < self._own_report[1] + 5.0:
            return self._own_report[2]
        size = (len(s.roster) + 7) // 8
        up = bits.to_bytes(size, "little")
        stated = s.state(ViewReport(s.roster.short(s.me), s.boot, s.number(), s.roster.digest, up))
        self._own_report = (bits, s.now, stated)
        return stated

    def reported(self, stated: Stated, report: ViewReport, via: NodeId) -> bool:
        """A view report arrived. True if this node is reported as not up and should refute now."""
        s = self._s
        if report.roster != s.roster.digest or stated.signer == s.me or report.boot < s.view.rank(stated.signer)[0]:
            return False
        rank = (report.boot, report.number)
        if rank < self._report_numbers.get(stated.signer, (0, 0)):
            return False
        seen_before = rank == self._report_numbers.get(stated.signer)
        self._report_numbers[stated.signer] = rank
        theirs, mine = int.from_bytes(report.up, "little"), s.view.bits()
        lost_here = theirs & ~mine
        lost_there = mine & ~theirs
        massive = max(lost_here.bit_count(), lost_there.bit_count()) >= s.params.report_mass
        if via == stated.signer and lost_there.bit_count() >= s.params.report_mass:
            self.tell_back(via)
        if lost_here and not seen_before:
            self._witness(stated, theirs, mine)
        index = s.roster.index(s.me)
        if index is None or theirs >> index & 1:
            return False
        if not massive:
            return True
        if self._contested_at is None or s.now > self._contested_at + 30.0:
            self._contested_at = s.now
            if s.now < s.born_at + s.params.report_age_s:
                # Reports bring back the life that was thought dead; of a newcomer's present one only itself can tell.
                return True
        return s.now > self._contested_at + s.params.heal_wait_s

    def tell_back(self, peer: NodeId) -> None:
        """The peer lost many that are up here: it needs this node's report as one of its witnesses."""
        s = self._s
        if s.now >= self._told.get(peer, -1e9) + TELL_PAUSE_S and self._may_report():
            self._told[peer] = s.now
            s.send(peer, Gossip([self._report().blob]))

    def _witness(self, stated: Stated, theirs: int, mine: int) -> None:
        s = self._s
        fresh = s.now - s.params.report_fresh_s
        self._reports = {signer: held for signer, held in self._reports.items() if held[0] > fresh}
        if len(self._reports) >= REPORTS_MAX:
            return
        self._reports[stated.signer] = (s.now, theirs)
        s.gossip(("report", stated.signer), stated, REPORT_LIFETIME_S, factor=0.7)
        # Bit-parallel counting: `reached[i]` has the members that at least i + 1 witnesses call up.
        reached = [0] * s.params.witnesses_max
        for _, bits in self._reports.values():
            for level in range(s.params.witnesses_max - 1, 0, -1):
                reached[level] |= reached[level - 1] & bits
            reached[0] |= bits
        for member in members_in(reached[-1] & ~mine, s.roster):
            if member in s.view.down and self._is_seen_since(member, s.view.down[member].since):
                self.revive(member)

    def _is_seen_since(self, member: NodeId, since: float) -> bool:
        """Whether enough witnesses call it up who must have known of this death.

        While many come and go, reports are always on their way, and those made before a death call the dead up.
        """
        index = self._s.roster.index(member)
        if index is None:
            return False
        later = (bits for at, bits in self._reports.values() if at >= since + REPORT_LAG_S)
        return sum(bits >> index & 1 for bits in later) >= self._s.params.witnesses_max

    def revive(self, member: NodeId) -> None:
        """Up again in the incarnation it was thought dead in."""
        s = self._s
        self._suspicions.overrule(member, s.view.down[member].proof)
        s.view.set_up(s.view.known[member], s.now)
        s.publish(peer_up(s.view, member))

    def still_alive(self, stated: Stated, alive: Alive) -> None:
        """An Alive statement of a rank already known: it overrules a private verdict or mere ignorance, no other."""
        down = self._s.view.down.get(stated.signer)
        if down is not None and not down.proof and (alive.boot, alive.incarnation) == self._s.view.rank(stated.signer):
            self.revive(stated.signer)

    def forget(self, peer: NodeId) -> None:
        """Evicted."""
        for table in (self._told, self._reports, self._report_numbers, self._compared):
            table.pop(peer, None)
