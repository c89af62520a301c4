"""The keyring among others: rotations lose no datagram, partitions and absences mend, evicted machines are left out."""

import random

import pytest

from protocol.effects import LinkOpened, LinkReceived, Publish, SendLink, SetTimer, TimerFired
from protocol.ids import short_id
from protocol.membership.events import PeerUp
from protocol.trust.events import Coordinating, KeyRefused, KeysChanged, MintKey, PolicyChanged, RotationDue
from protocol.trust.keygiving import GivingParams
from protocol.trust.keyring import Keyring, KeyringParams
from protocol.trust.keys import GossipKey, decode_key, durable_keys, encode_key, key_id_of
from protocol.trust.keysearch import SearchParams
from protocol.trust.policy import Policy
from protocol.wire.datagram import GossipKeys, UnknownKey
from protocol.wire.messages import KeyGrant, KeyRequest
from tests.protocol.trust.keyworld import DAY_S, FIRST, KeyWorld
from tests.protocol.trust.parts import node, seed


def test_it_gives_the_datagram_layer_its_keys() -> None:
    keys: GossipKeys = KeyWorld("a")["a"].keyring
    assert keys.sending() == (FIRST.key_id, FIRST.key)
    assert keys.receiving(FIRST.key_id) == FIRST.key
    assert keys.receiving(b"none") is None


def test_without_a_key_sending_says_what_to_do() -> None:
    world = KeyWorld("a")
    empty = Keyring(me=node("a"), roster=world["a"].roster, rng=random.Random(1), durable={})
    assert empty.start(0, 0)
    with pytest.raises(LookupError, match="found or join"):
        empty.sending()


def test_a_founder_is_asked_for_its_first_key() -> None:
    world = KeyWorld("a")
    member = world["a"]
    member.durable.clear()
    member.start()
    world.coordinate("a")
    assert RotationDue("first") in member.published
    assert member.keyring.keys()[0].epoch == 1


def test_a_rotation_loses_no_datagram_and_everybody_switches() -> None:
    world = KeyWorld("abcdef")
    world.coordinate("a")
    world.run(DAY_S - 1)
    assert world.sending() == {FIRST.key_id}
    world.run(1.5)
    new = world["a"].keyring.keys()[0]
    assert new.epoch == 2
    # Received under at once, sent under only when the others have it.
    assert all(member.keyring.receiving(new.key_id) for member in world.members.values())
    assert world.sending() == {FIRST.key_id}
    world.run(5)
    assert world.sending() == {new.key_id}
    assert world.lost() == []
    assert all(member.keyring.receiving(FIRST.key_id) for member in world.members.values())
    world.run(600)
    assert not any(member.keyring.receiving(FIRST.key_id) for member in world.members.values())
    assert world.lost() == []


def test_who_comes_up_is_given_the_newest_key_unless_it_shows_that_it_has_it() -> None:
    world = KeyWorld("abcd")
    shown = {node("b"): FIRST.key, node("c"): seed("an older key")}
    ring = Keyring(
        me=node("a"), roster=world["a"].roster, rng=random.Random(1), durable=durable_keys([FIRST]), shown=shown.get
    )
    ring.start(0.0, 0.0)
    ring.handle(Coordinating(True), 0.0, 0.0)
    timers = [effect for peer in "bcd" for effect in ring.handle(PeerUp(node(peer), 1, (), 1, 1), 1.0, 1.0)]
    after = 1.0 + GivingParams().after_up_s
    assert timers == [SetTimer(("keys", "grant"), after)]
    effects = ring.handle(TimerFired(("keys", "grant")), after, after)
    assert {effect.to for effect in effects if isinstance(effect, SendLink)} == {node("c"), node("d")}
    # Nor does a link that opens bring it to who has it.
    assert not any(isinstance(effect, SendLink) for effect in ring.handle(LinkOpened(node("b"), 1), after, after))


