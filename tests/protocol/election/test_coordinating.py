"""A coordinator: when it claims, when it is quorate and when not, how it gives way, how the electorate changes."""

import pytest

from protocol.effects import Send
from protocol.election.events import (
    CoordinatorChanged,
    ElectionCalled,
    QuorumChanged,
    Standing,
)
from protocol.election.messages import Beacon, Follow, Version
from protocol.election.parameters import ElectionParameters
from protocol.ids import NodeId, short_id
from protocol.membership.events import Depart, PeerDown, PeerLeft, Stalled
from tests.protocol.election.bench import (
    IDS,
    Bench,
    answer,
    beacon,
    coordinator_of,
    follow,
    of,
    published,
    sent,
    up,
)
from tests.protocol.election.rosters import node_ids

A, B, C, D, E = IDS[:5]


# ---- claiming --------------------------------------------------------------------------------------------------------


def test_a_founder_alone_is_quorate_at_once() -> None:
    bench = Bench(A, [A], settled=False, founder=True)
    assert bench.quorate()
    assert published(bench.first, CoordinatorChanged) == [CoordinatorChanged(1, A, True)]
    assert published(bench.first, QuorumChanged) == [QuorumChanged(True, 1, 1, 1, "1 of 1 voters answer")]


def test_a_founder_alone_is_quorate_at_once_after_a_restart_too() -> None:
    again = Bench(A, [A], settled=False, founder=True).restarted()
    assert again.quorate()
    assert again.machine.term == 2


def test_it_stays_quorate_by_its_own_beats() -> None:
    bench = Bench(A, [A], settled=False, founder=True)
    for _ in range(40):
        bench.wait(0.5)
        assert bench.quorate()


@pytest.mark.parametrize(("me", "earliest", "latest"), [(D, 2.0, 2.0), (C, 2.6, 2.7), (B, 2.8, 2.9), (A, 3.0, 3.1)])
def test_after_a_start_candidates_claim_by_rank(me: NodeId, earliest: float, latest: float) -> None:
    bench = Bench(me, IDS[:4])
    for peer in IDS[:4]:
        if peer != me:
            bench.do(up(peer))
    bench.wait(earliest - 0.01)
    assert not bench.leads()
    bench.wait(latest - earliest + 0.02)
    assert bench.leads()


def test_the_node_that_coordinated_before_its_restart_goes_first() -> None:
    bench = coordinator_of(IDS[:4], answering=2)
    term = bench.machine.term
    again = bench.restarted()
    again.wait(0.99)
    assert not again.leads()
    effects = again.wait(0.02)
    assert published(effects, ElectionCalled) == [ElectionCalled(term + 1, "no coordinator")]


def test_stable_and_capable_goes_before_id() -> None:
    bench = Bench(A, IDS[:4])
    for peer in (B, C, D):
        bench.do(up(peer))
    bench.do(Standing(A, 3, 1))
    bench.do(Standing(C, 3, 0))
    assert bench.machine.deputies == (A, C)
    bench.hear(D, beacon(1))
    bench.wait(2.0)
    bench.do(Standing(D, 0, 0))
    assert bench.leader() == D  # the incumbent stays
    bench.do(PeerDown(D, (B, C)))
    assert bench.leads()  # the best claims at once


def test_the_second_best_waits_and_is_relieved_by_the_bests_beacon() -> None:
    bench = Bench(B, IDS[:4])
    for peer in (A, C, D):
        bench.do(up(peer))
    bench.hear(D, beacon(1))
    bench.wait(2.0)
    bench.do(PeerDown(D, (A, C)))
    bench.wait(0.5)
    bench.hear(C, beacon(2))
    bench.wait(0.2)
    assert bench.leader() == C


def test_the_next_best_claims_at_once_when_the_best_is_down_too() -> None:
    bench = Bench(B, IDS[:4])
    for peer in (A, C, D):
        bench.do(up(peer))
    bench.hear(D, beacon(1))
    bench.wait(2.0)
    bench.do(PeerDown(D, (A, C)))
    assert not bench.leads()
    bench.do(PeerDown(C, (A,)))
    assert bench.leads()


def test_a_coordinator_that_leaves_is_replaced_and_its_leases_are_free() -> None:
    leaving = coordinator_of(IDS[:4], answering=3)
    released = sent(leaving.do(Depart()), Beacon)
    assert {to for to, _ in released} == {A, B, C}
    assert not leaving.quorate()
    assert not leaving.leads()
    leaving.wait(60.0)
    assert not leaving.leads()

    bench = Bench(C, IDS[:4])
    for peer in (A, B, D):
        bench.do(up(peer))
    bench.hear(D, beacon(1))
    bench.wait(2.0)
    bench.hear(D, beacon(1, 2, lease_ms=0))
    assert not bench.leads()
    bench.do(PeerLeft(D))
    assert bench.leads()
    answer(bench, [A, B])
    assert bench.quorate()  # nobody has to wait for a lease


