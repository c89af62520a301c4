"""Notes are held durably, and given to the newest coordinator only."""

from protocol.effects import Persist
from protocol.election.fence import TERM_LEAP_MAX
from protocol.ids import node_id_of, short_id
from protocol.placement.commands import NOTES_PER_CALL_MAX, HoldNotes, Note, NotesWanted
from protocol.placement.noting import AGAIN_S, Noting
from protocol.placement.witnessing import NOTES_MAX, AnswerNotes, NotesCommanded, OrderGone, Witness

A, B, C, X = sorted((node_id_of(bytes([number]) * 32) for number in range(4)), key=short_id)


def note(number: int, *, task: int | None = None, executor: str = X, generation: int = 0) -> Note:
    return Note(A, f"{number if task is None else task:016x}", generation, f"{number:016x}", executor)


class Holder:
    """A witness and its disk."""

    def __init__(self, disk: dict | None = None) -> None:
        self.disk = {} if disk is None else disk
        self.witness = Witness(self.disk)

    def tell(self, event):
        """The answer; what must be durable before it is."""
        for effect in self.witness.handle(event, 0.0):
            if isinstance(effect, AnswerNotes):
                return effect.answer
            assert isinstance(effect, Persist)
            if effect.value is None:
                del self.disk[effect.key]
            else:
                self.disk[effect.key] = effect.value
        return None

    def ask(self, peer: str, message):
        return self.tell(NotesCommanded(peer, message, 7))

    def all(self, peer: str, term: int) -> list[Note]:
        found, after = [], b""
        while True:
            answer = self.ask(peer, NotesWanted(term, after))
            assert not answer.words
            found += answer.notes
            after = answer.more
            if not after:
                return found


def test_what_is_held_is_given_also_after_a_restart() -> None:
    holder = Holder()
    assert holder.ask(A, HoldNotes(3, (note(1), note(2)))).words == ""
    assert Holder(dict(holder.disk)).all(B, 4) == [note(1), note(2)]


def test_who_was_given_the_notes_shuts_out_everybody_older() -> None:
    holder = Holder()
    assert holder.all(B, 4) == []
    for peer, term in ((A, 3), (A, 4)):  # a lower term, and the same with a lower name
        assert "old here" in holder.ask(peer, HoldNotes(term, (note(1),))).words
        assert "no successor" in holder.ask(peer, NotesWanted(term)).words
    again = Holder(dict(holder.disk))
    assert "old here" in again.ask(A, HoldNotes(3, (note(1),))).words
    assert again.witness.notes == ()
    assert again.ask(B, HoldNotes(4, (note(1),))).words == ""
    assert again.ask(C, HoldNotes(5, (note(2),))).words == ""


def test_a_leap_of_terms_is_no_successor() -> None:
    holder = Holder()
    assert "no successor" in holder.ask(B, NotesWanted(TERM_LEAP_MAX + 1)).words
    assert holder.all(A, 2) == []


def test_pages_follow_each_other() -> None:
    holder = Holder()
    for first in range(0, 600, 100):
        holder.ask(A, HoldNotes(1, tuple(note(number) for number in range(first, first + 100))))
    assert len(holder.ask(A, NotesWanted(1)).notes) == NOTES_PER_CALL_MAX
    assert sorted(each.attempt for each in holder.all(A, 1)) == [f"{number:016x}" for number in range(600)]


def test_notes_go_with_their_order_and_are_bounded() -> None:
    holder = Holder()
    for first in range(0, NOTES_MAX, 100):
        holder.ask(A, HoldNotes(1, tuple(note(number) for number in range(first, first + 100))))
    assert "already" in holder.ask(A, HoldNotes(1, (note(NOTES_MAX),))).words
    assert holder.ask(A, HoldNotes(1, (note(5),))).words == ""  # held already
    holder.tell(OrderGone(A, f"{5:016x}"))
    assert holder.ask(A, HoldNotes(1, (note(NOTES_MAX),))).words == ""
    assert len([key for key in holder.disk if key.startswith(b"n/")]) == NOTES_MAX


# ---- the coordinator's part ------------------------------------------------------------------------------------------


