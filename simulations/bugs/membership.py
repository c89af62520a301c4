"""Bugs in who is alive: verdicts too cheap, refutations lost, healings forgotten."""

from math import inf
from typing import Any

from protocol.membership import suspicion
from protocol.membership.broadcasts import Broadcasts
from protocol.membership.contact import Contacts
from protocol.membership.healing import Healing
from protocol.membership.machine import Membership
from protocol.membership.own import Own
from protocol.membership.probing import Probing
from protocol.membership.state import State
from protocol.membership.suspicion import Suspicions
from protocol.membership.view import View
from simulations.bugs.bug import Bug, Patches


def _one_witness(patches: Patches) -> None:
    patches.set(State, "witnesses_needed", lambda self, target: 1)


def _accused_counts_itself(patches: Patches) -> None:
    def conclude(self: Any, target: Any, suspicion: Any) -> Any:
        known = self._s.view.known.get(target)
        if known is not None:
            suspicion.accusers.setdefault(target, known)
        return original(self, target, suspicion)

    original = patches.set(Suspicions, "_conclude", conclude)


def _never_refutes(patches: Patches) -> None:
    patches.set(Own, "refute", lambda self: None)


def _suspicion_survives_refutation(patches: Patches) -> None:
    def alive(self: Any, stated: Any, body: Any, *, relay: bool) -> None:
        kept = self._suspicions._suspicions.get(stated.signer)
        original(self, stated, body, relay=relay)
        if kept is not None:
            self._suspicions._suspicions[stated.signer] = kept

    original = patches.set(Membership, "_alive", alive)


def _older_boot_wins(patches: Patches) -> None:
    patches.set(View, "rank", lambda self, peer: (0, 0))


def _old_reports_revive(patches: Patches) -> None:
    patches.set(Healing, "_is_seen_since", lambda self, member, since: True)
    patches.set(suspicion, "CONSUMED_S", inf)


def _newcomers_wait_a_round(patches: Patches) -> None:
    patches.set(Probing, "_admit", lambda self, arrived: None)


def _no_announces(patches: Patches) -> None:
    patches.set(Probing, "announce", lambda self, target: None)
    patches.set(Contacts, "seek", lambda self: None)
    patches.set(Healing, "contact", lambda self, sender: None)


def _goodbye_is_for_ever(patches: Patches) -> None:
    def alive(self: Any, stated: Any, body: Any, *, relay: bool) -> None:
        if stated.signer not in self._s.view.left:
            original(self, stated, body, relay=relay)

    original = patches.set(Membership, "_alive", alive)


def _gossip_without_end(patches: Patches) -> None:
    def add(self: Any, subject: object, blob: bytes, transmits: int, expires: float) -> None:
        original(self, subject, blob, 1_000_000, inf)

    original = patches.set(Broadcasts, "add", add)


def _dead_stay_in_the_list(patches: Patches) -> None:
    def not_up(self: Any, peer: Any, now: float) -> None:
        listed = list(self.peers)
        original(self, peer, now)
        self.peers[:] = listed

    original = patches.set(View, "_not_up", not_up)


def _views_never_compared(patches: Patches) -> None:
    def compare(self: Any, peer: Any, digest: bytes) -> None:
        return

    patches.set(Healing, "compare", compare)
    patches.set(Healing, "contact", lambda self, sender: None)


def _probes_only_the_first(patches: Patches) -> None:
    def tick(self: Any) -> None:
        peers = sorted(self._s.view.peers)[:2]
        for peer in peers:
            if peer not in self._targets:
                self.probe(peer)
                return

    patches.set(Probing, "tick", tick)


def membership_bugs() -> tuple[Bug, ...]:
    """All bugs of this file."""
    return (
        Bug("one-witness", "a single accusation is enough for a death", _one_witness),
        Bug("accused-counts-itself", "the accused's own statement counts as a witness", _accused_counts_itself),
        Bug("never-refutes", "an accused node does not raise its incarnation", _never_refutes),
        Bug(
            "suspicion-survives-refutation",
            "an Alive statement of a higher incarnation does not clear the suspicion",
            _suspicion_survives_refutation,
        ),
        Bug(
            "older-boot-wins",
            "an Alive statement of an older boot or incarnation overrules a newer one",
            _older_boot_wins,
        ),
        Bug("no-announces", "nobody looks for the dead, and they are ignored when they speak", _no_announces),
        Bug("goodbye-is-for-ever", "a node that left and came back is not taken up again", _goodbye_is_for_ever),
        Bug(
            "gossip-without-end",
            "a statement is passed on without end",
            _gossip_without_end,
            "membership",
            16,
            duration_s=24,
        ),
        Bug("dead-stay-in-the-list", "a dead peer stays in the list of peers to sample from", _dead_stay_in_the_list),
        Bug(
            "views-never-compared", "views that differ are not noticed, only gossip carries news", _views_never_compared
        ),
        Bug(
            "old-reports-revive",
            "view reports made before a death undo it, and what they undid stays undone",
            _old_reports_revive,
            "membership",
            150,
            pattern="dense,settled",
            duration_s=60,
        ),
        Bug(
            "newcomers-wait-a-round",
            "who comes up in the middle of a round of probes is probed in the next one",
            _newcomers_wait_a_round,
            "membership",
            300,
            pattern="dense,late",
            duration_s=7,
        ),
        Bug("probes-only-two", "only the first two peers of the list are ever probed", _probes_only_the_first),
    )
