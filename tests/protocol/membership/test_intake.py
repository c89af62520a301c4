"""Statements by the thousand over a link: verified a few at a time, forged ones hardly at all, split into frames."""

from time import process_time

import msgspec
import pytest

from protocol.effects import FrameReceived, TimerFired
from protocol.membership.events import ForgeryCut
from protocol.membership.healing import REPLY_STATEMENTS_MAX, STATEMENTS_PER_REPLY
from protocol.membership.intake import (
    INTAKE_BURST,
    INTAKE_LOOKED_MAX,
    INTAKE_PAUSE_S,
    INTAKE_PER_PEER_MAX,
    INTAKE_PER_S,
    INTAKE_SLICE,
    Intake,
)
from protocol.wire import limits
from protocol.wire.messages import Alive, ViewOffer, ViewReply
from protocol.wire.statements import FORGED_MAX, FORGED_WINDOW_S, Forgers
from tests.protocol.membership.parts import Subject
from tests.protocol.test_node import Hubs
from tests.support.hub import BOOT, Mesh, links

HELD_S = 0.05
INTAKE = ("membership", "intake")


def never(_blob: bytes) -> bool:
    return False


def forged(mesh: Mesh, count: int) -> list[bytes]:
    """Statements in the name of node 2 that it never made."""
    short = mesh.short(2)
    bodies = (Alive(short, BOOT, number, 1, 1, []) for number in range(count))
    return [msgspec.msgpack.encode(body) + bytes(limits.SIGNATURE_BYTES) for body in bodies]


def longest_s(hubs: Hubs, frame: bytes) -> float:
    """For how long at a time node 0 is busy with a frame of node 1, and with what it leaves to do."""
    me, peer = hubs.mesh.id(0), hubs.mesh.id(1)
    began = process_time()
    hubs.take(me, hubs.hub(0).handle(FrameReceived(peer, frame), hubs.now, hubs.wall))
    longest = process_time() - began
    while (me, INTAKE) in hubs.timers:
        hubs.now = max(hubs.now, hubs.timers.pop((me, INTAKE)))
        began = process_time()
        hubs.take(me, hubs.hub(0).handle(TimerFired(INTAKE), hubs.now, hubs.wall))
        longest = max(longest, process_time() - began)
    return longest


def test_a_peer_with_four_thousand_forged_statements_is_cut_after_a_few() -> None:
    hubs = Hubs(3)
    hubs.run(2.0)
    peer, hub = hubs.mesh.id(1), hubs.hub(0)
    frame = msgspec.msgpack.encode(ViewReply(forged(hubs.mesh, 4000), []))
    before = hub.codec.drops["forged"]
    assert longest_s(hubs, frame) < HELD_S
    assert hub.codec.drops["forged"] - before == FORGED_MAX
    assert hubs.closed[hubs.mesh.id(0)] == [peer]
    assert [event for event in hubs.events[hubs.mesh.id(0)] if isinstance(event, ForgeryCut)] == [ForgeryCut(peer)]
    assert longest_s(hubs, frame) < HELD_S
    assert hub.codec.drops["forged"] - before == FORGED_MAX, "for a minute its statements are not even looked at"
    hubs.now += FORGED_WINDOW_S
    assert longest_s(hubs, frame) < HELD_S
    assert hub.codec.drops["forged"] - before == 2 * FORGED_MAX


def test_four_thousand_padded_statements_of_its_own_hold_nobody_up_either() -> None:
    hubs = Hubs(3)
    hubs.run(2.0)
    short = hubs.mesh.short(1)
    blobs = []
    for number in range(1000):
        encoded = msgspec.msgpack.encode(Alive(short, BOOT, number + 1, 1, 1, []))
        blobs.append(hubs.mesh.padded(1, encoded, 1000))
    frame = msgspec.msgpack.encode(ViewReply(blobs, []))
    assert len(frame) < limits.FRAME_BYTES_MAX
    assert longest_s(hubs, frame) < HELD_S
    assert hubs.hub(0).membership.view.rank(hubs.mesh.id(1)) == (BOOT, 1000), "all of them were taken in"
    assert hubs.closed[hubs.mesh.id(0)] == []


def test_forgers_are_counted_apart_and_forgiven() -> None:
    mesh, forgers = Mesh(3), Forgers()
    for step in range(FORGED_MAX - 1):
        forgers.count(mesh.id(1), 10.0 + step)
    assert not forgers.is_barred(mesh.id(1), 20.0)
    assert forgers.take() == []
    forgers.count(mesh.id(1), 20.0)
    assert forgers.is_barred(mesh.id(1), 20.0 + FORGED_WINDOW_S - 0.1)
    assert not forgers.is_barred(mesh.id(1), 20.0 + FORGED_WINDOW_S)
    assert not forgers.is_barred(mesh.id(2), 20.0)
    assert (forgers.take(), forgers.take()) == ([mesh.id(1)], [])
    # A few a minute, as a broken disk might make, never add up.
    for minute in range(100):
        forgers.count(mesh.id(2), 100.0 + minute * FORGED_WINDOW_S)
    assert not forgers.is_barred(mesh.id(2), 100.0 + 99 * FORGED_WINDOW_S)


