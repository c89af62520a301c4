"""Anti-entropy: what it costs, that it streams in bounded frames, and what lying peers get for it."""

from typing import Any

import msgspec
import pytest

from protocol.effects import Effect, LinkLost, LinkReceived, Persist, SendLink, TimerFired
from protocol.membership.events import PeerDown, PeerUp, Stalled
from protocol.records.collection import Collection
from protocol.records.events import PeerMuted, RecordsParams, RepairCompleted
from protocol.records.machine import REPAIR
from protocol.records.messages import (
    RecordBuckets,
    RecordBusy,
    RecordGrant,
    RecordLeafRequest,
    RecordLeaves,
    RecordParts,
    RecordPush,
    RecordRoot,
    RecordSplit,
    RecordTops,
    RecordTransfer,
)
from protocol.records.record import Body, key_hasher, pack_hash
from protocol.records.repair import STEP
from protocol.records.store import MACHINE, MemoryStore, RowId, row_key
from protocol.wire.limits import FRAME_BYTES_MAX
from tests.protocol.records.test_judge import NOW_HLC, record
from tests.protocol.records.world import MESH, Identity, Machine, World

KEY_HASH = key_hasher(MESH)
AUTHOR = Identity(1)


def row(key: bytes) -> bytes:
    return row_key(RowId("things", KEY_HASH("things", key, b"")))


def unchecked(n: int, value: bytes) -> Persist:
    """A row as a store holds it; nobody verifies it again, so nothing was signed, which is what takes the time."""
    key = b"file/%06d" % n
    body = Body("things", key, value, NOW_HLC + n, AUTHOR.public_key, False)
    return Persist(MACHINE, row(key), bytes(64) + msgspec.msgpack.encode(body))


def signed(n: int, value: bytes) -> Persist:
    made = record(AUTHOR, b"file/%06d" % n, value, NOW_HLC + n)
    return Persist(MACHINE, row(made.key), made.blob)


def pair(stores: list[list[Persist]], **params: Any) -> World:
    filled = iter([MemoryStore() for _ in stores])
    world = World([Collection("things")], store=lambda: next(filled), params=RecordsParams(**params))
    for machine, persists in zip(world.machines.values(), stores, strict=True):
        machine.store.persist(persists)
    world.start()
    only_first_asks(world)
    return world


def only_first_asks(world: World) -> None:
    """The other one never opens a repair, so that what is counted belongs to one of them."""
    for machine in list(world.machines.values())[1:]:
        del machine.timers[REPAIR]


def requests(world: World) -> int:
    return sum(
        world.sent[kind.__name__]
        for kind in (RecordRoot, RecordBuckets, RecordLeafRequest, RecordSplit, RecordTransfer)
    )


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_records_that_differ_in_ten() -> None:
    """The goal: at most 4 round trips and 64 KB, both ways together."""
    value = b"v" * 200
    common = [unchecked(n, value) for n in range(100_000) if n % 10_000]
    apart = [signed(n, value) for n in range(0, 100_000, 10_000)]
    world = pair([common + apart[::2], common + apart[1::2]])
    assert world.run(2, lambda: world.agree() and world[0].records.count("things") == 100_000)
    assert requests(world) == 3 <= 4
    assert sum(world.bytes.values()) <= 64 * 1024
    world.run(1)
    assert world[0].events(RepairCompleted) == [RepairCompleted(world[1].id, 5, 5, 3)]


def test_equal_states_cost_one_round_trip() -> None:
    common = [unchecked(n, b"v") for n in range(1000)]
    world = pair([common, common])
    world.run(1)
    assert world.sent.keys() == {"RecordRoot", "RecordTops"}
    assert sum(world.bytes.values()) / world.sent["RecordRoot"] < 100
    assert world[0].records._repair.fresh.keys() == {world[1].id}


def test_a_newcomer_is_filled_in_bounded_frames_one_request_at_a_time() -> None:
    full = [signed(n, b"v" * 3000) for n in range(1500)]
    world = pair([[], full], repair_interval_min_s=1.0)
    in_flight = []

    def is_done() -> bool:
        in_flight.append(requests(world) - sum(world.sent[k] for k in ("RecordTops", "RecordLeaves", "RecordGrant")))
        return world.agree()

    assert world.run(60, is_done)
    assert max(in_flight) == 1
    assert world.frame_bytes_max <= 512 * 1024 < FRAME_BYTES_MAX
    assert world[0].records.count("things") == 1500


