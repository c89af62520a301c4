"""A follower's word: what it promises, to whom, for how long, and what survives a restart."""

import msgspec
import pytest

from protocol.effects import Persist, Send, SendLink
from protocol.election.electorate import FOUNDING_VERSION, Ballot
from protocol.election.events import CoordinatorChanged
from protocol.election.machine import Election
from protocol.election.messages import ElectorateOffer, ElectorateRequest, Follow, Version
from protocol.ids import short_id
from protocol.membership.events import PeerDown, PeerLeft
from protocol.trust.events import RosterChanged
from tests.protocol.election.bench import (
    IDS,
    Bench,
    beacon,
    electorate_of,
    follow,
    of,
    published,
    sent,
    up,
)
from tests.protocol.election.rosters import SetRoster

A, B, C, D = IDS[:4]


def follower() -> Bench:
    """A, the worst candidate of four, following D in term 1."""
    bench = Bench(A, IDS[:4])
    for peer in (B, C, D):
        bench.do(up(peer))
    bench.hear(D, beacon(1))
    assert bench.leader() == D
    return bench


def test_a_beacon_is_answered_with_a_promise_and_only_after_it_is_durable() -> None:
    bench = Bench(A, IDS[:4])
    bench.do(up(D))
    effects = bench.hear(D, beacon(3, beat=5))
    kinds = [type(effect) for effect in effects]
    last_persist = len(kinds) - 1 - kinds[::-1].index(Persist)
    assert last_persist < kinds.index(Send)
    assert not any(send.ahead for send in of(effects, Send))
    assert sent(effects, Follow) == [(D, follow(3, D, 5))]
    assert published(effects, CoordinatorChanged) == [CoordinatorChanged(3, D, False)]


def test_the_steady_state_writes_nothing() -> None:
    bench = follower()
    for beat in range(2, 12):
        bench.wait(2.0)
        assert of(bench.hear(D, beacon(1, beat)), Persist) == []


def test_a_new_leader_is_recognised_at_once_but_promised_a_lease_only_after_the_old_one() -> None:
    bench = follower()
    bench.wait(2.0)
    bench.do(PeerDown(D, (B, C)))
    effects = bench.hear(C, beacon(2, beat=7))
    assert bench.leader() == C
    assert sent(effects, Follow) == [(C, follow(2, C, 7, promised=False))]
    effects = bench.wait(3.99)
    assert [answer.promised for _, answer in sent(effects, Follow)] == []
    effects = bench.wait(0.02)
    assert sent(effects, Follow) == [(C, follow(2, C, 7, promised=True))]


def test_the_same_leader_may_be_promised_again_in_a_higher_term_at_once() -> None:
    bench = follower()
    assert sent(bench.hear(D, beacon(2, beat=1)), Follow) == [(D, follow(2, D, 1))]


def test_a_restart_waits_out_the_whole_lease() -> None:
    bench = follower()
    bench.wait(5.0)
    again = bench.restarted()
    again.do(up(C))
    effects = again.hear(C, beacon(2))
    assert [answer.promised for _, answer in sent(effects, Follow)] == [False]
    effects = again.wait(5.98)
    assert not any(answer.promised for _, answer in sent(effects, Follow))
    effects = again.wait(0.04)
    assert [answer.promised for _, answer in sent(effects, Follow)] == [True]


def test_a_restart_keeps_term_leader_and_electorate() -> None:
    bench = follower()
    again = bench.restarted()
    assert again.machine.term == 1
    assert again.machine.electorate == electorate_of(IDS[:4])
    assert again.leader() is None
    nudge = again.do(up(D))
    assert again.leader() == D
    assert sent(nudge, Follow) == [(D, follow(1, D, 0, promised=False))]


def test_a_lower_ballot_is_refused_with_the_higher_one() -> None:
    bench = follower()
    bench.hear(D, beacon(5))
    assert sent(bench.hear(C, beacon(4)), Follow) == [(C, follow(5, D, 0, promised=False))]
    assert bench.leader() == D


def test_in_one_term_the_higher_id_wins() -> None:
    bench = Bench(A, IDS[:4])
    for peer in (B, C):
        bench.do(up(peer))
    bench.hear(B, beacon(2))
    bench.hear(C, beacon(2))
    assert bench.leader() == C
    bench.hear(B, beacon(2, beat=2))
    assert bench.leader() == C


def test_a_quorate_leader_is_not_left_for_a_higher_ballot_that_is_not() -> None:
    bench = follower()
    bench.hear(D, beacon(1, 2, quorate=True))
    effects = bench.hear(C, beacon(4))
    assert bench.leader() == D
    told = dict(sent(effects, Follow))
    assert told[C].leader == short_id(D)
    assert (told[D].seen_term, told[D].seen_leader) == (4, short_id(C))
    # As soon as D is down for this node too, the beacon that waited counts.
    bench.do(PeerDown(D, (B, C)))
    assert (bench.leader(), bench.machine.term) == (C, 4)


def test_a_quorate_higher_ballot_is_followed_whoever_led_before() -> None:
    bench = follower()
    bench.hear(D, beacon(1, 2, quorate=True))
    bench.hear(C, beacon(4, quorate=True))
    assert bench.leader() == C


def test_a_beacon_of_a_node_that_is_down_waits_until_it_is_up() -> None:
    bench = follower()
    bench.do(PeerDown(C, (B, D)))
    assert sent(bench.hear(C, beacon(9)), Follow) == []
    assert bench.machine.term == 1
    effects = bench.do(up(C))
    assert [to for to, _ in sent(effects, Follow)] == [C]
    assert (bench.leader(), bench.machine.term) == (C, 9)


