"""Who holds notes: that an attempt of an at_most_once task may have been started somewhere.

A coordinator starts such a task only after a majority of its electorate holds the note durably, and before it starts
any, it collects the notes of a majority, which take none of an older ballot from then on. Any two such majorities meet,
so whoever coordinates knows of every attempt that may ever have been started. Notes live as long as the order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, assert_never

import msgspec

from protocol.effects import Effect, Persist
from protocol.election.electorate import Ballot
from protocol.election.fence import TERM_LEAP_MAX
from protocol.ids import NodeId, short_id
from protocol.placement.commands import (
    NOTES_PER_CALL_MAX,
    HoldNotes,
    Note,
    NotesAnswer,
    NotesCommand,
    NotesWanted,
)
from protocol.placement.tasks import TaskId

WITNESS_MACHINE: Final = "tasks.notes"
NOTES_MAX: Final = 20_000
_GIVEN: Final = b"given"
_PREFIX: Final = b"n/"

# ---- inputs and effects ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NotesCommanded:
    """A `tasks.notes` came. Answered by AnswerNotes with the same call."""

    peer: NodeId
    message: NotesCommand
    call: int


@dataclass(frozen=True, slots=True)
class OrderGone:
    """The order was deleted, so nobody will ever start that task again. Told also at the start, of notes whose order
    was deleted meanwhile.
    """

    submitter: NodeId
    task: TaskId


WitnessingInput = NotesCommanded | OrderGone


@dataclass(frozen=True, slots=True)
class AnswerNotes:
    """Answer that call; a Persist before it in the list must be durable first."""

    call: int
    answer: NotesAnswer


WitnessingEffect = AnswerNotes | Effect


class Witness:
    """See the module. `durable` is what was persisted under WITNESS_MACHINE. Never raises on what a peer sent."""

    def __init__(self, durable: Mapping[bytes, bytes]) -> None:
        given = durable.get(_GIVEN)
        self._given = Ballot() if given is None else msgspec.msgpack.decode(given, type=Ballot)
        self._notes: dict[bytes, Note] = {
            key: msgspec.msgpack.decode(value, type=Note)
            for key, value in sorted(durable.items())
            if key.startswith(_PREFIX)
        }
        self._by_task: dict[tuple[NodeId, TaskId], list[bytes]] = {}
        for key, note in self._notes.items():
            self._by_task.setdefault((note.submitter, note.task), []).append(key)

    @property
    def notes(self) -> tuple[Note, ...]:
        """All that are held."""
        return tuple(self._notes.values())

    def handle(self, event: WitnessingInput, now: float) -> list[WitnessingEffect]:
        """One event; `now` is not looked at."""
        match event:
            case NotesCommanded(peer, message, call):
                ballot = Ballot(message.term, short_id(peer))
                if isinstance(message, HoldNotes):
                    return self._hold(ballot, message, call)
                return self._give(ballot, message, call)
            case OrderGone(submitter, task):
                keys = self._by_task.pop((submitter, task), [])
                for key in keys:
                    del self._notes[key]
                return [Persist(WITNESS_MACHINE, key, None) for key in keys]
            case _:
                assert_never(event)

    def _hold(self, ballot: Ballot, message: HoldNotes, call: int) -> list[WitnessingEffect]:
        if ballot < self._given:
            words = f"the notes were given to a coordinator of term {self._given.term}; {ballot.term} is old here"
            return [AnswerNotes(call, NotesAnswer(words))]
        fresh = {_key(note): note for note in message.notes}
        fresh = {key: note for key, note in fresh.items() if key not in self._notes}
        if len(self._notes) + len(fresh) > NOTES_MAX:
            words = f"this node holds {NOTES_MAX} notes already: delete tasks that ended"
            return [AnswerNotes(call, NotesAnswer(words))]
        effects: list[WitnessingEffect] = []
        for key, note in fresh.items():
            self._notes[key] = note
            self._by_task.setdefault((note.submitter, note.task), []).append(key)
            effects.append(Persist(WITNESS_MACHINE, key, msgspec.msgpack.encode(note)))
        return [*effects, AnswerNotes(call, NotesAnswer())]

    def _give(self, ballot: Ballot, message: NotesWanted, call: int) -> list[WitnessingEffect]:
        if not self._given <= ballot or ballot.term > self._given.term + TERM_LEAP_MAX:
            words = f"the notes were given to a coordinator of term {self._given.term}; {ballot.term} is no successor"
            return [AnswerNotes(call, NotesAnswer(words))]
        effects: list[WitnessingEffect] = []
        if ballot != self._given:
            self._given = ballot
            effects.append(Persist(WITNESS_MACHINE, _GIVEN, msgspec.msgpack.encode(ballot)))
        # In the order of their keys, so that one added between two pages is never skipped unless it is the asker's own.
        keys = sorted(key for key in self._notes if key > message.after)
        page = keys[:NOTES_PER_CALL_MAX]
        more = page[-1] if len(keys) > len(page) else b""
        answer = NotesAnswer(notes=tuple(self._notes[key] for key in page), more=more)
        return [*effects, AnswerNotes(call, answer)]


def _key(note: Note) -> bytes:
    return _PREFIX + f"{note.submitter}/{note.task}/{note.attempt}".encode()
