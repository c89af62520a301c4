"""The coordinator's part of at_most_once: it collects the notes of a majority, and has its own held by one.

Nothing of a term is started before the notes of a majority of the electorate were collected (the holders take none of
an older ballot from then on), and no attempt before a majority holds its note. The other side is witnessing.py's.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from protocol.ids import NodeId
from protocol.placement.commands import NOTES_PER_CALL_MAX, HoldNotes, Note, NotesAnswer, NotesWanted
from protocol.placement.queueing import TaskKey
from protocol.placement.scheduling_events import SendNotes
from protocol.placement.tasks import AttemptId

COLLECTED_MAX: Final = 60_000
AGAIN_S: Final = 1.0


@dataclass(slots=True)
class _Voter:
    """One holder. `owed`: attempts whose notes it shall hold."""

    collected: bool = False
    after: bytes = b""
    owed: dict[AttemptId, Note] = field(default_factory=dict)
    batch: int = 0  # under way; 0: none
    sent: tuple[Note, ...] | None = None  # of that batch; None: it asks for notes
    again_at: float = 0.0


class Noting:
    """One term's. `take` gives what is to be sent; the rest tells what is known."""

    def __init__(self, term: int = 0) -> None:
        """`term` 0: this node does not coordinate."""
        self._term = term
        self._quorate = False
        self._voters: dict[NodeId, _Voter] = {}
        self._need = 1
        self._batch = 0
        self._count = 0
        self._notes: dict[TaskKey, dict[AttemptId, Note]] = {}
        self._free: set[AttemptId] = set()
        self._holders: dict[AttemptId, set[NodeId]] = {}
        self._waiting: dict[AttemptId, TaskKey] = {}
        self.words = ""  # what a voter said last when it refused

    # ---- reading -----------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether at_most_once tasks may be placed now."""
        return self._quorate and self._has_collected and self._count < COLLECTED_MAX

    @property
    def _has_collected(self) -> bool:
        return sum(voter.collected for voter in self._voters.values()) >= self._need

    def why_not(self) -> str:
        """In words; empty: it is ready."""
        if self.is_ready:
            return ""
        if not self._quorate:
            return "at_most_once tasks wait for a majority of the voters to answer"
        if self._count >= COLLECTED_MAX:
            return "too many at_most_once tasks are kept: delete some that ended"
        have = sum(voter.collected for voter in self._voters.values())
        return f"notes of at_most_once tasks are being collected: {have} of {self._need} voters" + (
            f"; {self.words}" if self.words else ""
        )

    def of(self, key: TaskKey) -> tuple[Note, ...]:
        """Attempts of this task that may have been started, as far as notes go."""
        notes = self._notes.get(key)
        return () if notes is None else tuple(note for name, note in notes.items() if name not in self._free)

    # ---- events ------------------------------------------------------------------------------------------------------

    def quorum(self, *, quorate: bool) -> None:
        """Whether this coordinator is quorate."""
        self._quorate = quorate

    def electorate(self, voters: frozenset[NodeId], need: int) -> set[TaskKey]:
        """Which voters count. Those that are new get all notes that may matter. Whose note a majority holds with it."""
        self._need = need
        for gone in set(self._voters) - voters:
            del self._voters[gone]
        for added in sorted(voters - set(self._voters)):
            owed = {name: note for notes in self._notes.values() for name, note in notes.items()}
            self._voters[added] = _Voter(owed=owed)
        held = [attempt for attempt in self._waiting if self.is_held(attempt)]
        return {self._waiting.pop(attempt) for attempt in held}

    def hold(self, key: TaskKey, note: Note) -> None:
        """Have it held by all voters; `answered` says when a majority does."""
        self._add(key, note)
        self._waiting[note.attempt] = key
        for voter in self._voters.values():
            voter.owed[note.attempt] = note

    def free(self, attempt: AttemptId) -> None:
        """It was never commanded in this term, or its executor said that it never wrote it down."""
        self._free.add(attempt)
        self._waiting.pop(attempt, None)

    def over(self, key: TaskKey) -> None:
        """The task ended. Its notes stay: if its executor is evicted, its record may be withdrawn, and it stands as
        though it had never run.
        """
        for attempt in self._notes.get(key, ()):
            self._waiting.pop(attempt, None)
            self._holders.pop(attempt, None)

    def forget(self, key: TaskKey) -> None:
        """Its order is gone: nothing of it will ever be started."""
        for attempt in self._notes.pop(key, ()):
            self._count -= 1
            self._free.discard(attempt)
            self._waiting.pop(attempt, None)
            self._holders.pop(attempt, None)
            for voter in self._voters.values():
                voter.owed.pop(attempt, None)

    def answered(self, node: NodeId, batch: int, answer: NotesAnswer | None, now: float) -> tuple[set[TaskKey], bool]:
        """What came of a message: tasks whose note is held by a majority now or that were found, and whether the last
        voter that was needed has given its notes.
        """
        voter = self._voters.get(node)
        if voter is None or voter.batch != batch:
            return set(), False
        voter.batch = 0
        if answer is None or answer.words:
            voter.again_at = now + AGAIN_S
            self.words = self.words if answer is None else answer.words
            return set(), False
        had = self._has_collected
        touched: set[TaskKey] = set()
        if voter.sent is None:
            for note in answer.notes[:NOTES_PER_CALL_MAX]:
                touched.add((note.submitter, note.task))
                self._add((note.submitter, note.task), note)
                self._held(node, note.attempt)
            # A page must lead on, or a holder that lies would be asked for ever.
            voter.collected = not answer.more or answer.more <= voter.after
            voter.after = answer.more
        else:
            for note in voter.sent:
                voter.owed.pop(note.attempt, None)
                if self._held(node, note.attempt) >= self._need and note.attempt in self._waiting:
                    touched.add(self._waiting.pop(note.attempt))
        return touched, self._has_collected and not had

    def is_held(self, attempt: AttemptId) -> bool:
        """By a majority of the voters that count now."""
        return len(self._holders.get(attempt, set()).intersection(self._voters)) >= self._need

    def take(self, up: Iterable[NodeId], now: float) -> tuple[list[SendNotes], float | None]:
        """What is to be sent now, one message to a voter at a time, and when to look again."""
        messages: list[SendNotes] = []
        again: float | None = None
        if not self._term or not self._quorate:
            return messages, again
        here = set(up)
        for node, voter in self._voters.items():
            if voter.batch or node not in here or (voter.collected and not voter.owed):
                continue
            if now < voter.again_at:
                again = voter.again_at if again is None else min(again, voter.again_at)
                continue
            self._batch += 1
            voter.batch = self._batch
            if voter.collected:
                voter.sent = tuple(voter.owed.values())[:NOTES_PER_CALL_MAX]
                messages.append(SendNotes(node, voter.batch, HoldNotes(self._term, voter.sent)))
            else:
                voter.sent = None
                messages.append(SendNotes(node, voter.batch, NotesWanted(self._term, voter.after)))
        return messages, again

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _add(self, key: TaskKey, note: Note) -> None:
        notes = self._notes.setdefault(key, {})
        if note.attempt not in notes and self._count < COLLECTED_MAX:
            notes[note.attempt] = note
            self._count += 1

    def _held(self, node: NodeId, attempt: AttemptId) -> int:
        """How many of the voters that count now hold it."""
        holders = self._holders.setdefault(attempt, set())
        holders.add(node)
        return len(holders.intersection(self._voters))
