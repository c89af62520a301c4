"""Which records get in: rules, sizes, signatures, order, and what each defence keeps out."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.effects import LinkReceived
from protocol.ids import NodeId
from protocol.records import judge
from protocol.records.collection import Collection, only_admins, only_owner
from protocol.records.events import DeleteRecord, PutRecord, RecordChanged, RecordRefused, RecordsParams
from protocol.records.machine import Records
from protocol.records.messages import RecordPush
from protocol.records.record import Record, plain_record, sign_record
from protocol.trust.statements import TRUST_COLLECTION, TrustRules, admission, eviction, record_key, seal
from tests.protocol.records.world import MESH, ROOT, ROOT_SEED, WALL, Identity, World, public_key_of, suite_of

NOW_HLC = int(WALL * 1000) << 16


def record(author: Identity, key: bytes = b"k", value: bytes = b"v", hlc: int = NOW_HLC, **changes: Any) -> Record:
    fields = {"collection": "things", "deleted": False, **changes}
    return sign_record(author.suite, author.public_key, key=key, value=value, hlc=hlc, **fields)


def push(world: World, *blobs: bytes, sender: int = 1) -> None:
    world.feed(world[0], LinkReceived(world[sender].id, RecordPush(list(blobs))))


def counted(world: World) -> dict[str, int]:
    counters = world[0].records.counters
    return {name: count for name, count in counters.items() if not name.startswith(("repairs", "pushes", "unsound"))}


# ---- what a node writes ---------------------------------------------------------------------------------------------


def test_what_is_put_is_there_and_stored_before_it_is_published() -> None:
    world = World([Collection("things")])
    effects = world.put(world[0], b"k", b"v")
    kinds = [type(effect).__name__ for effect in effects]
    assert kinds.index("Persist") < kinds.index("Publish")
    found = world[0].records.get("things", b"k")
    assert found is not None
    assert (found.value, found.author) == (b"v", world[0].id)
    assert world[0].records.get("things", b"other") is None


def test_what_is_deleted_is_gone_and_says_so() -> None:
    world = World([Collection("things")])
    world.put(world[0], b"k", b"v")
    world.feed(world[0], DeleteRecord("things", b"k", token=7))
    assert world[0].records.get("things", b"k") is None
    assert world[0].records.scan("things").records == ()
    last = world[0].events(RecordChanged)[-1]
    assert (last.deleted, last.token) == (True, 7)


def is_short(key: bytes, value: bytes) -> bool:
    return len(value) < 5


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (PutRecord("nowhere", b"k", b"v", 9), "unknown_collection"),
        (PutRecord("things", b"", b"v", 9), "too_large"),
        (PutRecord("things", b"k" * 513, b"v", 9), "too_large"),
        (PutRecord("things", b"k", b"v" * 101, 9), "too_large"),
        (PutRecord("mine", b"k", b"v", 9), "not_allowed"),
        (DeleteRecord("mine", b"k", 9), "not_allowed"),
        (PutRecord("admins", b"k", b"v", 9), "not_allowed"),
        (PutRecord("proven", b"k", b"too long", 9), "not_allowed"),
        (DeleteRecord("proven", b"k", 9), "never_deleted"),
        (PutRecord("proven", b"k", b"aa", 9), "outranked"),
        (PutRecord("two", b"k3", b"v", 9), "full"),
    ],
)
def test_commands_that_are_refused_change_nothing(command: PutRecord | DeleteRecord, reason: str) -> None:
    rules = [
        Collection("things", value_bytes_max=100),
        Collection("mine", may_write=only_owner),
        Collection("admins", may_write=only_admins),
        Collection("proven", validate=is_short, order=lambda a, b: (a > b) - (a < b)),
        Collection("two", records_max=2),
    ]
    world = World(rules, admins=0)
    for collection, key, value in (("proven", b"k", b"bb"), ("two", b"k1", b"v"), ("two", b"k2", b"v")):
        world.put(world[0], key, value, collection)
    before = [world[0].records.digest(rule.name) for rule in rules]
    effects = world.feed(world[0], command)
    assert [effect.event for effect in effects if hasattr(effect, "event")] == [
        RecordRefused(command.collection, command.key, reason, 9)
    ]
    assert [world[0].records.digest(rule.name) for rule in rules] == before


def test_a_disk_that_falls_behind_makes_writes_wait_but_reads_see_them() -> None:
    world = World([Collection("things")], params=RecordsParams(unstored_bytes_max=1000))
    machine = world[0]
    # Effects that are never performed: nothing reaches the store.
    for n in range(20):
        effects = machine.records.handle(PutRecord("things", b"k%02d" % n, b"v" * 200), 0.0, WALL)
    assert effects[-1].event == RecordRefused("things", b"k19", "overloaded")
    assert [r.key for r in machine.records.scan("things").records] == [b"k00", b"k01", b"k02", b"k03"]
    assert machine.records.get("things", b"k01") is not None


# ---- what others bring: each defence, and that the attack works without it ------------------------------------------


def forged(world: World) -> bytes:
    """Mallory signs as Alice."""
    made = record(world.identities[0], value=b"forged")
    return suite_of(world.identities[1].seed).sign(b"meshnode/record/1\x00", made.blob[64:]) + made.blob[64:]


def from_2040(world: World) -> bytes:
    return record(world.identities[1], hlc=int((WALL + 14 * 365 * 86_400) * 1000) << 16).blob


def by_a_stranger(world: World) -> bytes:
    return record(Identity(99)).blob


def in_anothers_name(world: World) -> bytes:
    return record(world.identities[1], key=world[0].id.encode(), collection="mine").blob


def too_large(world: World) -> bytes:
    return record(world.identities[1], collection="small", value=b"x" * 11).blob


def by_nobody(world: World) -> bytes:
    return plain_record(collection="things", key=b"k", value=b"unsigned").blob


def unproven(world: World) -> bytes:
    return plain_record(collection="proven", key=b"k", value=b"far too long").blob


RULES = [
    Collection("things"),
    Collection("mine", may_write=only_owner),
    Collection("small", value_bytes_max=10),
    Collection("proven", validate=is_short, order=lambda a, b: (a > b) - (a < b)),
]


def no_signature(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(judge, "is_signed", lambda *_: True)
    return {}


def no_bound(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"params": RecordsParams(drift_bound_s=1e12)}


def no_rules(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"collections": [Collection("things"), Collection("mine"), Collection("small"), *RULES[3:]]}


def no_roster(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    class Everyone:
        evicted_at = 2**53

    patch.setattr("protocol.trust.roster.Roster.evicted", lambda *_: Everyone())
    return {}


def no_authority(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(judge.Judge, "_authority", lambda *_: None)
    return {}


ATTACKS: list[tuple[Callable[[World], bytes], str, Callable[[pytest.MonkeyPatch], dict[str, Any]]]] = [
    (forged, "bad_signature", no_signature),
    (from_2040, "held", no_bound),
    (by_a_stranger, "stranger", no_roster),
    (in_anothers_name, "not_allowed", no_rules),
    (too_large, "too_large", no_rules),
    (by_nobody, "malformed", no_authority),
    (unproven, "not_allowed", no_authority),
]


@pytest.mark.parametrize(("attack", "verdict", "_"), ATTACKS, ids=lambda value: getattr(value, "__name__", None))
def test_attacks_are_counted_and_change_nothing(attack: Callable[[World], bytes], verdict: str, _: Any) -> None:
    world = World(RULES)
    push(world, attack(world))
    assert counted(world)[verdict] == 1
    assert not any(world[0].events(RecordChanged))
    assert [world[0].records.count(rule.name) for rule in RULES] == [0] * len(RULES)


@pytest.mark.parametrize(("attack", "_", "without"), ATTACKS, ids=lambda value: getattr(value, "__name__", None))
def test_without_its_defence_each_attack_succeeds(
    attack: Callable[[World], bytes], _: str, without: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above could not fail."""
    changed = without(monkeypatch)
    world = World(changed.get("collections", RULES), params=changed.get("params"))
    push(world, attack(world))
    assert counted(world) == {"applied": 1}
    assert len(world[0].events(RecordChanged)) == 1


