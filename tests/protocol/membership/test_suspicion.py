"""Accusations and verdicts: how many witnesses, whose, when, and what makes them void."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.effects import Effect, TimerFired
from protocol.membership.events import PeerCleared, PeerDown, PeerSuspected, PeerUp, RosterShrank, Stalled
from protocol.membership.healing import REPORT_LAG_S
from protocol.membership.parameters import LAN
from protocol.membership.suspicion import CONSUMED_S
from protocol.wire.messages import Accusation, Alive, Gossip, Ping, ViewReport
from tests.protocol.membership.parts import STEADY, Subject
from tests.support.hub import BOOT, events, evicted, sends

FLOOR_S = LAN.suspicion_floor_s


def all_up(size: int, *, heard: int | None = None, seed: int = 1) -> Subject:
    subject = Subject(size, seed=seed)
    subject.know(*range(1, size))
    subject.hear(*range(1, size if heard is None else heard + 1))
    return subject


@pytest.mark.parametrize(("heard", "needed"), [(6, 3), (3, 3), (2, 3), (1, 2), (0, 2)])
def test_how_many_witnesses_by_who_could_be_one(heard: int, needed: int) -> None:
    subject = Subject(8)
    subject.know(*range(1, 8))
    subject.now += LAN.reach_window_s + 1
    subject.hear(*[index for index in range(1, 8) if index != 7][:heard])
    assert subject.machine._s.witnesses_needed(subject.mesh.id(7)) == needed


def test_of_two_nodes_one_witness_is_enough_and_of_three_it_is_not() -> None:
    two, three = all_up(2), all_up(3)
    assert two.machine._s.witnesses_needed(two.mesh.id(1)) == 1
    three.now += 1000.0
    assert three.machine._s.witnesses_needed(three.mesh.id(1)) == 2


def test_enough_witnesses_make_a_verdict_but_not_before_the_floor() -> None:
    subject = all_up(8)
    for by in (2, 3):
        subject.told(subject.mesh.accusation(by, 7), via=by)
    assert subject.down() == set()
    effects = subject.told(subject.mesh.accusation(4, 7), via=4)
    assert events(effects, PeerDown) == [], "the accused has a moment to refute"
    began = subject.timers["membership", "suspect", subject.mesh.id(7)]
    assert began == pytest.approx(1000.0 + FLOOR_S)
    effects = subject.fire("suspect", subject.mesh.id(7))
    verdict = events(effects, PeerDown)
    assert [(down.peer, set(down.witnesses), down.private) for down in verdict] == [
        (subject.mesh.id(7), {subject.mesh.id(by) for by in (2, 3, 4)}, False)
    ]
    assert subject.down() == {7}
    assert subject.machine.suspects() == []
    assert len(subject.machine.view.down[subject.mesh.id(7)].proof) == 3


def test_the_last_witness_after_the_floor_settles_it_at_once() -> None:
    subject = all_up(8)
    for by in (2, 3):
        subject.told(subject.mesh.accusation(by, 7), via=by)
    subject.fire("suspect", subject.mesh.id(7))
    assert subject.down() == set()
    subject.hear(*range(1, 7))
    assert events(subject.told(subject.mesh.accusation(4, 7), via=4), PeerDown) != []


def test_the_same_witness_twice_is_one_witness() -> None:
    subject = all_up(8)
    for number in range(5):
        subject.told(subject.mesh.accusation(2, 7, number=number + 1), via=3)
    subject.told(subject.mesh.accusation(3, 7), via=3)
    subject.fire("suspect", subject.mesh.id(7))
    assert subject.down() == set()


@given(st.lists(st.integers(1, 6), max_size=12), st.integers(0, 2**16))
def test_death_takes_that_many_distinct_witnesses_in_any_order(accusers: list[int], seed: int) -> None:
    subject = all_up(8, seed=seed)
    for by in accusers:
        subject.told(subject.mesh.accusation(by, 7), via=by)
        subject.now += 0.01
    subject.hear(*range(1, 7))
    subject.run(FLOOR_S + 0.5, answering=range(1, 8))
    assert (7 in subject.down()) is (len(set(accusers)) >= LAN.witnesses_max)


@pytest.mark.parametrize("what", ["of an older incarnation", "of an older boot", "by itself", "of one unknown"])
def test_accusations_that_say_nothing(what: str) -> None:
    subject = Subject(8)
    subject.know(*range(1, 7))
    if what == "of an older incarnation":
        subject.told(subject.mesh.alive(6, incarnation=1))
        stated = subject.mesh.accusation(2, 6, incarnation=0)
    elif what == "of an older boot":
        stated = subject.mesh.accusation(2, 6, boot=BOOT - 1)
    elif what == "by itself":
        stated = subject.mesh.accusation(6, 6)
    else:
        stated = subject.mesh.accusation(2, 7)
    assert events(subject.told(stated, via=2), PeerSuspected) == []
    assert subject.machine.suspects() == []


def test_accusations_lapse_without_enough_witnesses() -> None:
    subject = all_up(8)
    subject.told(subject.mesh.accusation(2, 7), via=2)
    effects = subject.run(LAN.suspicion_expiry_s + 0.1, answering=range(1, 8))
    assert events(effects, PeerCleared) == [PeerCleared(subject.mesh.id(7))]
    assert events(effects, PeerDown) == []
    assert subject.machine.suspects() == []
    assert ("membership", "suspect", subject.mesh.id(7)) not in subject.timers


def test_who_missed_the_other_witnesses_looks_for_itself_when_the_floor_is_over() -> None:
    """Gossip misses a node now and then; in churn it would wait half a minute for views to be compared."""
    subject = all_up(64)
    for by in (2, 3):
        subject.told(subject.mesh.accusation(by, 7), via=by)
    target = subject.mesh.id(7)
    effects = subject.fire("suspect", target)
    number = subject.probe_of(7, effects)
    assert [to for to, gossip, _ in sends(effects, Gossip) if gossip.items] == [target], "it may refute"
    for _ in range(3):
        subject.hear(2, 3, 4)
        effects = subject.fire("stage", number)
    assert events(effects, PeerDown) == [PeerDown(target, tuple(subject.mesh.id(by) for by in (2, 3, 0)))]


def probes(subject: Subject, target: int, seconds: int, *, answers: bool) -> int:
    """How often it looks for the accused in this time; it is in touch with others, and asks them."""
    count, sent = 0, list[Effect]()
    for _ in range(10 * seconds):
        subject.hear(2, 3, 4)
        sent = subject.run(0.1, answering=(target,) if answers else ())
        count += len({ping.probe for to, ping, _ in sends(sent, Ping) if to == subject.mesh.id(target)})
    return count


@pytest.mark.parametrize("answers", [True, False])
def test_it_looks_until_it_saw_for_itself_and_no_longer(answers: bool) -> None:
    """A member that answers and never refutes, once accused, would be probed by all of a mesh, each second."""
    subject = all_up(64)
    del subject.timers["membership", "probe"]
    subject.told(subject.mesh.accusation(2, 7), via=2)
    pings = probes(subject, 7, int(LAN.suspicion_expiry_s) - 1, answers=answers)
    assert pings == (1 if answers else 2), "the second is the same probe, over the link"


def test_a_look_that_showed_nothing_is_taken_again() -> None:
    """Nobody was heard meanwhile: this node was itself out of touch."""
    subject = all_up(64)
    del subject.timers["membership", "probe"]
    subject.told(subject.mesh.accusation(2, 7), via=2)
    sent = subject.run(LAN.suspicion_expiry_s - 1)
    assert len({ping.probe for to, ping, _ in sends(sent, Ping) if to == subject.mesh.id(7)}) > 3


def test_a_refutation_clears_and_old_accusations_stay_void() -> None:
    subject = all_up(8)
    accusations = [subject.mesh.accusation(by, 7) for by in (2, 3, 4)]
    for stated in accusations[:2]:
        subject.told(stated)
    effects = subject.told(subject.mesh.alive(7, incarnation=1), via=5)
    assert events(effects, PeerCleared) == [PeerCleared(subject.mesh.id(7))]
    for stated in accusations:
        subject.told(stated)
    subject.run(FLOOR_S + 1, answering=range(1, 8))
    assert 7 in subject.up()


def test_a_dead_one_that_refutes_is_up_again() -> None:
    subject = all_up(8)
    for by in (2, 3, 4):
        subject.told(subject.mesh.accusation(by, 7))
    subject.fire("suspect", subject.mesh.id(7))
    assert events(subject.told(subject.mesh.alive(7)), PeerUp) == [], "the old word does not raise the dead"
    assert subject.down() == {7}
    assert [up.peer for up in events(subject.told(subject.mesh.alive(7, incarnation=1)), PeerUp)] == [
        subject.mesh.id(7)
    ]
    assert subject.down() == set()


def test_a_restart_raises_the_dead_at_once() -> None:
    subject = all_up(8)
    for by in (2, 3, 4):
        subject.told(subject.mesh.accusation(by, 7))
    subject.fire("suspect", subject.mesh.id(7))
    up = events(subject.told(subject.mesh.alive(7, boot=BOOT + 1)), PeerUp)
    assert [(one.peer, one.boot) for one in up] == [(subject.mesh.id(7), BOOT + 1)]


def test_who_is_accused_itself_refutes_and_answers_the_messenger() -> None:
    subject = all_up(8)
    effects = subject.told(subject.mesh.accusation(2, 0), via=3)
    told = [gossip for to, gossip, _ in sends(effects, Gossip) if to == subject.mesh.id(3)]
    stated = subject.mesh.codec(1).open(told[0].items[0])
    assert stated is not None
    assert isinstance(stated.body, Alive)
    assert stated.body.incarnation == 1
    # Yesterday's accusation is answered too, without another incarnation.
    effects = subject.told(subject.mesh.accusation(4, 0), via=5)
    told = [gossip for to, gossip, _ in sends(effects, Gossip) if to == subject.mesh.id(5)]
    assert told[0].items[0] == stated.blob


def test_one_that_said_goodbye_does_not_come_back_by_refuting() -> None:
    from protocol.membership.events import AddressesChanged, Depart
    from tests.support.hub import address_of

    subject = all_up(4)
    subject.give(Depart())
    for effects in (
        subject.told(subject.mesh.accusation(2, 0), via=3),
        subject.give(AddressesChanged((address_of(77),))),
    ):
        for _, gossip, _ in sends(effects, Gossip):
            for blob in gossip.items:
                stated = subject.mesh.codec(1).open(blob)
                assert stated is not None
                assert not isinstance(stated.body, Alive) or stated.body.incarnation == 0


def test_a_stall_withdraws_what_this_node_said_and_gives_the_accused_time_anew() -> None:
    subject = Subject(8, params=replace(STEADY, stall_s=1.5))
    subject.know(*range(1, 8))
    subject.hear(*range(1, 7))
    own, others = subject.mesh.id(6), subject.mesh.id(7)
    for target in (own, others):
        subject.machine._s.out = []
        subject.machine._suspicions.accuse(target)
    subject._keep(subject.machine._end())
    subject.told(subject.mesh.accusation(2, 7))
    subject.now += 600.0
    effects = subject.give(TimerFired(("membership", "suspect", others)))
    assert events(effects, Stalled) != []
    assert events(effects, PeerDown) == []
    assert events(effects, PeerCleared) == [PeerCleared(own)], "only this node had accused it"
    assert subject.machine.suspects() == [others]
    assert subject.timers["membership", "suspect", others] == pytest.approx(subject.now + 1.0, abs=FLOOR_S)
    assert [stated.signer for stated in subject.machine._suspicions.accusations(others)] == [subject.mesh.id(2)]


def test_accusations_that_a_view_report_overruled_do_not_kill_again() -> None:
    size = 24
    subject = Subject(size, params=replace(STEADY, report_mass=4))
    subject.know(*range(1, size))
    subject.hear(*range(1, 20))
    lost = range(18, 24)
    used = {target: [subject.mesh.accusation(by, target) for by in (1, 2, 3)] for target in lost}
    for stated in [one for several in used.values() for one in several]:
        subject.told(stated)
    subject.run(FLOOR_S + 0.2, answering=range(1, 18))
    assert subject.down() == set(lost)
    subject.now += REPORT_LAG_S
    for by in (18, 19, 20):
        subject.told(subject.mesh.report(by, range(size)), via=by)
    assert subject.down() == set(), "the report's witnesses revive all of them"
    for target, several in used.items():
        for stated in several:
            effects = subject.told(stated, via=5)
            assert events(effects, PeerSuspected) == []
            assert [to for to, _, _ in sends(effects, Gossip)] == [subject.mesh.id(target)], "it may settle it itself"
    # Fresh ones do, and after a while those, too: it is up by mistake, or it would have refuted them.
    subject.hear(*range(1, 18))
    assert events(subject.told(subject.mesh.accusation(4, 18)), PeerSuspected) != []
    subject.now += CONSUMED_S
    subject.hear(*range(1, 18))
    assert events(subject.told(used[19][0]), PeerSuspected) != []


def test_the_roster_decides_who_is_a_witness() -> None:
    subject = all_up(8)
    stranger = subject.mesh.accusation(2, 7)
    body = stranger.body
    assert isinstance(body, Accusation)
    # Its signature stands for another node: the codec, which every statement passes, refuses it.
    forged = subject.mesh.codec(3).sign(subject.mesh.id(3), body)
    assert subject.mesh.codec(0).open(forged.blob) is None
    assert isinstance(subject.mesh.report(1, [1]).body, ViewReport)


def test_an_evicted_node_is_no_witness_any_more() -> None:
    """What it said before its eviction neither counts towards a verdict nor keeps up a suspicion."""
    subject = all_up(8)
    for by, target in ((2, 7), (3, 7), (2, 6)):
        subject.told(subject.mesh.accusation(by, target), via=by)
    subject.mesh.roster.apply(evicted(2))
    effects = subject.give(RosterShrank((subject.mesh.id(2),)))
    assert events(effects, PeerCleared) == [PeerCleared(subject.mesh.id(6))]
    assert [stated.signer for stated in subject.machine._suspicions.accusations(subject.mesh.id(7))] == [
        subject.mesh.id(3)
    ]
    subject.told(subject.mesh.accusation(4, 7), via=4)
    assert events(subject.fire("suspect", subject.mesh.id(7)), PeerDown) == []
    verdict = events(subject.told(subject.mesh.accusation(5, 7), via=5), PeerDown)
    assert [set(down.witnesses) for down in verdict] == [{subject.mesh.id(by) for by in (3, 4, 5)}]


@pytest.mark.parametrize("how", ["left", "evicted"])
def test_whoever_left_or_was_evicted_is_no_witness_any_more(how: str) -> None:
    subject = all_up(8)
    for by in (2, 3, 4):
        subject.told(subject.mesh.accusation(by, 7), via=by)
    if how == "left":
        subject.told(subject.mesh.leaving(4), via=4)
    else:
        subject.give(RosterShrank((subject.mesh.id(4),)))
    subject.run(FLOOR_S + 0.5, answering=range(1, 8))
    assert 7 not in subject.down(), "two witnesses are one too few"
    subject.hear(*range(1, 7))
    assert events(subject.told(subject.mesh.accusation(5, 7), via=5), PeerDown) != []


@pytest.mark.parametrize("how", ["left", "evicted"])
def test_an_accusation_whose_only_witness_went_is_dropped(how: str) -> None:
    subject = all_up(8)
    subject.told(subject.mesh.accusation(4, 7), via=4)
    gone = subject.mesh.leaving(4)
    effects = subject.told(gone, via=4) if how == "left" else subject.give(RosterShrank((subject.mesh.id(4),)))
    assert PeerCleared(subject.mesh.id(7)) in events(effects, PeerCleared)
    assert subject.machine.suspects() == []
    assert ("membership", "suspect", subject.mesh.id(7)) not in subject.timers