def test_a_claim_that_is_due_after_a_stall_is_put_off() -> None:
    bench = Bench(B, IDS[:4])
    for peer in (A, C, D):
        bench.do(up(peer))
    bench.hear(D, beacon(1))
    bench.wait(2.0)
    bench.do(PeerDown(D, (A, C)))
    bench.now += 60.0
    bench.wall += 60.0
    bench.do(Stalled(60.0))
    bench.wait(0.9)
    assert not bench.leads()


# ---- quorum ----------------------------------------------------------------------------------------------------------


def test_quorate_with_a_majority_and_not_before() -> None:
    bench = coordinator_of(IDS[:5], answering=1)
    assert not bench.quorate()
    answer(bench, [A, B])
    assert bench.quorate()
    assert bench.machine.electorate.version == Version(bench.machine.term, bytes(short_id(E)), 0)


def test_following_without_a_promise_reads_the_electorate_but_makes_no_quorum() -> None:
    bench = coordinator_of(IDS[:3], answering=0)
    term = bench.machine.term
    bench.hear(A, follow(term, C, 1, promised=False))
    version = bench.machine.electorate.version
    assert version.term == term
    bench.hear(A, follow(term, C, 1, promised=False, version=version))
    assert not bench.quorate()
    bench.hear(A, follow(term, C, 1, promised=True, version=version))
    assert bench.quorate()


def test_a_promise_without_the_electorate_makes_no_quorum() -> None:
    bench = coordinator_of(IDS[:3], answering=0)
    bench.hear(A, follow(bench.machine.term, C, 1))
    bench.hear(A, follow(bench.machine.term, C, 1))
    assert not bench.quorate()


def test_promises_count_from_the_sending_of_the_beat() -> None:
    bench = coordinator_of(IDS[:3], answering=0)
    coordination = bench.machine._contest.coordination
    assert coordination is not None
    bench.do(PeerDown(B, (A,)))
    sent_at, beat = bench.now, 1
    bench.wait(1.5)
    term = bench.machine.term
    for _ in range(2):
        bench.hear(A, follow(term, C, beat, version=bench.machine.electorate.version))
    assert bench.quorate()
    wall_at = bench.wall - (bench.now - sent_at)
    counted_s = 0.95 * ElectionParameters().lease_s
    assert bench.machine.is_quorate(sent_at + counted_s - 0.02, wall_at + counted_s - 0.02)
    assert not bench.machine.is_quorate(sent_at + counted_s + 0.01, wall_at + counted_s + 0.01)


def test_the_same_answer_again_lengthens_nothing() -> None:
    bench = coordinator_of(IDS[:3], answering=1)
    for _ in range(16):
        effects = bench.wait(0.5)
        bench.hear(A, follow(bench.machine.term, C, 1, version=bench.machine.electorate.version))
        if published(effects, QuorumChanged):
            break
    assert not bench.quorate()
    lost = published(effects, QuorumChanged)[0]
    assert (lost.quorate, lost.reason) == (False, "1 of 3 voters answer")


def test_an_answer_to_a_beat_never_sent_makes_no_quorum() -> None:
    bench = coordinator_of(IDS[:3], answering=0)
    for _ in range(2):
        bench.hear(A, follow(bench.machine.term, C, 999, version=bench.machine.electorate.version))
    assert not bench.quorate()


@pytest.mark.parametrize(
    ("mono", "wall"),
    [(60.0, 60.0), (0.0, 60.0), (0.0, -3600.0), (60.0, 0.0), (5.0, 3.0e7)],
    ids=["paused", "asleep", "clock set back", "wall clock stood still", "clock set forward"],
)
def test_a_coordinator_that_did_not_run_is_not_quorate(mono: float, wall: float) -> None:
    bench = coordinator_of(IDS[:5], answering=4)
    assert bench.quorate()
    bench.now += mono
    bench.wall += wall
    assert not bench.quorate()  # before any event told the machine
    effects = bench.do(Stalled(60.0))
    assert not bench.quorate()
    assert {to for to, _ in sent(effects, Beacon)} == {A, B, C, D}  # it asks for new promises at once
    answer(bench, [A, B])
    assert bench.quorate()