def test_a_term_out_of_all_proportion_is_ignored() -> None:
    bench = follower()
    assert bench.hear(C, beacon(2**40)) == []
    assert bench.hear(C, follow(1, D, 0, seen=(2**50, C))) == []
    bench.do(PeerDown(D, (B, C)))
    bench.wait(5.0)
    assert bench.machine.term < 10


def test_messages_of_strangers_do_nothing() -> None:
    bench = follower()
    assert bench.hear(IDS[8], beacon(7)) == []
    assert bench.link(IDS[8], ElectorateRequest()) == []


def test_a_released_lease_is_free_at_once() -> None:
    bench = follower()
    bench.hear(D, beacon(1, 2, lease_ms=0))
    effects = bench.hear(C, beacon(2))
    assert [answer.promised for _, answer in sent(effects, Follow)] == [True]


def test_an_old_release_does_not_end_a_later_promise_to_the_same_leader() -> None:
    bench = follower()
    bench.hear(D, beacon(2, 1))
    bench.hear(D, beacon(1, 9, lease_ms=0))
    bench.do(PeerLeft(D))
    effects = bench.hear(C, beacon(3))
    assert [answer.promised for _, answer in sent(effects, Follow)] == [False]


def test_a_silent_leader_is_reminded_and_not_deposed() -> None:
    bench = follower()
    effects = bench.wait(30.0)
    assert {answer.beat for _, answer in sent(effects, Follow)} == {0}
    assert bench.leader() == D


def test_an_evicted_leader_leaves_a_vacancy() -> None:
    bench = follower()
    bench.roster.merge(SetRoster([], [D]))
    bench.do(RosterChanged(removed=(D,)))
    assert bench.leader() is None
    bench.wait(5.0)
    assert bench.leads()


# ---- electorates -----------------------------------------------------------------------------------------------------


def test_one_step_is_taken_from_the_beacon() -> None:
    bench = follower()
    stamp = Version(1, bytes(short_id(D)), 0)
    effects = bench.hear(D, beacon(1, 2, version=stamp, base=FOUNDING_VERSION))
    assert bench.machine.electorate.voters == electorate_of(IDS[:4]).voters
    assert [answer.version for _, answer in sent(effects, Follow)] == [stamp]
    next_stamp = Version(1, bytes(short_id(D)), 1)
    bench.hear(D, beacon(1, 3, version=next_stamp, base=stamp, toggled=[IDS[6]]))
    assert bench.machine.electorate.voters == electorate_of([*IDS[:4], IDS[6]]).voters
    bench.hear(D, beacon(1, 4, version=Version(1, bytes(short_id(D)), 2), base=next_stamp, toggled=[A]))
    assert bench.machine.electorate.voters == electorate_of([B, C, D, IDS[6]]).voters


def test_more_than_one_step_is_asked_for_and_stated_when_it_came() -> None:
    bench = follower()
    stamp = Version(1, bytes(short_id(D)), 4)
    effects = bench.hear(D, beacon(1, 2, version=stamp, base=Version(1, bytes(short_id(D)), 3), toggled=[B]))
    assert of(effects, SendLink) == [SendLink(D, ElectorateRequest(bench.roster.digest))]
    assert [answer.version for _, answer in sent(effects, Follow)] == [FOUNDING_VERSION]
    assert of(bench.hear(D, beacon(1, 3, version=stamp, base=stamp)), SendLink) == []  # not twice in a row
    effects = bench.link(D, ElectorateOffer(stamp, [bytes(short_id(A)), bytes(short_id(D))]))
    assert [(answer.version, answer.promised) for _, answer in sent(effects, Follow)] == [(stamp, True)]
    assert bench.machine.electorate.need == 2


@pytest.mark.parametrize(
    ("peer", "version"),
    [
        (C, Version(1, bytes(short_id(D)), 9)),  # not from the leader
        (D, Version(1, bytes(short_id(C)), 9)),  # not the leader's own
        (D, Version(0, bytes(8), 9)),  # of another ballot
    ],
)
def test_any_other_electorate_is_refused(peer: str, version: Version) -> None:
    bench = follower()
    held = bench.machine.electorate
    assert bench.link(next(n for n in IDS if n == peer), ElectorateOffer(version, [bytes(short_id(D))])) == []
    assert bench.machine.electorate == held


def test_who_does_not_vote_does_not_ask() -> None:
    bench = follower()
    stamp = Version(1, bytes(short_id(D)), 4)
    assert of(bench.hear(D, beacon(1, 2, voter=False, version=stamp, base=stamp)), SendLink) == []


def test_an_electorate_is_offered_to_who_asks() -> None:
    bench = follower()
    for request in (ElectorateRequest(), ElectorateRequest(bench.roster.digest)):
        effects = bench.link(C, request)
        assert of(effects, SendLink) == [SendLink(C, electorate_of(IDS[:4]).offer(request, bench.roster))]


def test_an_electorate_told_by_bits_of_another_roster_is_not_taken() -> None:
    bench = follower()
    stamp, held = Version(1, bytes(short_id(D)), 4), bench.machine.electorate
    assert bench.link(D, ElectorateOffer(stamp, [], bytes(8), b"\xff")) == []
    assert bench.machine.electorate == held
    bench.link(D, ElectorateOffer(stamp, [], bench.roster.digest, b"\xff"))
    assert bench.machine.electorate.version == stamp


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_damaged_storage_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        Bench(A, IDS[:4], durable={b"ballot": b"\xc1"})


def test_the_ledger_never_goes_back() -> None:
    bench = follower()
    ledger = bench.machine._ledger
    with pytest.raises(ValueError, match="only rise"):
        ledger.follow(Ballot(0, bytes(8)))
    with pytest.raises(ValueError, match="only rise"):
        ledger.hold(ledger.held)
    assert isinstance(bench.machine, Election)