def test_records_of_the_largest_size_move() -> None:
    big = [signed(n, b"v" * 65_536) for n in range(12)]
    world = pair([big[:2], big[2:]])
    assert world.run(20, world.agree)
    assert world.frame_bytes_max < FRAME_BYTES_MAX


def test_many_collections_are_compared_in_the_same_round_trips() -> None:
    names = [f"c{n}" for n in range(20)]
    world = World([Collection(name) for name in names])
    for name in names:
        world.put(world[0], b"k", b"v", name)
    world[0].timers.clear()  # no push
    world.start()
    only_first_asks(world)
    assert world.run(5, lambda: all(world.agree(name) for name in names))
    assert requests(world) == 3


def test_keys_crafted_for_one_bucket_do_not_make_repairs_dear() -> None:
    """A member that grinds keys into one bucket of 4,096 makes it large; then it is compared in salted parts."""
    world = pair([[], []])
    for machine in world.machines.values():
        shelf = machine.records._ledger.shelves["things"]
        for n in range(20_000):
            shelf.put(n << 4, n + 1, NOW_HLC)
    # One real record, in the same bucket, that only one of them has.
    made = next(r for n in range(100_000) if KEY_HASH("things", (r := b"%d" % n), b"") >> 52 == 0)
    missing = record(AUTHOR, made)
    number = RowId("things", KEY_HASH("things", made, b""))
    world[0].records._ledger.keep(missing, number, 0.0, effects := list[Effect]())
    world[0].store.persist(effect for effect in effects if isinstance(effect, Persist))
    assert world.run(5, world.agree)
    assert world.sent["RecordSplit"] == 1
    assert sum(world.bytes.values()) < 64 * 1024


# ---- peers that vanish or are busy ----------------------------------------------------------------------------------


def begun(world: World, machine: Machine) -> RecordRoot:
    """Let the machine open a repair whose messages go nowhere; its first one."""
    peer = world[1] if machine is world[0] else world[0]
    machine.records.handle(PeerUp(peer.id, 1, (), 1, 1), world.now, world.wall(machine))
    effects = machine.records.handle(TimerFired(REPAIR), world.now, world.wall(machine))
    return asked(effects)


def asked(effects: list[Effect]) -> Any:
    (message,) = [effect.message for effect in effects if isinstance(effect, SendLink)]
    return message


def answer(world: World, message: Any) -> list[Effect]:
    return world[0].records.handle(LinkReceived(world[1].id, message), world.now, world.wall(world[0]))


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (lambda world: TimerFired(STEP), "timeout"),
        (lambda world: LinkLost(world[1].id, "cut"), "link_lost"),
        (lambda world: PeerDown(world[1].id, ()), "peer_gone"),
        (lambda world: Stalled(60.0), "stalled"),
    ],
)
def test_a_repair_that_cannot_go_on_is_given_up_and_another_begins(event: Any, why: str) -> None:
    world = World([Collection("things")])
    begun(world, world[0])
    world[0].records.handle(event(world), 0.0, world.wall(world[0]))
    counters = world[0].records.counters
    assert (counters["repairs_failed"], counters[f"repairs_failed_{why}"]) == (1, 1)
    assert isinstance(begun(world, world[0]), RecordRoot)


def test_a_busy_partner_is_asked_the_same_again() -> None:
    world = World([Collection("things")])
    root = begun(world, world[0])
    (timer,) = [e for e in answer(world, RecordBusy(root.session, 1500)) if hasattr(e, "at") and e.key == STEP]
    assert timer.at == 1.5
    assert asked(world[0].records.handle(TimerFired(STEP), 1.5, world.wall(world[0]))) == root


