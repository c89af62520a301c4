"""How a coordinator reads the electorate, changes it voter by voter, and what an operator may do when it is lost."""

import pytest

from protocol.effects import SendLink
from protocol.election.events import (
    ElectorateChanged,
    ForgetLost,
    ForgetLostDone,
    ForgetLostRefused,
)
from protocol.election.messages import ElectorateOffer, ElectorateRequest, Version
from protocol.ids import NodeId, short_id
from protocol.membership.events import PeerDown
from protocol.trust.events import RosterChanged
from tests.protocol.election.bench import (
    IDS,
    Bench,
    answer,
    coordinator_of,
    electorate_of,
    evict,
    follow,
    of,
    published,
    up,
)
from tests.protocol.election.rosters import SetRoster

A, B, C, D, E = IDS[:5]


# ---- the electorate --------------------------------------------------------------------------------------------------


def test_a_higher_electorate_is_asked_for_before_anything_counts() -> None:
    bench = coordinator_of(IDS[:3], answering=0)
    term = bench.machine.term
    higher = Version(1, bytes(short_id(B)), 5) if term > 1 else Version(0, bytes(8), 7)
    effects = bench.hear(A, follow(term, C, 1, version=higher))
    assert of(effects, SendLink) == [SendLink(A, ElectorateRequest(bench.roster.digest))]
    voters = [bytes(short_id(node)) for node in (A, B, C, D)]
    bench.link(A, ElectorateOffer(higher, voters))
    assert bench.machine.electorate.version == higher  # 2 of 4 follow: still no majority of it
    bench.hear(B, follow(term, C, 1))
    assert bench.machine.electorate == electorate_of([A, B, C, D]).restamped(bench.machine.electorate.ballot)
    assert bench.machine.electorate.version.term == term


def test_newcomers_are_added_one_at_a_time_each_when_a_majority_took_up_the_last() -> None:
    bench = Bench(E, IDS[:5], settled=False)
    bench = Bench(E, [E], settled=False, founder=True)
    bench.roster.merge(SetRoster(IDS[:5]))
    bench.do(RosterChanged(admitted=tuple(IDS[:4])))
    for peer in IDS[:4]:
        bench.do(up(peer))
    term, version = bench.machine.term, bench.machine.electorate.version
    for peer in IDS[:4]:
        coordination = bench.machine._contest.coordination
        assert coordination is not None
        bench.hear(peer, follow(term, E, coordination._beat, version=Version()))
    assert bench.machine.electorate.voters == electorate_of([A, E]).voters
    assert bench.quorate()  # the founder alone still counts: A has not taken it up
    bench.do(PeerDown(D, (A,)))
    changes: list[ElectorateChanged] = []
    for _ in range(6):
        version = bench.machine.electorate.version
        for peer in IDS[:3]:
            changes += published(bench.hear(peer, follow(term, E, 1, version=version)), ElectorateChanged)
        bench.wait(0.01)
        assert bench.quorate()
    assert bench.machine.electorate.voters == electorate_of([A, B, C, E]).voters
    assert [change.voters for change in changes] == [2, 3, 4]


def test_a_change_that_nobody_takes_up_is_taken_back() -> None:
    bench = Bench(E, [E], settled=False, founder=True)
    bench.roster.merge(SetRoster([A, E]))
    bench.do(RosterChanged(admitted=(A,)))
    bench.do(up(A))
    bench.hear(A, follow(1, E, 2, version=Version()))
    assert len(bench.machine.electorate.voters) == 2
    bench.do(PeerDown(A, ()))
    bench.wait(6.0)
    assert bench.quorate()
    assert len(bench.machine.electorate.voters) == 1
    assert bench.machine.electorate.version.number == 2


def test_an_evicted_voter_leaves_the_electorate() -> None:
    bench = coordinator_of(IDS[:5], answering=4)
    evict(bench, B)
    assert bench.machine.electorate.voters == electorate_of([A, C, D, E]).voters
    effects = answer(bench, [A, C, D])
    assert [change.removed for change in published(effects, ElectorateChanged)] == [B]


def test_no_removal_is_begun_that_the_rest_cannot_carry() -> None:
    bench = coordinator_of(IDS[:3], answering=1)  # A and C live, B is silent
    assert bench.quorate()
    evict(bench, A)
    assert bench.machine.electorate.voters == electorate_of([A, B, C]).voters


def test_an_evicted_coordinator_resigns() -> None:
    bench = coordinator_of(IDS[:3], answering=2)
    evict(bench, C)
    assert not bench.leads()
    bench.wait(30.0)
    assert not bench.leads()


# ---- the operator's word ---------------------------------------------------------------------------------------------


def test_lost_voters_are_forgotten_on_an_operators_word() -> None:
    bench = coordinator_of(IDS[:5], answering=1)
    evict(bench, B, C, D)
    term = bench.machine.term
    effects = bench.do(ForgetLost((B, C, D)))
    assert published(effects, ForgetLostDone) == [ForgetLostDone((B, C, D), 2)]
    assert bench.machine.term == term + 1
    assert not bench.quorate()
    answer(bench, [A])
    assert bench.quorate()
    assert bench.machine.electorate.voters == electorate_of([A, E]).voters


@pytest.mark.parametrize(
    ("answering", "evicted", "named", "reason"),
    [
        (4, [B], [B], "quorate"),
        (1, [], [B], "evict these nodes first"),
        (1, [B], [], "name voters"),
        (1, [B], [B, IDS[7]], "name voters"),
    ],
)
def test_forgetting_is_refused_with_a_reason(
    answering: int, evicted: list[NodeId], named: list[NodeId], reason: str
) -> None:
    bench = coordinator_of(IDS[:5], answering=answering)
    if evicted:
        bench.roster.merge(SetRoster([], evicted))
    held = bench.machine.electorate
    effects = bench.do(ForgetLost(tuple(named)))
    assert [reason in refused.reason for refused in published(effects, ForgetLostRefused)] == [True]
    assert bench.machine.electorate == held


def test_forgetting_is_refused_at_a_follower() -> None:
    bench = Bench(A, IDS[:3])
    effects = bench.do(ForgetLost((B,)))
    assert "not the coordinator" in published(effects, ForgetLostRefused)[0].reason