def test_rotations_come_daily_and_from_the_coordinator_alone() -> None:
    world = KeyWorld("abc")
    world.run(3 * DAY_S)
    assert world.sending() == {FIRST.key_id}
    world.coordinate("b")
    world.run(10)
    world.run(2 * DAY_S)
    assert world["c"].keyring.keys()[0].epoch == 4
    world.coordinate("b", yes=False)
    world.run(3 * DAY_S)
    assert world["c"].keyring.keys()[0].epoch == 4


def test_an_eviction_rotates_at_once_and_the_evicted_machine_gets_nothing() -> None:
    world = KeyWorld("abcd")
    world.coordinate("a")
    world.run(100)
    world.evict("d", told="abc")
    world.run(10)
    new = world["a"].keyring.keys()[0]
    assert world.sending("abc") == {new.key_id}
    assert world["d"].keyring.receiving(new.key_id) is None
    assert world["a"].keyring.receiving(FIRST.key_id) is not None
    world.run(60)
    assert all(world[label].keyring.receiving(FIRST.key_id) is None for label in "abc")
    # It asks for what it hears, and nobody answers.
    world["d"].give(UnknownKey(node("a"), new.key_id, None))
    world.run(20)
    assert any(isinstance(message, KeyRequest) for _, message in world["d"].sent)
    assert world["d"].keyring.receiving(new.key_id) is None
    assert not any(to == node("d") and isinstance(m, KeyGrant) for label in "abc" for to, m in world[label].sent)
    assert world.lost("abc") == []


def test_an_evicted_machine_cannot_make_others_take_its_key() -> None:
    world = KeyWorld("abd")
    world.evict("d", told="ab")
    world["a"].give(LinkReceived(node("d"), KeyGrant(9, seed("of d"), b"\x00" * 8)))
    assert world["a"].keyring.receiving(key_id_of(seed("of d"))) is None


def test_several_evictions_share_a_rotation() -> None:
    world = KeyWorld("abcdefgh")
    world.coordinate("a")
    world.run(100)
    for label in "defgh":
        world.evict(label, told="abc")
        world.run(1)
    world.run(60)
    assert world["a"].keyring.keys()[0].epoch == 3
    assert world.lost("abc") == []


def test_a_missing_coordinator_owes_the_rotation() -> None:
    world = KeyWorld("abc")
    world.run(100)
    world.evict("c", told="ab")
    world.run(100)
    assert world.sending("ab") == {FIRST.key_id}
    world.coordinate("b")
    world.run(20)
    assert world["a"].keyring.keys()[0].epoch == 2
    assert RotationDue("eviction") in world["b"].published


def test_the_debt_survives_a_restart() -> None:
    world = KeyWorld("abc")
    world.run(100)
    world.evict("c", told="ab")
    world.leave("b")
    world.come_back("b")
    world.coordinate("b")
    world.run(20)
    assert world["b"].published.count(RotationDue("eviction")) == 1


def test_both_sides_of_a_partition_rotate_and_the_higher_key_wins() -> None:
    world = KeyWorld("abcdef")
    world.coordinate("a")
    world.split("abc", "def")
    world.coordinate("d")
    world.run(DAY_S + 20)
    left, right = world["a"].keyring.keys()[0], world["d"].keyring.keys()[0]
    assert left.epoch == right.epoch == 2
    assert left.key_id != right.key_id
    world.heal()
    world.run(10)
    assert world.sending() == {max(left, right, key=lambda key: key.rank).key_id}
    # The first datagrams across the old cut may be lost; within a second both keys are known to all.
    healed_at = DAY_S + 20
    assert all(when <= healed_at + 1 for when, _ in world.lost())


def test_a_side_that_rotated_more_often_wins() -> None:
    world = KeyWorld("abcd")
    world.split("ab", "cd")
    world.coordinate("a")
    world.run(DAY_S / 2)
    world.coordinate("c")
    world.run(3 * DAY_S)
    assert world["a"].keyring.keys()[0].epoch >= world["c"].keyring.keys()[0].epoch
    world.heal()
    world.run(10)
    assert len(world.sending()) == 1
    world.run(600)
    lost_late = [when for when, _ in world.lost() if when > 3.5 * DAY_S + 2]
    assert lost_late == []