def test_a_peer_that_asks_without_end_gets_its_share_and_no_more() -> None:
    world = World([Collection("things")], params=RecordsParams(serve_bytes_per_s=1_000_000))
    for n in range(200):
        world.put(world[0], b"%d" % n, b"v" * 10_000)
    wanted = {"things": b"".join(pack_hash(KEY_HASH("things", b"%d" % n, b"")) for n in range(200))}
    sent = 0
    for session in range(100):
        reply = asked(answer(world, RecordTransfer(session, [], wanted)))
        sent += sum(len(blob) for blob in reply.records) if isinstance(reply, RecordGrant) else 0
        assert sent <= 1_300_000
    assert isinstance(reply, RecordBusy)
    world.now += reply.wait_ms / 1000
    assert isinstance(asked(answer(world, RecordTransfer(1, [], wanted))), RecordGrant)


# ---- peers that lie -------------------------------------------------------------------------------------------------


def to_leaves(world: World) -> RecordBuckets:
    """Walk a repair down to where the partner is to list buckets."""
    root = begun(world, world[0])
    return asked(answer(world, RecordTops(root.session, {"things": b"\xaa" * 512}, [])))


def test_an_answer_to_nothing_is_stray() -> None:
    world = World([Collection("things")], count=3)
    for message in (RecordTops(1, {}, []), RecordGrant(1, [], 0, 0), RecordBusy(1, 5)):
        answer(world, message)
    root = begun(world, world[0])
    answer(world, RecordTops(root.session ^ 1, {}, []))
    third = LinkReceived(world[2].id, RecordTops(root.session, {}, []))
    world[0].records.handle(third, 0.0, world.wall(world[0]))
    assert world[0].records.counters["stray_answers"] == 5
    # Nor is an answer wanted of one that said it is busy, before it is asked again.
    answer(world, RecordBusy(root.session, 5_000))
    answer(world, RecordTops(root.session, {}, []))
    assert world[0].records.counters["stray_answers"] == 6
    assert world[0].records._repair.fresh == {}


UNSOUND: list[Any] = [
    lambda session: RecordTops(session, {}, []),
    lambda session: RecordGrant(session, [], 0, 0),
    lambda session: RecordParts(session, [], b"", True),
    # Buckets outside the first-level numbers asked for, of a collection not asked for, named twice, or foreign pairs.
    lambda session: RecordLeaves(session, {"other": {1: b""}}, {}, {}),
    lambda session: RecordLeaves(session, {"things": {1: b""}}, {"things": [1]}, {}),
    lambda session: RecordLeaves(session, {}, {"things": [1, 1]}, {}),
    lambda session: RecordLeaves(session, {"things": {1: b"x" * 15}}, {}, {}),
    lambda session: RecordLeaves(session, {"things": {1: b"\xff" * 16}}, {}, {}),
]


@pytest.mark.parametrize("make", UNSOUND)
def test_unsound_lists_end_the_repair_and_are_counted(make: Any) -> None:
    world = World([Collection("things")])
    request = to_leaves(world)
    answer(world, make(request.session))
    counters = world[0].records.counters
    assert (counters["unsound_answers"], counters["repairs_failed_unsound"]) == (1, 1)
    assert world[0].records.count("things") == 0


def test_lists_of_what_does_not_exist_end_and_mute() -> None:
    """Wanted as announced, never delivered: the repair ends after as many questions as there were announcements."""
    world = World([Collection("things")])
    rounds = 0
    while not any(isinstance(e, PeerMuted) for e in world[0].published):
        request = to_leaves(world)
        pairs = b"".join(pack_hash(1 << 52 | n) + b"version!" for n in range(300))
        effects = answer(world, RecordLeaves(request.session, {"things": {1: pairs}}, {}, {}))
        for _ in range(2):
            transfer = asked(effects)
            assert isinstance(transfer, RecordTransfer)
            covered = len(transfer.wanted["things"]) // 8
            effects = answer(world, RecordGrant(transfer.session, [], covered, 0))
            world[0].published += [e.event for e in effects if hasattr(e, "event")]
        rounds += 1
        assert rounds <= 20
    assert world[0].records._repair.fresh == {}
    assert answer(world, RecordRoot(1, {})) == []


