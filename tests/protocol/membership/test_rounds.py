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
    view, turns = subject.machine.view, Counter[int]()
    for tick in range(rounds * size):
        subject.hear(size - 1, size)
        for target in targets(subject, 1):
            turns[target] += 1
            subject.machine._probing.forget(subject.mesh.id(target))
        for flapper in range(1 + tick % 4, size // 2, 4):
            stated = view.known[subject.mesh.id(flapper)]
            view.set_left(stated.signer, stated, subject.now)
            view.set_up(stated, subject.now)
    assert min(turns[steady] for steady in range(size // 2, size + 1)) >= rounds - 1