def test_a_clock_set_back_by_a_little_is_slewing() -> None:
    bench = coordinator_of(IDS[:3], answering=2)
    bench.wall -= 0.05
    assert bench.quorate()


def test_a_coordinator_counts_itself_only_after_its_own_promise_to_another() -> None:
    bench = Bench(C, IDS[:3])
    for peer in (A, B):
        bench.do(up(peer))
    bench.hear(B, beacon(1))
    bench.wait(2.0)
    bench.hear(B, beacon(1, 2))
    bench.do(PeerDown(B, (A,)))
    assert bench.leads()
    answer(bench, [A])
    assert not bench.quorate()
    bench.wait(4.5)
    answer(bench, [A])
    bench.wait(1.6)
    assert bench.quorate()


# ---- giving way and climbing -----------------------------------------------------------------------------------------


def test_a_coordinator_without_quorum_follows_a_higher_ballot_and_says_so_to_its_followers() -> None:
    bench = coordinator_of(IDS[:5], answering=1)
    effects = bench.hear(D, beacon(bench.machine.term + 3))
    assert bench.leader() == D
    released = [send for send in of(effects, Send) if send.to == A]
    assert len(released) == 1
    goodbye, successor = released[0].messages
    assert isinstance(goodbye, Beacon)
    assert goodbye.lease_ms == 0
    assert isinstance(successor, Follow)
    assert successor.leader == short_id(D)
    votes = [vote for to, vote in sent(effects, Follow) if to == D]
    assert [vote.promised for vote in votes] == [True]  # its promise to itself ended with its office


def test_a_quorate_coordinator_climbs_over_higher_ballots_once() -> None:
    bench = coordinator_of(IDS[:5], answering=3)
    term = bench.machine.term
    bench.hear(D, beacon(term + 3))
    bench.hear(A, follow(term, E, 1, version=bench.machine.electorate.version, seen=(term + 7, D)))
    effects = bench.wait(0.21)
    assert [called.term for called in published(effects, ElectionCalled)] == [term + 8]
    assert bench.leader() == E
    assert published(bench.wait(5.0), ElectionCalled) == []


def test_a_coordinator_refused_for_the_sake_of_a_dead_node_claims_again_after_a_while() -> None:
    bench = coordinator_of(IDS[:5], answering=1)
    bench.do(PeerDown(D, (A, B)))
    term = bench.machine.term
    bench.hear(B, follow(term + 4, D, 0, promised=False))
    assert published(bench.wait(1.9), ElectionCalled) == []
    bench.hear(B, follow(term + 4, D, 0, promised=False))  # does not put it off
    effects = bench.wait(0.2)
    assert [called.term for called in published(effects, ElectionCalled)] == [term + 5]


def test_two_that_follow_each_other_do_not_talk_for_ever() -> None:
    """Each names the other as its leader in a different term; at most one answer may come of it."""
    first, second = Bench(A, IDS[:3]), Bench(B, IDS[:3])
    for bench, other in ((first, B), (second, A)):
        bench.do(up(other))
        bench.do(up(C))
    first.hear(B, beacon(3))
    second.hear(A, beacon(2))
    messages = [(B, follow(3, B, 0, promised=False))]
    rounds = 0
    while messages and rounds < 10:
        rounds += 1
        to, message = messages.pop()
        bench, sender = (second, A) if to == B else (first, B)
        messages += [pair for pair in sent(bench.hear(sender, message), Follow) if pair[0] in (A, B)]
    assert rounds < 5


# ---- traffic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 64, 300, 1000])
def test_regular_beacons_stay_under_their_rate(size: int) -> None:
    params = ElectionParameters()
    members = node_ids(size, "many")
    bench = Bench(members[0], members, params=params)
    for peer in members[1:]:
        bench.do(up(peer))
    bench.do(Standing(members[0], 9, 9))
    bench.wait(30.0)
    assert bench.leads()
    beacons = sent(bench.wait(20.0), Beacon)
    lease_s = beacons[0][1].lease_ms / 1000
    assert lease_s == max(params.lease_s, 3 * size / 300)
    assert len(beacons) / 20.0 <= params.beacons_per_s_max * 1.05
    per_peer = len(beacons) / (size - 1)
    assert per_peer >= 20.0 / (lease_s / 3) - 2


def test_answers_in_the_steady_state_cost_no_effects() -> None:
    bench = coordinator_of(IDS[:5], answering=4)
    coordination = bench.machine._contest.coordination
    assert coordination is not None
    version = bench.machine.electorate.version
    for peer in IDS[:4]:
        assert bench.hear(peer, follow(bench.machine.term, E, coordination._beat, version=version)) == []