def test_a_partner_that_covers_nothing_is_left() -> None:
    world = World([Collection("things")])
    request = to_leaves(world)
    transfer = asked(
        answer(world, RecordLeaves(request.session, {"things": {1: pack_hash(1 << 52) + b"version!"}}, {}, {}))
    )
    answer(world, RecordGrant(transfer.session, [], 0, 0))
    assert world[0].records.counters["repairs_failed_unsound"] == 1


def test_leaving_buckets_out_for_ever_ends_the_repair() -> None:
    world = World([Collection("things")])
    request = to_leaves(world)
    again = asked(answer(world, RecordLeaves(request.session, {}, {"things": list(range(64))}, {})))
    assert isinstance(again, RecordLeafRequest)
    answer(world, RecordLeaves(again.session, {}, {"things": list(range(64))}, {}))
    assert world[0].records.counters["repairs_failed_unsound"] == 1


def test_a_bucket_is_looked_at_once() -> None:
    world = World([Collection("things")])
    request = to_leaves(world)
    effects = answer(world, RecordLeaves(request.session, {"things": {1: b""}}, {"things": [2]}, {}))
    answer(world, RecordLeaves(asked(effects).session, {"things": {1: b""}}, {}, {}))
    assert world[0].records.counters["repairs_failed_unsound"] == 1


def test_records_not_asked_for_are_not_taken_in_a_repair() -> None:
    world = World([Collection("things")])
    request = to_leaves(world)
    announced = record(world.identities[1], b"announced")
    unasked = record(world.identities[1], b"unasked")
    key_hash = KEY_HASH("things", b"announced", b"")
    lists = {key_hash >> 52: pack_hash(key_hash) + b"version!"}
    transfer = asked(answer(world, RecordLeaves(request.session, {"things": lists}, {}, {})))
    answer(world, RecordGrant(transfer.session, [unasked.blob, announced.blob, announced.blob, b"x" * 80], 1, 0))
    assert [r.key for r in world[0].records.scan("things").records] == [b"announced"]
    assert world[0].records.counters["unasked"] == 3


SENSELESS: list[Any] = [
    RecordSplit(1, "things", 1, 5, bytes(8 * 65)),
    RecordSplit(1, "things", 1, 5, bytes(8 * 96)),
    RecordSplit(1, "nowhere", 1, 5, bytes(8 * 64)),
]


@pytest.mark.parametrize("request_", SENSELESS)
def test_senseless_requests_are_counted_and_not_answered(request_: Any) -> None:
    world = World([Collection("things")])
    assert answer(world, request_) == []
    assert world[0].records.counters["senseless_requests"] == 1


def test_requests_about_what_is_not_here_are_answered_with_nothing() -> None:
    world = World([Collection("things")])
    tops = asked(answer(world, RecordRoot(1, {"nowhere": b"x" * 8, "things": b"x" * 8})))
    assert (list(tops.tops), tops.unknown) == (["things"], ["nowhere"])
    leaves = asked(answer(world, RecordBuckets(1, {"nowhere": {0: bytes(512)}, "things": {0: b"x" * 512}})))
    assert leaves == RecordLeaves(1, {"things": dict.fromkeys(range(64), b"")}, {}, {})
    grant = asked(answer(world, RecordTransfer(1, [b"x" * 99], {"nowhere": bytes(8), "things": bytes(16)})))
    assert grant == RecordGrant(1, [], 3, 1)


def test_a_push_is_passed_on_once_and_not_back() -> None:
    world = World([Collection("things")], count=3)
    world.start()
    made = record(world.identities[1])
    for _ in range(3):
        world.feed(world[0], LinkReceived(world[1].id, RecordPush([made.blob])))
    effects = world[0].records.handle(TimerFired(("records", "push")), 0.1, world.wall(world[0]))
    assert [(e.to, e.message) for e in effects if isinstance(e, SendLink)] == [(world[2].id, RecordPush([made.blob]))]


def test_a_burst_of_writes_is_pushed_up_to_the_bound_and_repaired_beyond_it() -> None:
    world = World([Collection("things")], params=RecordsParams(push_bytes_per_s=50_000))
    world.start()
    for n in range(200):
        world.put(world[0], b"%d" % n, b"v" * 1000)
    assert world[0].records.counters["pushes_dropped"] > 100
    assert world.run(20, world.agree)