def test_what_one_peer_sends_delays_only_itself() -> None:
    mesh, intake = Mesh(3), Intake()
    intake.put(mesh.id(1), [b"a%d" % number for number in range(INTAKE_PER_PEER_MAX + 7)])
    intake.put(mesh.id(2), [b"b%d" % number for number in range(10)])
    assert intake.dropped == 7
    taken = intake.take(never, 0.0)
    assert len(taken) == INTAKE_SLICE
    assert sum(peer == mesh.id(2) for peer, _ in taken) == 10
    rest = 0
    while intake:
        rest += len(intake.take(never, 1.0))
    assert rest == INTAKE_PER_PEER_MAX - (INTAKE_SLICE - 10)
    intake.put(mesh.id(1), [b"a"])
    intake.forget(mesh.id(1))
    assert not intake
    assert intake.take(never, 1.0) == []


@pytest.mark.parametrize("long", [False, True])
def test_a_reply_is_split_into_frames_that_fit(long: bool) -> None:
    size = 2 * STATEMENTS_PER_REPLY + 10
    subject = Subject(size)
    for index in range(1, size):
        stated = subject.mesh.alive(index)
        if long:
            blob = subject.mesh.padded(index, stated.blob[: -limits.SIGNATURE_BYTES], limits.STATEMENT_BYTES_MAX)
            stated = stated._replace(blob=blob)
        subject.told(stated, via=index)
    wishes = bytes([1]) * 4 * size
    replies = [reply for _, reply in links(subject.linked(1, ViewOffer(subject.mesh.roster.digest, wishes)), ViewReply)]
    assert [len(reply.statements) for reply in replies] == [STATEMENTS_PER_REPLY, STATEMENTS_PER_REPLY, 10]
    assert [len(reply.wanted) for reply in replies] == [size, 0, 0]
    for reply in replies:
        assert len(msgspec.msgpack.encode(reply)) < limits.FRAME_BYTES_MAX
    again = [subject.mesh.short(2)] * 5000
    asked = [reply for _, reply in links(subject.linked(1, ViewReply([], again)), ViewReply)]
    assert [len(reply.statements) for reply in asked] == [1], "named often is told once"


def test_the_largest_reply_fits_a_frame() -> None:
    largest = ViewReply([bytes(limits.STATEMENT_BYTES_MAX)] * STATEMENTS_PER_REPLY, [bytes(8)] * limits.ROSTER_MAX)
    assert len(msgspec.msgpack.encode(largest)) < limits.FRAME_BYTES_MAX
    assert REPLY_STATEMENTS_MAX <= INTAKE_PER_PEER_MAX


def test_what_hundreds_bring_alike_is_verified_once() -> None:
    """A node that returns to a mesh of 1,000 is told the same by most of it, and must not take minutes to hear it."""
    mesh, intake, held = Mesh(300), Intake(), set[bytes]()
    told = [number.to_bytes(2, "big") for number in range(1000)]
    for peer in range(1, 300):
        intake.put(mesh.id(peer), told)
    rounds = 0
    while intake:
        taken = [blob for _, blob in intake.take(held.__contains__, 0.0)]
        assert len(taken) <= INTAKE_SLICE
        assert not held & set(taken)
        held |= set(taken)
        rounds += 1
    assert held == set(told)
    assert rounds < 100


def test_what_is_no_news_is_passed_over_a_part_at_a_time() -> None:
    """It costs a look each: hundreds of peers with 4,000 each would else hold this node up."""
    mesh, intake, looked = Mesh(5), Intake(), 0

    def is_held(_: bytes) -> bool:
        nonlocal looked
        looked += 1
        return True

    for peer in range(1, 5):
        intake.put(mesh.id(peer), [bytes(8)] * INTAKE_PER_PEER_MAX)
    assert intake.take(is_held, 0.0) == []
    assert INTAKE_LOOKED_MAX <= looked < INTAKE_LOOKED_MAX + INTAKE_SLICE
    assert intake.take(is_held, 0.0) == []
    assert looked == 4 * INTAKE_PER_PEER_MAX
    assert not intake


def test_a_member_that_floods_is_heard_at_a_pace_and_delays_nobody() -> None:
    mesh, intake = Mesh(3), Intake()
    flooder, other = mesh.id(1), mesh.id(2)
    heard, number, seconds = 0, 0, 10.0
    for step in range(int(seconds / INTAKE_PAUSE_S)):
        intake.put(flooder, [b"%d" % (number + more) for more in range(80)])
        number += 80
        if step % 50 == 49:
            # To open another link does not begin the count anew.
            intake.forget(flooder)
            intake.put(flooder, [b"%d" % (number + more) for more in range(80)])
            number += 80
        intake.put(other, [b"of the other %d" % step])
        taken = intake.take(never, step * INTAKE_PAUSE_S)
        assert sum(peer == other for peer, _ in taken) == 1
        heard += sum(peer == flooder for peer, _ in taken)
    assert INTAKE_BURST < heard <= INTAKE_BURST + seconds * INTAKE_PER_S
    while intake:
        seconds += INTAKE_PAUSE_S
        assert 0 < len(intake.take(never, seconds)) <= 2 * INTAKE_PER_S * INTAKE_PAUSE_S, "what waits is not dropped"
