"""The small parts: the fence, the order of candidates, the lease clock, electorates as values, the wire."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.effects import Effect, Persist
from protocol.election.candidates import Candidates, capability_class, rank_key, stability_class
from protocol.election.electorate import Electorate, apply_toggle, founded, offered
from protocol.election.events import Standing
from protocol.election.fence import FENCE_MACHINE, TERM_LEAP_MAX, Fence
from protocol.election.messages import Beacon, ElectorateOffer, ElectorateRequest, Follow, Version
from protocol.election.tally import LeaseClock, Tally
from protocol.ids import NodeId, short_id
from protocol.wire.messages import DatagramMessage, LinkMessage
from tests.protocol.election.bench import IDS
from tests.protocol.election.rosters import SetRoster

A, B, C = IDS[:3]
SHORT = bytes(range(8))


# ---- fence -----------------------------------------------------------------------------------------------------------


def test_the_fence_refuses_older_commands_also_after_a_restart() -> None:
    fence = Fence({})
    admitted, effects = fence.admit(3, B)
    assert admitted
    assert [type(effect) for effect in effects] == [Persist]
    stored = {effect.key: effect.value for effect in effects if isinstance(effect, Persist) and effect.value}
    for term, leader, expected in [
        (3, B, True),
        (3, A, False),
        (2, C, False),
        (0, C, False),
        (3, C, True),
        (4, A, True),
    ]:
        again = Fence(stored)
        assert again.admit(term, leader)[0] is expected, (term, leader)


def test_a_second_command_waits_for_the_first_ones_persist() -> None:
    fence = Fence({})
    _, first = fence.admit(3, B)
    _, second = fence.admit(3, B)
    assert second == first
    fence.persisted(first)
    assert fence.admit(3, B) == (True, [])
    assert all(isinstance(effect, Persist) and effect.machine == FENCE_MACHINE for effect in first)


@pytest.mark.parametrize(
    ("durable", "asked", "obeyed", "waits"),
    [
        (None, (1, A), True, True), (None, (0, A), False, False), (None, (TERM_LEAP_MAX + 1, A), False, False),
        ((3, B), (3, B), True, False), ((3, B), (3, C), True, True), ((3, B), (4, A), True, True),
        ((3, B), (3, A), False, False), ((3, B), (2, C), False, False),
    ],
)  # fmt: skip
def test_what_is_obeyed_is_durable_first(
    durable: tuple[int, NodeId] | None, asked: tuple[int, NodeId], obeyed: bool, waits: bool
) -> None:
    """Killed between the Persist and the work, or before it, the executor obeys nothing older afterwards."""
    disk: dict[bytes, bytes] = {}

    def write(effects: list[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, Persist)
            assert effect.value is not None
            disk[effect.key] = effect.value

    if durable is not None:
        write(Fence({}).admit(*durable)[1])
    fence = Fence(dict(disk))
    admitted, effects = fence.admit(*asked)
    assert (admitted, bool(effects)) == (obeyed, waits)
    # Not durable yet: whoever asks again, of the same coordinator or after a crash, has to wait for it as well.
    assert fence.admit(*asked) == (admitted, effects)
    assert Fence(dict(disk)).admit(*asked) == (admitted, effects)
    write(effects)
    fence.persisted(effects)
    assert fence.admit(*asked) == (admitted, [])
    again = Fence(dict(disk))
    assert again.admit(*asked) == (admitted, [])
    if obeyed:
        assert again.admit(asked[0] - 1, C) == (False, [])


def test_a_refused_command_changes_nothing() -> None:
    fence = Fence({})
    fence.admit(3, B)
    assert fence.admit(2, B) == (False, [])
    assert fence.admit(3 + TERM_LEAP_MAX + 1, B) == (False, [])
    assert fence.term == 3


# ---- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uptime_s", "on_battery", "has_battery", "expected"),
    [
        (10**7, True, True, 0),
        (10**7, False, True, 1),
        (0, False, False, 2),
        (3600, False, False, 3),
        (10**5, False, False, 4),
    ],
)
def test_stability(uptime_s: int, on_battery: bool, has_battery: bool, expected: int) -> None:
    assert stability_class(uptime_s, on_battery=on_battery, has_battery=has_battery) == expected


@pytest.mark.parametrize(
    ("cores", "ram_mb", "expected"), [(1, 64_000, 0), (2, 4096, 1), (4, 8192, 2), (64, 2000, 0), (16, 65_536, 3)]
)
def test_capability(cores: int, ram_mb: int, expected: int) -> None:
    assert capability_class(cores, ram_mb) == expected


def test_classes_go_before_ids_and_the_undescribed_come_last() -> None:
    standings = {A: Standing(A, 4, 0), B: Standing(B, 2, 3), C: Standing(C, 2, 3)}
    order = sorted(IDS, key=lambda node: rank_key(node, short_id(node), standings), reverse=True)
    assert order[:4] == [A, C, B, IDS[-1]]


_steps = st.lists(
    st.tuples(st.sampled_from(("add", "remove", "describe")), st.sampled_from(IDS[:7]), st.integers(0, 2)), max_size=60
)


@given(_steps)
def test_candidates_are_ranked_as_if_sorted_anew_after_every_change(steps: list[tuple[str, NodeId, int]]) -> None:
    me = IDS[3]
    candidates = Candidates(me, short_id(me))
    up: set[NodeId] = set()
    standings: dict[NodeId, Standing] = {}
    for step, node, stability in steps:
        if step == "describe":
            standing = Standing(node, stability, 1)
            assert candidates.describe(standing) == (standings.get(node) != standing)
            standings[node] = standing
        elif step == "add" and node != me:
            candidates.add(node, short_id(node))
            up.add(node)
        elif step == "remove" and node != me:
            candidates.remove(node)
            up.discard(node)
        order = sorted({*up, me}, key=lambda node: rank_key(node, short_id(node), standings), reverse=True)
        assert candidates.better == order.index(me)
        for leader in (None, *order):
            assert candidates.deputies(leader) == tuple(node for node in order if node != leader)[:2]
    assert candidates.up == {node: short_id(node) for node in up}


# ---- the lease clock and the tally -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(-100.0, 100.0)), max_size=20))
def test_the_lease_clock_is_never_slower_than_either_clock(steps: list[tuple[float, float]]) -> None:
    now, wall = 5.0, 1.7e9
    clock = LeaseClock(now, wall)
    for passed, passed_wall in steps:
        before = clock.peek(now, wall)
        now += passed
        wall += passed_wall
        peeked = clock.peek(now, wall)
        assert clock.advance(now, wall) == peeked
        assert peeked - before >= max(passed, passed_wall, 0.0) - 1e-5


def test_the_tally_needs_more_than_half() -> None:
    tally = Tally(0.05)
    voters = [bytes([index] * 8) for index in range(4)]
    electorate = Electorate(Version(1, SHORT, 0), frozenset(voters))
    tally.sent(1, 10.0, 100.0)
    tally.sent(2, 10.0, 102.0)
    tally.heard(A, voters[0], electorate.version, 1)
    tally.heard(B, voters[1], electorate.version, 2)
    assert tally.until(electorate) < 0
    tally.heard(C, voters[2], electorate.version, 2)
    assert tally.until(electorate) == pytest.approx(109.5)
    tally.heard(A, voters[0], electorate.version, 2)
    assert tally.until(electorate) == pytest.approx(111.5)


def test_an_overtaken_answer_takes_nothing_back() -> None:
    tally = Tally(0.05)
    electorate = Electorate(Version(1, SHORT, 3), frozenset({SHORT}))
    tally.sent(1, 10.0, 0.0)
    tally.sent(2, 10.0, 1.0)
    tally.heard(A, SHORT, electorate.version, 2)
    until = tally.until(electorate)
    tally.heard(A, SHORT, Version(1, SHORT, 2), 1)
    assert tally.until(electorate) == until


def test_beats_are_forgotten_when_their_lease_is_over() -> None:
    tally = Tally(0.05)
    for beat in range(1000):
        tally.sent(beat, 6.0, float(beat))
    assert len(tally._beats) <= 7


# ---- electorates -----------------------------------------------------------------------------------------------------


def test_versions_are_ordered_by_term_then_maker_then_number() -> None:
    low, high = bytes(8), bytes([1] * 8)
    versions = [Version(0, low, 9), Version(1, low, 0), Version(1, low, 3), Version(1, high, 0), Version(2, low, 0)]
    assert sorted(versions, reverse=True) == versions[::-1]


def test_toggling_twice_gives_the_same_voters_in_a_higher_version() -> None:
    first = founded(SHORT)
    there = first.toggled(bytes(8))
    back = there.toggled(bytes(8))
    assert back.voters == first.voters
    assert first.version < there.version < back.version


@pytest.mark.parametrize("toggled", [[SHORT]])
def test_a_toggle_that_leaves_nobody_or_has_another_base_is_not_applied(toggled: list[bytes]) -> None:
    held = founded(SHORT)
    assert apply_toggle(held, Version(1, SHORT, 0), held.version, toggled) is None
    assert apply_toggle(held, Version(1, SHORT, 0), Version(0, SHORT, 0), []) is None


def test_an_offer_names_voters_once() -> None:
    electorate = offered(ElectorateOffer(Version(1, SHORT, 0), [SHORT, SHORT]), SetRoster(IDS[:5]))
    assert electorate is not None
    assert electorate.need == 1
    assert electorate.offer(ElectorateRequest(), SetRoster(IDS[:5])).voters == [SHORT]


@given(st.sets(st.sampled_from(IDS)), st.sets(st.sampled_from(IDS), min_size=1))
def test_an_electorate_told_in_bits_of_the_roster_is_the_same(members: set[NodeId], voters: set[NodeId]) -> None:
    roster = SetRoster(sorted(members))
    electorate = Electorate(Version(1, SHORT, 0), frozenset(bytes(short_id(voter)) for voter in voters))
    for request in (ElectorateRequest(), ElectorateRequest(roster.digest)):
        offer = electorate.offer(request, roster)
        assert offered(offer, roster) == electorate
        assert len(offer.voters) == len(voters - members if request.roster else voters)
    changed = SetRoster(sorted({*members, *IDS} - {min(members, default=IDS[0])}))
    if changed.digest != roster.digest:
        assert offered(offer, changed) is None


# ---- the wire --------------------------------------------------------------------------------------------------------

BIG = Version(2**53, b"\xff" * 8, 2**53)


@pytest.mark.parametrize(
    ("message", "union", "bytes_max"),
    [
        (Beacon(2**53, 2**53, 600_000, True, True, BIG, BIG, [SHORT]), DatagramMessage, 140),
        (Follow(2**53, SHORT, 2**53, True, BIG, 2**53, SHORT), DatagramMessage, 100),
        (ElectorateRequest(SHORT), LinkMessage, 16),
        (ElectorateOffer(BIG, [SHORT] * 1000), LinkMessage, 10_100),
        (ElectorateOffer(BIG, [], SHORT, bytes(125)), LinkMessage, 180),
    ],
)
def test_messages_cross_the_wire(message: object, union: Any, bytes_max: int) -> None:
    data = msgspec.msgpack.encode(message)
    assert len(data) <= bytes_max
    assert msgspec.msgpack.decode(data, type=union) == message


@pytest.mark.parametrize(
    "fields",
    [
        [16, 1, 1, 600_001, True, True, [0, bytes(8), 0], [0, bytes(8), 0], []],
        [16, 1, 1, 6000, True, True, [0, bytes(7), 0], [0, bytes(8), 0], []],
        [16, 1, 1, 6000, True, True, [0, bytes(8), 0], [0, bytes(8), 0], [bytes(8), bytes(8)]],
        [17, -1, bytes(8), 1, True, [0, bytes(8), 0], 0, bytes(8)],
        [17, 1, bytes(9), 1, True, [0, bytes(8), 0], 0, bytes(8)],
    ],
)
def test_malformed_messages_are_refused(fields: list[object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=DatagramMessage)
