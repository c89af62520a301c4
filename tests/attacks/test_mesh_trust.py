"""What a member, or one that was, may try on the mesh's trust: keys, tombstones, names, a key that breaks libraries.

Each attack runs against the real hub as it is, and once more with its one defence taken away, where it must succeed.
"""

from typing import Any

import pytest

from protocol.effects import FrameReceived, Publish
from protocol.ids import NodeId, node_id_of
from protocol.records.events import PutRecord, RecordRefused
from protocol.records.messages import RecordPush
from protocol.records.record import plain_record
from protocol.trust.events import KeysChanged
from protocol.trust.roster import Roster
from protocol.trust.statements import TRUST_COLLECTION, admission, eviction, record_key, seal
from protocol.trust.view import Role
from protocol.wire.crypto import SodiumSuite
from protocol.wire.messages import Accusation, Gossip, KeyGrant, Ping
from tests.protocol.trust.parts import Root, node, public_key, seed
from tests.protocol.wire import by_hand
from tests.protocol.wire.hubs import GOSSIP_KEY, Hubs, encode, settled

STRANGE_KEY = KeyGrant(2, seed("the attacker's key"), bytes(8))


# ---- gossip keys ----


@pytest.mark.parametrize("defended", [True, False])
@pytest.mark.parametrize("who", ["stranger", "gone"])
def test_mesh_a_gossip_key_from_no_member_is_not_taken(
    who: str, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that should not stand any more, or never should have, brings a key that the attacker knows."""
    mesh = settled("a", "b", "gone")
    mesh.evict("gone", "b")
    if not defended:
        monkeypatch.setattr(Roster, "__contains__", lambda self, node_id: True)
    mesh.give(mesh["b"], FrameReceived(node(who), encode(STRANGE_KEY)))
    held = mesh["b"].live.keyring.receiving(by_hand.key_id(STRANGE_KEY.key))
    assert (held is not None) is not defended
    assert (mesh["b"].live.drops["stranger"] == 1) is defended


def test_mesh_an_evicted_nodes_key_is_rotated_away_and_dropped() -> None:
    mesh = settled("a", "b", "c", "gone")
    former = mesh["b"].live.keyring.sending()[1]
    mesh.evict("gone", "a", "b", "c")
    mesh.stop("gone")
    mesh.run(90.0)
    for label in ("a", "b", "c"):
        keyring = mesh[label].live.keyring
        assert keyring.sending()[1] != former
        assert keyring.receiving(by_hand.key_id(former)) is None
        assert any(isinstance(event, KeysChanged) for event in mesh[label].published)
    assert mesh["a"].live.keyring.sending() == mesh["c"].live.keyring.sending()


# ---- tombstones ----


class FalseRoot(Root):
    """A member that signs as if its own key were the root's, for the real mesh."""

    def __init__(self, real: Root) -> None:
        super().__init__("liar")
        self.mesh_id = real.mesh_id


@pytest.mark.parametrize("defended", [True, False])
def test_mesh_a_member_cannot_evict(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = settled("a", "b", "liar", "victim")
    if not defended:
        monkeypatch.setattr(SodiumSuite, "verify", lambda self, key, domain, body, signature: True)
    victim = mesh["victim"].node_id
    tombstone = seal(eviction(node_id=victim, evicted_at=1, by=node("liar"), reason="lies"), FalseRoot(mesh.root))
    record = plain_record(collection=TRUST_COLLECTION, key=record_key(victim), value=tombstone)
    mesh.frame("liar", "b", RecordPush([record.blob]))
    assert (victim in mesh["b"].live.roster) is defended
    assert (victim in mesh["b"].up()) is defended
    assert mesh["b"].live.records.counters.get("not_allowed", 0) == (1 if defended else 0)


def test_mesh_a_member_cannot_put_a_real_tombstone_under_anothers_name() -> None:
    """The root's own tombstone of somebody else, filed under the victim's key."""
    mesh = settled("a", "b", "liar", "victim", "gone")
    record = plain_record(
        collection=TRUST_COLLECTION, key=record_key(mesh["victim"].node_id), value=mesh.root.evict("gone")
    )
    mesh.frame("liar", "b", RecordPush([record.blob]))
    assert mesh["victim"].node_id in mesh["b"].live.roster
    assert mesh["b"].live.records.counters["not_allowed"] == 1


def test_mesh_the_roots_tombstone_is_obeyed() -> None:
    """The counterpart: brought by a plain member, it counts."""
    mesh = settled("a", "b", "liar", "victim")
    victim = mesh["victim"].node_id
    record = plain_record(collection=TRUST_COLLECTION, key=record_key(victim), value=mesh.root.evict("victim"))
    mesh.frame("liar", "b", RecordPush([record.blob]))
    assert victim not in mesh["b"].live.roster
    assert victim not in mesh["b"].up()


# ---- case 17 ----


@pytest.mark.parametrize("defended", [True, False])
def test_case_17_a_reused_name_inherits_no_role(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain member joins under the name of an admin."""
    mesh = Hubs("founder", "boss", "namesake", admins=("boss",))
    roster = Roster(root_public_key=mesh.root.public_key, verifier=mesh.root.verifier, statements=mesh.admissions)
    roster.apply(mesh.root.admit("namesake", at=2_000, name="boss"))
    if not defended:
        role = Roster.role

        def role_of_the_name(self: Roster, node_id: NodeId) -> Role | None:
            """Names as identities: the first member of this name is meant."""
            return role(self, min(m for m in self.members() if self.name(m) == self.name(node_id)))

        assert node("boss") < node("namesake")
        monkeypatch.setattr(Roster, "role", role_of_the_name)
    assert roster.name(node("namesake")) == roster.name(node("boss")) == "boss"
    assert roster.role(node("namesake")) == ("member" if defended else "admin")
    assert roster.role(node("boss")) == "admin"


def test_case_17_the_name_of_an_evicted_machine_is_free_for_another() -> None:
    """The tombstone is its key's, not its name's: neither is the newcomer shut out, nor the old machine let in."""
    mesh = settled("a", "b", "gone", "namesake")
    roster = mesh["b"].live.roster
    mesh.evict("gone", "a", "b", "namesake")
    roster.apply(mesh.root.admit("namesake", at=2_000, name="gone"))
    assert roster.standing(public_key("namesake")) == "member"
    assert roster.standing(public_key("gone")) == "evicted"


def test_case_17_a_namesake_cannot_write_anothers_records() -> None:
    """Records belong to keys: the trust statements on a machine are nobody's to rewrite, whatever it is called."""
    mesh = settled("a", "namesake")
    statement = mesh.root.admit("a", at=9_000, role="member", name="namesake")
    forged = statement[:-1] + bytes([statement[-1] ^ 1])
    effects = mesh.give(mesh["namesake"], PutRecord(TRUST_COLLECTION, record_key(node("a")), forged, 5))
    refused = [e.event for e in effects if isinstance(e, Publish) and isinstance(e.event, RecordRefused)]
    assert [event.reason for event in refused] == ["not_allowed"]


# ---- a key that breaks libraries ----

SMALL_ORDER = (1).to_bytes(32, "little")
"""The neutral point. OpenSSL verifies signatures by it, so a machine that brings it can be admitted; libsodium refuses
to agree on a key with it, by an error."""


@pytest.mark.parametrize("defended", [True, False])
@pytest.mark.parametrize("key", [SMALL_ORDER, bytes(32), b"\xff" * 32, b"\x02" + bytes(31)])
def test_mesh_a_member_with_an_unusable_key_stops_nobody(
    key: bytes, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One datagram with its short id, sent by anyone, must not end every agent of the mesh."""
    mesh = settled("a", "b")
    hub = mesh["b"].live
    if not defended:
        monkeypatch.setattr(SodiumSuite, "pair_key", unguarded_pair_key)
    made = admission(public_key=key, name="trap", role="member", admitted_at=1, by=node("a"))
    assert hub.roster.apply(seal(made, mesh.root)) is not None
    trap = by_hand.node_bytes(key)
    head = by_hand.header(by_hand.mesh_bytes(mesh.root.public_key), GOSSIP_KEY.key_id, trap, 5, 1)
    hub.datagrams.learn_boot(node_id_of(key), 5)
    if defended:
        assert mesh.deliver(mesh["b"], head + bytes(60), mesh["a"].address) == []
        assert hub.datagrams.seal(node_id_of(key), [Ping(1, bytes(8))]) is None
        assert hub.datagrams.drops["unusable_key"] == 2
        mesh.tell("a", "b", Gossip([encode(Accusation(trap[:8], 1, 1, trap[:8], 1, 1)) + SMALL_ORDER + bytes(32)]))
        assert hub.codec.drops["forged"] == 1
    else:
        with pytest.raises(Exception, match="Unexpected library error"):
            mesh.deliver(mesh["b"], head + bytes(60), mesh["a"].address)


def unguarded_pair_key(self: SodiumSuite, gossip: bytes, peer: bytes, sender: Any, receiver: Any, boot: int) -> bytes:
    """As it was before this test."""
    return by_hand.Identity(seed("b")).shared_with(peer)