def test_an_unknown_collection_is_ignored_and_no_offence() -> None:
    world = World([Collection("things")])
    push(world, *[record(world.identities[1], b"%d" % n, collection="later/2").blob for n in range(100)])
    assert counted(world) == {"unknown_collection": 100}
    push(world, record(world.identities[1]).blob)
    assert world[0].records.get("things", b"k") is not None


def test_a_peer_that_sends_rubbish_is_no_longer_listened_to_for_a_while() -> None:
    world = World([Collection("things")])
    push(world, *[b"rubbish" * 20 + bytes([n]) for n in range(32)])
    good = record(world.identities[1]).blob
    push(world, good)
    assert (counted(world)["from_muted"], world[0].records.count("things")) == (1, 0)
    world.run(61)
    push(world, good)
    assert world[0].records.count("things") == 1


def test_a_hook_that_cannot_read_a_value_refuses_it() -> None:
    def reads(author: NodeId, role: str, key: bytes, value: bytes) -> bool:
        return value.decode("ascii").index("yes") >= 0

    world = World([Collection("things", may_write=reads)])
    author = world.identities[1]
    push(world, *(record(author, value=value).blob for value in (b"\xff", b"no", b"yes")))
    assert counted(world) == {"not_allowed": 2, "applied": 1}


def test_messages_from_outside_the_roster_are_not_read() -> None:
    world = World([Collection("things")])
    good = record(world.identities[1]).blob
    world.feed(world[0], LinkReceived(Identity(99).node_id, RecordPush([good])))
    world.feed(world[0], LinkReceived(world[1].id, "not a message of ours"))
    assert counted(world) == {"from_strangers": 1, "unknown_messages": 1}


