"""Accusations, and the verdicts that they add up to.

An accusation is one signed witness. A death is believed once enough distinct members accuse the same incarnation and
the accused had time to refute. The first accusation makes about a dozen nodes look for themselves at once, so that
independent witnesses, not a long timer, carry the verdict.
"""

from protocol.ids import NodeId
from protocol.membership.events import PeerCleared, PeerDown, PeerSuspected
from protocol.membership.probing import Probing
from protocol.membership.state import State
from protocol.wire.messages import Accusation, Gossip
from protocol.wire.statements import Stated

ACCUSATION_LIFETIME_S = 5.0
CONSUMED_MAX = 4096
CONSUMED_S = 30.0  # who was overruled by mistake is accused anew by then: nobody else would ever look for it


class _Suspicion:
    __slots__ = ("accusers", "answered", "first_at", "rank")

    def __init__(self, first_at: float, rank: tuple[int, int]) -> None:
        self.first_at = first_at
        self.rank = rank
        self.accusers: dict[NodeId, Stated] = {}
        self.answered = False  # a probe of this node since: it saw for itself


class Suspicions:
    """Who is accused by whom."""

    def __init__(self, state: State) -> None:
        self._s = state
        self._suspicions: dict[NodeId, _Suspicion] = {}
        # Accusations that a mass resurrection overruled: they must not kill again. target -> until, {(accuser, number)}
        self._consumed: dict[NodeId, tuple[float, frozenset[tuple[NodeId, int]]]] = {}
        self.probing: Probing = Probing(state, self.accuse, self.seen)

    def suspects(self) -> list[NodeId]:
        """Members accused and still up."""
        return list(self._suspicions)

    def accusations(self, target: NodeId) -> tuple[Stated, ...]:
        """The accusations against a suspect or a dead member."""
        suspicion = self._suspicions.get(target)
        if suspicion is not None:
            return tuple(suspicion.accusers.values())
        down = self._s.view.down.get(target)
        return down.proof if down is not None else ()

    def accuse(self, target: NodeId) -> None:
        """This node's own probe failed in earnest."""
        s = self._s
        if target not in s.view.up:
            return
        suspicion = self._suspicions.get(target)
        if suspicion is not None and (s.me in suspicion.accusers or self._abundant(target, suspicion)):
            return
        boot, incarnation = s.view.rank(target)
        body = Accusation(s.roster.short(s.me), s.boot, s.number(), s.roster.short(target), boot, incarnation)
        self.add(target, s.state(body), body)

    def seen(self, target: NodeId) -> None:
        """This node's own probe was answered."""
        suspicion = self._suspicions.get(target)
        if suspicion is not None:
            suspicion.answered = True

    def heard(self, stated: Stated, body: Accusation) -> bool:
        """Somebody's accusation arrived. True if it concerns a member that counts as up here and was worth telling."""
        s = self._s
        target = s.roster.node(body.target)
        if (
            target is None
            or target not in s.view.up
            or (body.target_boot, body.target_incarnation) != s.view.rank(target)
        ):
            return False
        if stated.signer == target or stated.signer not in s.view.up:
            # Witnesses are nodes that this one is in touch with: k is counted among those.
            return False
        until, consumed = self._consumed.get(target, (0.0, frozenset()))
        if s.now < until and (stated.signer, body.number) in consumed:
            # Somebody still believes what witnesses overruled here. Only the accused can settle it: by refuting.
            s.send(target, Gossip([stated.blob]))
            return False
        return self.add(target, stated, body)

    def add(self, target: NodeId, stated: Stated, body: Accusation) -> bool:
        """Count one witness against a member that is up."""
        s = self._s
        suspicion = self._suspicions.get(target)
        if suspicion is None:
            suspicion = self._suspicions[target] = _Suspicion(s.now, (body.target_boot, body.target_incarnation))
            s.publish(PeerSuspected(target, stated.signer))
            s.timer(s.now + s.params.suspicion_floor_s, "suspect", target)
        if stated.signer in suspicion.accusers:
            return False
        was_abundant = self._abundant(target, suspicion)
        suspicion.accusers[stated.signer] = stated
        if not was_abundant:
            s.gossip(("accusation", target, stated.signer), stated, ACCUSATION_LIFETIME_S)
            self._verify(target, stated)
        if s.now >= suspicion.first_at + s.params.suspicion_floor_s:
            self._conclude(target, suspicion)
        return True

    def _verify(self, target: NodeId, stated: Stated) -> None:
        """Look for oneself, with a probability that makes about `verifiers` nodes do so in a mesh of any size."""
        s = self._s
        if stated.signer != s.me and s.rng.random() * len(s.view.peers) < s.params.verifiers:
            self.probing.probe(target, stated)

    def _abundant(self, target: NodeId, suspicion: _Suspicion) -> bool:
        """One witness more than needed is passed on: a node that gossip cost one of them must not be left waiting."""
        return len(suspicion.accusers) > self._s.witnesses_needed(target)

    def _complete(self, target: NodeId, suspicion: _Suspicion) -> bool:
        return len(suspicion.accusers) >= self._s.witnesses_needed(target)

    def due(self, target: NodeId) -> None:
        """The suspicion's timer fired: time to refute is over, or the accusations lapsed."""
        s = self._s
        suspicion = self._suspicions.get(target)
        if suspicion is None:
            return
        floor = suspicion.first_at + s.params.suspicion_floor_s
        if s.now < floor:
            # A stall gave everyone accused time anew, in the very event that this timer came with.
            s.timer(floor, "suspect", target)
            return
        if self._conclude(target, suspicion):
            return
        expiry = suspicion.first_at + s.params.suspicion_expiry_s
        if s.now >= expiry:
            self.clear(target)
            s.publish(PeerCleared(target))
        else:
            # Witnesses enough there may be, and gossip missed this node with all of them: it looks until it saw for
            # itself. A member that answers and never refutes would else be probed by all, each second.
            if s.me not in suspicion.accusers and not suspicion.answered:
                self.probing.probe(target, next(iter(suspicion.accusers.values())))
            s.timer(min(expiry, s.now + 1.0), "suspect", target)

    def _conclude(self, target: NodeId, suspicion: _Suspicion) -> bool:
        s = self._s
        if not self._complete(target, suspicion):
            return False
        proof = tuple(suspicion.accusers.values())
        self.clear(target)
        self.probing.forget(target)
        s.broadcasts.discard(("alive", target))
        s.view.set_down(target, proof, s.now)
        s.publish(PeerDown(target, tuple(stated.signer for stated in proof)))
        return True

    def clear(self, target: NodeId) -> None:
        """Drop the suspicion: refuted, concluded, lapsed, left or evicted."""
        suspicion = self._suspicions.pop(target, None)
        if suspicion is not None:
            self._s.cancel("suspect", target)
            for accuser in suspicion.accusers:
                self._s.broadcasts.discard(("accusation", target, accuser))

    def dismiss(self, witness: NodeId) -> None:
        """What a node that left or was evicted said of others counts no more. Verdicts already reached stand."""
        for target, suspicion in list(self._suspicions.items()):
            self._withdraw(witness, target, suspicion)

    def _withdraw(self, witness: NodeId, target: NodeId, suspicion: _Suspicion) -> None:
        """Take one witness away, and the suspicion with the last."""
        if suspicion.accusers.pop(witness, None) is None:
            return
        self._s.broadcasts.discard(("accusation", target, witness))
        if not suspicion.accusers:
            self.clear(target)
            self._s.publish(PeerCleared(target))

    def overrule(self, target: NodeId, proof: tuple[Stated, ...]) -> None:
        """Witnesses say that the dead one is up: these accusations are used up."""
        if len(self._consumed) >= CONSUMED_MAX:
            del self._consumed[next(iter(self._consumed))]
        numbers = ((stated.signer, stated.body.number) for stated in proof if isinstance(stated.body, Accusation))
        self._consumed[target] = (self._s.now + CONSUMED_S, frozenset(numbers))

    def restart(self) -> None:
        """This node did not run for a while: withdraw its own accusations, and give everyone accused time anew."""
        s = self._s
        for target, suspicion in list(self._suspicions.items()):
            self._withdraw(s.me, target, suspicion)
            if suspicion.accusers:
                suspicion.first_at, suspicion.answered = s.now, False
                s.timer(s.now + s.params.suspicion_floor_s, "suspect", target)