@pytest.mark.parametrize("rotations", [1, 2, 3, 10])
def test_a_machine_that_was_away_comes_back_unaided(rotations: int) -> None:
    world = KeyWorld("abcde")
    world.coordinate("a")
    world.run(10)
    world.leave("e")
    world.run(rotations * DAY_S)
    world["e"].start()  # Nobody tells it who is up, and nobody is told of it: datagrams alone must do.
    back_at = world.now
    world.run(30)
    assert len(world.sending()) == 1
    world.run(100)
    assert all(when < back_at + 5 for when, _ in world.lost())


def test_the_one_who_is_asked_may_be_gone() -> None:
    world = KeyWorld("abcd")
    world.coordinate("a")
    world.leave("d")
    world.run(DAY_S + 10)
    world["d"].start()
    new_id = world["a"].sending
    world.cut = {frozenset("ad"), frozenset("bd")}
    world["d"].give(UnknownKey(node("a"), new_id, None))
    world.run(15)
    assert world["d"].keyring.receiving(new_id) is not None


def test_forged_headers_cause_few_questions() -> None:
    world = KeyWorld("abcdefgh")
    others = [world[label].id for label in "bcdefgh"]
    for number in range(20_000):
        world["a"].give(UnknownKey(others[number % 7], number.to_bytes(4, "big"), None))
        world.run(0.001)
    asked = [message for _, message in world["a"].sent if isinstance(message, KeyRequest)]
    # 20 s of a flood: no more than one question per peer and five seconds, answers and follow-ups included.
    assert 0 < len(asked) <= 80


def test_a_stranger_causes_none() -> None:
    world = KeyWorld("ab")
    world["a"].give(UnknownKey(node("z"), b"none", None))
    world["a"].give(UnknownKey(node("a"), b"none", None))
    assert world["a"].sent == []


def test_only_members_are_given_keys() -> None:
    world = KeyWorld("ab")
    world["a"].give(LinkReceived(node("z"), KeyRequest(FIRST.key_id)))
    assert world["a"].sent == []
    world["a"].give(LinkReceived(node("b"), KeyRequest(FIRST.key_id)))
    assert world["a"].sent == [(node("b"), FIRST.grant())]


def test_an_opened_link_brings_the_key_once() -> None:
    world = KeyWorld("ab")
    world.open_link("a", "b")
    world.open_link("a", "b")
    assert world["a"].sent == [(node("b"), FIRST.grant())]


def test_a_lost_link_is_tried_again() -> None:
    world = KeyWorld("ab")
    world.run(1)
    world["a"].give(MintKey(seed("by hand")))
    world["b"].running = False
    world.run(2.5)
    world["b"].running = True
    grants = [m for _, m in world["a"].sent if isinstance(m, KeyGrant)]
    assert len(grants) == 1
    world.cut = {frozenset("ab")}
    world.run(0.1)
    world.cut = set()
    world.run(10)
    assert world["b"].keyring.receiving(key_id_of(seed("by hand"))) is not None


def test_a_restart_keeps_the_keys_and_the_age() -> None:
    world = KeyWorld("ab")
    world.coordinate("a")
    world.run(DAY_S / 2)
    world.leave("a")
    world.come_back("a")
    world.coordinate("a")
    world.run(DAY_S / 2 - 1)
    assert world.sending() == {FIRST.key_id}
    world.run(10)
    assert world["b"].keyring.keys()[0].epoch == 2


@pytest.mark.parametrize("jump_s", [-10 * 365 * DAY_S, 14 * 365 * DAY_S])
def test_a_wrong_clock_costs_one_rotation_at_most(jump_s: float) -> None:
    world = KeyWorld("ab")
    world.wall_offset += jump_s
    world.leave("a")
    world.come_back("a")
    world.coordinate("a")
    world.run(DAY_S / 2)
    assert world["a"].keyring.keys()[0].epoch <= 2
    assert world["a"].published.count(RotationDue("age")) <= 1