def test_a_collection_that_overflows_stops_growing() -> None:
    world = World([Collection("things", records_max=3)])
    push(world, *[record(world.identities[1], b"%d" % n).blob for n in range(10)])
    assert counted(world) == {"applied": 6, "full": 4}
    push(world, record(world.identities[1], b"0", b"newer", NOW_HLC + 1).blob)
    assert counted(world)["applied"] == 7


def test_a_member_that_fills_a_collection_takes_nobody_elses_place() -> None:
    world = World([Collection("things", records_max=8)], count=4)
    flooder, honest = world.identities[1], world.identities[2]
    push(world, *[record(flooder, b"f%d" % n).blob for n in range(40)])
    assert counted(world) == {"applied": 16, "full": 24}
    # Two of eight places are an honest one's share, and as many again what others may have missed.
    push(world, *[record(honest, b"h%d" % n).blob for n in range(6)])
    assert counted(world) == {"applied": 20, "full": 26}
    for number, there in ((0, True), (1, True), (2, False)):
        world.put(world[0], b"own%d" % number, b"v")
        assert (world[0].records.get("things", b"own%d" % number) is not None) is there
    # Who overwrites another's record has it then, and the other has room for one more; also after a start.
    push(world, record(flooder, b"h0", b"mine", NOW_HLC + 1).blob)
    world.run(1)
    world.restart(world[0])
    push(world, *[record(honest, b"more%d" % n).blob for n in range(3)])
    assert world[0].records.count("things") == 16 + 4 + 2 + 1


# ---- which of two counts --------------------------------------------------------------------------------------------


def by_length(a: bytes, b: bytes) -> int:
    return len(a) - len(b)


VARIANTS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 2), st.sampled_from([b"", b"a", b"b", b"longer"]), st.booleans()),
    min_size=1,
    max_size=5,
    unique=True,
)


@given(VARIANTS, st.data(), st.sampled_from([None, by_length]))
def test_merging_is_commutative_associative_and_idempotent(
    variants: list[tuple[int, int, bytes, bool]], data: st.DataObject, order: Any
) -> None:
    """In whatever order and however often versions of a key come, the same one is left."""
    world = World([Collection("things", order=order)], count=3)
    blobs = [
        record(world.identities[who - 1], value=b"" if gone else value, hlc=NOW_HLC + time, deleted=gone).blob
        for who, time, value, gone in variants
    ]
    orders = [data.draw(st.permutations(blobs)) + data.draw(st.lists(st.sampled_from(blobs))) for _ in range(3)]
    for machine, blobs in zip(world.machines.values(), orders, strict=True):
        for blob in blobs:
            sender = next(other for other in world.machines if other != machine.id)
            world.feed(machine, LinkReceived(sender, RecordPush([blob])))
    assert world.agree()