class Notes:
    """A coordinator's noting and three holders."""

    def __init__(self, term: int = 5, me: str = C) -> None:
        self.me = me
        self.noting = Noting(term)
        self.holders = {node: Holder() for node in (A, B, C)}
        self.now = 0.0

    def begin(self) -> None:
        self.noting.quorum(quorate=True)
        self.noting.electorate(frozenset(self.holders), 2)

    def exchange(self, *up: str) -> tuple[set, bool]:
        """One round with those that are up."""
        touched, is_ready = set(), False
        for message in self.noting.take(up, self.now)[0]:
            answer = self.holders[message.node].ask(self.me, message.message)
            more, ready = self.noting.answered(message.node, message.batch, answer, self.now)
            touched, is_ready = touched | more, is_ready or ready
        return touched, is_ready


def test_nothing_is_ready_before_a_majority_gave_its_notes() -> None:
    world = Notes()
    assert world.noting.take((A, B, C), 0.0) == ([], None)
    assert "majority" in world.noting.why_not()
    world.begin()
    assert world.exchange(A) == (set(), False)
    assert "1 of 2 voters" in world.noting.why_not()
    assert world.exchange(A, B) == (set(), True)
    assert world.noting.is_ready
    world.noting.quorum(quorate=False)
    assert not world.noting.is_ready


def test_notes_of_others_are_found_and_own_ones_need_a_majority() -> None:
    world = Notes()
    world.holders[B].ask(A, HoldNotes(1, tuple(note(number, task=number % 3) for number in range(300))))
    world.begin()
    for _ in range(3):
        world.exchange(A, B)
    assert world.noting.is_ready
    assert len(world.noting.of((A, f"{1:016x}"))) == 100
    key = (A, "f" * 16)
    own = Note(*key, 0, "e" * 16, X)
    world.noting.hold(key, own)
    assert world.exchange(A) == (set(), False)
    assert not world.noting.is_held(own.attempt)
    assert world.exchange(A, B) == ({key}, False)
    assert world.noting.is_held(own.attempt)
    assert own in world.holders[B].witness.notes
    world.noting.free(own.attempt)
    assert world.noting.of(key) == ()


def test_a_holder_that_gave_its_notes_to_a_newer_one_is_asked_again_later() -> None:
    world = Notes(term=5)
    world.begin()
    world.exchange(A, B)
    for node in (A, B):
        world.holders[node].all(C, 9)
    world.noting.hold((A, "f" * 16), Note(A, "f" * 16, 0, "e" * 16, X))
    assert world.exchange(A, B) == (set(), False)
    assert not world.noting.is_held("e" * 16)
    assert world.noting.take((A, B), 0.0) == ([], AGAIN_S)
    assert len(world.noting.take((A, B), AGAIN_S)[0]) == 2


def test_new_voters_get_the_notes_that_matter_and_a_smaller_electorate_may_have_them_already() -> None:
    world = Notes()
    world.begin()
    world.exchange(A, B, C)
    key, own = (A, "f" * 16), Note(A, "f" * 16, 0, "e" * 16, X)
    world.noting.hold(key, own)
    world.exchange(A)
    assert world.noting.electorate(frozenset({A}), 1) == {key}
    world.holders[X] = Holder()
    world.noting.electorate(frozenset({A, X}), 2)
    for _ in range(2):
        world.exchange(A, X)
    assert own in world.holders[X].witness.notes
    world.noting.forget(key)
    world.noting.electorate(frozenset({A, B, X}), 2)
    world.exchange(B)
    assert world.noting.take((B,), 0.0) == ([], None)


def test_a_holder_that_leads_nowhere_is_not_asked_for_ever() -> None:
    world = Notes()
    world.begin()
    page = world.noting.take((A,), 0.0)[0][0]
    lie = world.holders[A].ask(C, NotesWanted(5)).__class__(notes=(), more=b"n/zzz")
    world.noting.answered(A, page.batch, lie, 0.0)
    page = world.noting.take((A,), 0.0)[0][0]
    assert page.message == NotesWanted(5, b"n/zzz")
    world.noting.answered(A, page.batch, lie, 0.0)
    assert world.noting.take((A,), 0.0) == ([], None)