def test_no_more_keys_are_held_than_the_limit() -> None:
    world = KeyWorld("ab")
    for number in range(20):
        world["a"].give(MintKey(seed(f"by hand {number}")))
        world.run(4)
    assert len(world["a"].keyring.keys()) <= 4
    assert len(world["a"].durable) <= 4
    assert len(world.sending()) == 1


def test_one_member_cannot_flood_the_others_with_keys() -> None:
    world = KeyWorld("ab")
    for number in range(50):
        grant = KeyGrant(2 + number, seed(f"flood {number}"), short_id(node("b")))
        world["a"].give(LinkReceived(node("b"), grant))
    assert world["a"].published.count(KeyRefused(node("b"), "too many keys from one peer")) == 34
    assert len(world["a"].durable) <= 4


def test_an_epoch_from_nowhere_is_refused() -> None:
    world = KeyWorld("ab")
    world["a"].give(LinkReceived(node("b"), KeyGrant(2**53, seed("end of epochs"), short_id(node("b")))))
    assert world["a"].keyring.receiving(key_id_of(seed("end of epochs"))) is None
    assert any(isinstance(event, KeyRefused) for event in world["a"].published)


def test_a_dropped_key_is_not_taken_up_again() -> None:
    world = KeyWorld("ab")
    world.coordinate("a")
    world.run(DAY_S + 700)
    assert world["a"].keyring.receiving(FIRST.key_id) is None
    sent_before = len(world["a"].sent)
    world["a"].give(LinkReceived(node("b"), FIRST.grant()))
    assert world["a"].keyring.receiving(FIRST.key_id) is None
    # Whoever still holds it is behind, and is told the key that counts.
    assert world["a"].sent[sent_before:] == [(node("b"), world["a"].keyring.keys()[0].grant())]


def test_a_minted_key_is_announced_and_a_repeated_one_is_not_minted() -> None:
    world = KeyWorld("a")
    effects = world["a"].keyring.handle(MintKey(seed("x")), 0, 0)
    assert Publish(KeysChanged(FIRST.key_id, (FIRST.key_id, key_id_of(seed("x"))))) in effects
    assert world["a"].keyring.handle(MintKey(seed("x")), 0, 0) == []
    with pytest.raises(ValueError, match="32 bytes"):
        world["a"].keyring.handle(MintKey(b"short"), 0, 0)


def test_a_large_mesh_is_served_at_a_pace() -> None:
    params = KeyringParams(giving=GivingParams(per_tick=2, tick_s=0.5))
    world = KeyWorld("abcdefghijkl", params=params)
    effects = world["a"].keyring.handle(MintKey(seed("x")), 0, 0)
    assert sum(isinstance(effect, SendLink) for effect in effects) == 2
    world["a"].perform(effects)
    world.run(20)
    assert len(world.sending()) == 1
    assert world.lost() == []


def test_keys_do_not_show_themselves() -> None:
    assert FIRST.key.hex() not in repr(FIRST)
    assert str(FIRST.key) not in repr(FIRST)


def test_durable_keys_round_trip_and_noise_is_none() -> None:
    key = GossipKey(7, seed("k"), b"12345678", 5, True)
    assert decode_key(encode_key(key)) == key
    assert decode_key(b"noise") is None
    assert durable_keys([key]) == {key.key_id: encode_key(key)}


def test_search_limits_are_named() -> None:
    assert KeyringParams().search == SearchParams()


def test_the_mesh_says_how_often_the_key_is_replaced() -> None:
    """A new interval counts at once, also for the key that is held."""
    member = KeyWorld("a")["a"]
    ring = Keyring(me=node("a"), roster=member.roster, rng=random.Random(1), durable=durable_keys([FIRST]))
    learnt = FIRST.learnt_ms / 1000
    ring.start(0.0, learnt)
    ring.handle(Coordinating(True), 10.0, learnt)
    due = ring.handle(PolicyChanged(Policy(gossip_key_rotation_s=3600.0)), 20.0, learnt)
    assert SetTimer(("keys", "rotate"), 3600.0) in due
    due = ring.handle(PolicyChanged(Policy(gossip_key_rotation_s=60.0)), 70.0, learnt)
    assert Publish(RotationDue("age")) in due