def test_the_last_writer_wins_and_ties_are_settled_alike() -> None:
    for order in itertools.permutations(range(3)):
        world = World([Collection("things")], count=3)
        made = [record(world.identities[n], value=b"%d" % n).blob for n in range(3)]
        push(world, *(made[n] for n in order))
        found = world[0].records.get("things", b"k")
        assert found is not None
        assert found.public_key == max(identity.public_key for identity in world.identities)


def test_each_author_keeps_a_version_of_its_own() -> None:
    world = World([Collection("things", each_author=True)], count=3)
    for n in (0, 1, 2):
        push(
            world,
            record(world.identities[n], value=b"%d" % n, hlc=NOW_HLC + n).blob,
            record(world.identities[n], key=b"kk").blob,
        )
    versions = world[0].records.versions("things", b"k")
    assert {version.value for version in versions} == {b"0", b"1", b"2"}
    newest = world[0].records.get("things", b"k")
    assert newest is not None
    assert newest.value == b"2"
    world.feed(world[0], DeleteRecord("things", b"k"))
    assert {version.value for version in world[0].records.versions("things", b"k")} == {b"1", b"2"}


# ---- values that prove themselves: the statements of the mesh's root ------------------------------------------------


def trust() -> Collection:
    rules = TrustRules(public_key_of(ROOT_SEED), ROOT)
    return Collection(TRUST_COLLECTION, validate=rules.validate, order=rules.order, value_bytes_max=1024)


def test_an_eviction_wins_for_good_whoever_brings_it_and_whenever() -> None:
    gone = Identity(50)
    admitted = [
        seal(admission(public_key=gone.public_key, name="n", role="member", admitted_at=at, by=gone.node_id), ROOT)
        for at in (1, 2**53)
    ]
    out = seal(eviction(node_id=gone.node_id, evicted_at=5, by=gone.node_id), ROOT)
    key = record_key(gone.node_id)
    for statements in itertools.permutations([*admitted, out]):
        world = World([trust()])
        for statement in statements:
            push(world, plain_record(collection=TRUST_COLLECTION, key=key, value=statement).blob)
        found = world[0].records.get(TRUST_COLLECTION, key)
        assert found is not None
        assert (found.value, found.author, found.hlc) == (out, None, 0)


def test_the_same_statement_is_the_same_record_on_every_node() -> None:
    world = World([trust()], count=3)
    statement = world.identities[2].admission
    key = record_key(world.identities[2].node_id)
    for machine in (world[0], world[1]):
        world.put(machine, key, statement, TRUST_COLLECTION)
    assert world[0].records.digest(TRUST_COLLECTION) == world[1].records.digest(TRUST_COLLECTION)


def test_a_proven_value_cannot_be_dressed_up() -> None:
    """A signature, an author, a time or a deletion on it would be one more version of it, made by anyone."""
    world = World([trust()])
    key, value = record_key(world.identities[1].node_id), world.identities[1].admission
    plain = plain_record(collection=TRUST_COLLECTION, key=key, value=value).blob
    signed = record(world.identities[1], key, value, collection=TRUST_COLLECTION).blob
    deleted = record(world.identities[1], key, b"", collection=TRUST_COLLECTION, deleted=True).blob
    push(world, signed, deleted, b"s" * 64 + plain[64:], plain)
    assert counted(world) == {"malformed": 3, "applied": 1}
    forged_value = value[:-1] + bytes([value[-1] ^ 1])
    push(world, plain_record(collection=TRUST_COLLECTION, key=key, value=forged_value).blob)
    assert counted(world)["not_allowed"] == 1


def test_machines_without_membership_write_nothing() -> None:
    world = World([Collection("things")])
    outsider = Identity(99)
    machine = Records(
        me=outsider.node_id,
        mesh_id=MESH,
        roster=world[0].roster,
        collections=[Collection("things")],
        store=world[0].store,
        rng=world.rng,
        suite=outsider.suite,
    )
    (effect,) = machine.handle(PutRecord("things", b"k", b"v"), 0.0, WALL)
    assert effect.event == RecordRefused("things", b"k", "not_a_member")
