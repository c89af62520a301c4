"""What a node shows when it hears nobody: cut off from all, or evicted."""

import pytest

from protocol.effects import Send, SendLink
from protocol.membership.events import CutOff, PeerDown, PeerUp, Reconnected, RosterShrank
from protocol.membership.parameters import LAN
from tests.protocol.membership.parts import Subject
from tests.support.hub import events, evicted, of_kind


@pytest.mark.parametrize("size", [3, 8])
def test_a_loner_shows_the_others_as_suspect_within_seconds(size: int) -> None:
    subject = Subject(size)
    subject.know(*range(1, size))
    subject.hear(*range(1, size))
    effects = subject.run(LAN.reach_window_s - 0.6)
    assert events(effects, CutOff) == []
    effects = subject.run(1.2)
    assert len(events(effects, CutOff)) == 1
    assert subject.machine.cut_off
    assert set(subject.machine.suspects()) == {subject.mesh.id(index) for index in range(1, size)}
    assert subject.up() == set(range(size)), "it judges nobody"
    effects = subject.packet(1)
    assert events(effects, Reconnected) == [Reconnected()]
    assert not subject.machine.cut_off
    assert subject.machine.suspects() == []


def test_who_is_answered_is_not_cut_off() -> None:
    subject = Subject(5)  # each has its turn within two rounds, which take less than the window
    subject.know(*range(1, 5))
    assert events(subject.run(30.0, answering=[3]), CutOff) == []


def test_after_a_minute_the_others_count_as_gone_and_nothing_is_left_to_be_cut_off_from() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    effects = subject.run(LAN.isolation_s + 1.0)
    assert len(events(effects, CutOff)) == len(events(effects, Reconnected)) == 1
    assert subject.up() == {0}


def test_of_two_nodes_one_judges_the_other_instead() -> None:
    subject = Subject(2)
    subject.know(1)
    effects = subject.run(20.0)
    assert events(effects, CutOff) == []
    assert len(events(effects, PeerDown)) == 1


def test_an_evicted_node_shows_nobody_as_up_and_calls_nobody() -> None:
    subject = Subject(5)
    subject.know(*range(1, 5))
    subject.hear(*range(1, 5))
    subject.mesh.roster.apply(evicted(0))
    effects = subject.give(RosterShrank((subject.mesh.id(0),)))
    assert {(down.peer, down.private) for down in events(effects, PeerDown)} == {
        (subject.mesh.id(index), True) for index in range(1, 5)
    }
    assert subject.up() == {0}
    later = subject.run(120.0) + subject.packet(1) + subject.told(subject.mesh.alive(2, incarnation=3), via=1)
    assert of_kind(later, Send) == of_kind(later, SendLink) == []
    assert events(later, PeerUp) == []
    assert subject.up() == {0}
