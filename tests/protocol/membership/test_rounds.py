"""Whose turn it is to be probed: newcomers in a running round, many of them, and those who come again and again."""

from collections import Counter

from protocol.wire.messages import Ping
from tests.protocol.membership.parts import Subject
from tests.support.hub import sends


def targets(subject: Subject, ticks: int) -> list[int]:
    """Whom it probes in so many intervals; nobody answers or is accused, for no other timer fires."""
    return [subject.mesh.number(to) for _ in range(ticks) for to, _, _ in sends(subject.fire("probe"), Ping)]


def test_who_comes_up_in_the_middle_of_a_round_is_probed_in_it_as_often_as_others() -> None:
    """Nodes that start together begin their rounds together, and a round of a thousand takes minutes."""
    soon = 0
    for seed in range(100):
        subject = Subject(30, seed=seed)
        subject.know(*range(1, 21))
        targets(subject, 10)
        subject.know(21)
        probed = targets(subject, 11)
        soon += 21 in probed
        assert len(probed) == len(set(probed)), "nobody twice in a round"
    assert 30 < soon < 70, "half of the round was over"


def let_go(subject: Subject, ticks: int) -> list[int]:
    """As `targets`, but each probe ends at once: whoever has another turn is probed again."""
    probed = list[int]()
    for _ in range(ticks):
        for target in targets(subject, 1):
            probed.append(target)
            subject.machine._probing.forget(subject.mesh.id(target))
    return probed


def begin_round(subject: Subject) -> None:
    """All who are up have a turn in a round of which one turn is over."""
    while len(subject.machine._probing._order) != len(subject.machine.view.peers) - 1:
        let_go(subject, 1)


def leave(subject: Subject, index: int) -> None:
    stated = subject.machine.view.known[subject.mesh.id(index)]
    subject.machine.view.set_left(stated.signer, stated, subject.now)


def come_back(subject: Subject, index: int) -> None:
    subject.machine.view.set_up(subject.machine.view.known[subject.mesh.id(index)], subject.now)


def test_who_comes_new_and_again_in_one_round_has_one_place_in_it() -> None:
    turns = 0
    for seed in range(100):
        subject = Subject(30, seed=seed)
        subject.know(*range(1, 21))
        begin_round(subject)
        subject.know(21)
        probed = list[int]()
        for _ in range(19):
            probed += let_go(subject, 1)
            leave(subject, 21)
            come_back(subject, 21)
        assert probed.count(21) <= 1
        turns += probed.count(21)
    assert turns > 70


def test_who_was_gone_when_a_round_began_has_a_place_in_it_when_it_comes_back() -> None:
    soon = 0
    for seed in range(100):
        subject = Subject(30, seed=seed)
        subject.know(*range(1, 22))
        begin_round(subject)
        leave(subject, 21)
        let_go(subject, 20)
        begin_round(subject)
        come_back(subject, 21)
        soon += 21 in let_go(subject, 19)
    assert soon > 70, "the round had just begun"


def test_many_who_come_do_not_take_the_turns_of_others() -> None:
    subject = Subject(120)
    subject.know(*range(1, 21))
    probed = set[int]()
    for newcomer in range(21, 119):
        probed.update(targets(subject, 1))
        subject.know(newcomer)
    assert probed >= set(range(1, 21))


def test_half_of_a_mesh_that_comes_and_goes_takes_nobodys_turn() -> None:
    size, rounds = 100, 8
    subject = Subject(size + 1)
    subject.know(*range(1, size + 1))
    turns = Counter[int]()
    for tick in range(rounds * size):
        subject.hear(size - 1, size)
        turns.update(let_go(subject, 1))
        for flapper in range(1 + tick % 4, size // 2, 4):
            leave(subject, flapper)
            come_back(subject, flapper)
    assert min(turns[steady] for steady in range(size // 2, size + 1)) >= rounds - 1
