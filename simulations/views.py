"""What every node believes of every other, kept from the events that nodes publish, and how it compares with the truth.

Only an observer: it asks no machine anything, so that it also sees what a machine forgets to tell.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft, PeerUp
from simulations.checkers.checker import Checker
from simulations.computer import DOWN, Computer
from simulations.world import World

# What a node believes of another: a former life is none that it could reach.
ABSENT: Final = 0
PRESENT: Final = 1
FORMER: Final = 2
_WORDS: Final = ("down", "up", "up in a former life")


class Verdict(NamedTuple):
    """One PeerDown, and whether it was true."""

    at: float
    observer: int
    target: int
    witnesses: tuple[NodeId, ...]
    private: bool
    was_down: bool


class Views(Checker):
    """`wrong` counts the entries of all running nodes' views that differ from the truth; 0 is agreement with it.

    Who lists a restarted node in its former life is wrong, too.
    """

    name = "views"

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.wrong = 0
        self.changed_at = 0.0
        self._rows: list[bytearray] = []
        self._row_wrong: list[int] = []
        self._exists: list[bool] = []  # the truth: its process exists and it did not say goodbye
        self._outlaws: set[int] = set()
        self._watching: list[bool] = []  # its process exists, so that its view counts

    def attached(self, world: World) -> None:
        self._world = world

    # ---- truth ----------------------------------------------------------------------------------------------------

    def started(self, computer: Computer) -> None:
        """A process begins with an empty view, and from now on everybody should see it."""
        self._grow()
        index = computer.index
        self._rows[index] = bytearray(len(self._rows))
        for row in self._rows:
            if row[index] == PRESENT:
                row[index] = FORMER  # wrong before, since the process was gone, and wrong now
        if index in self._outlaws:
            return
        self._set_truth(index, True)
        self._watching[index] = True
        self._row_wrong[index] = sum(self._exists) - 1
        self.wrong += self._row_wrong[index]

    def settled(self, computers: Sequence[Computer]) -> None:
        """All of them list all of them."""
        full = bytearray(len(self._rows))
        for computer in computers:
            full[computer.index] = PRESENT
        for observer in (computer.index for computer in computers):
            self._rows[observer] = row = bytearray(full)
            row[observer] = ABSENT
            self.wrong -= self._row_wrong[observer]
            self._row_wrong[observer] = 0

    def crashed(self, computer: Computer) -> None:
        """A process is gone: its own view no longer counts, and everybody should see that."""
        index = computer.index
        self._watching[index] = False
        self.wrong -= self._row_wrong[index]
        self._row_wrong[index] = 0
        self._set_truth(index, False)

    def left(self, computer: Computer) -> None:
        """The computer's owner asked it to leave: from now on nobody should list it, though its process still runs."""
        self._set_truth(computer.index, False)

    def evicted(self, computer: Computer) -> None:
        """The computer is no member any more: nobody should list it, and what it believes does not count."""
        self._grow()
        index = computer.index
        self._outlaws.add(index)
        self._watching[index] = False
        self.wrong -= self._row_wrong[index]
        self._row_wrong[index] = 0
        self._set_truth(index, False)

    def admitted(self, computer: Computer) -> None:
        """The computer may come (again): from its next start on it counts."""
        self._outlaws.discard(computer.index)

    def _set_truth(self, index: int, exists: bool) -> None:
        if self._exists[index] == exists:
            return
        self._exists[index] = exists
        for observer, row in enumerate(self._rows):
            if observer != index and self._watching[observer]:
                change = _differs(row[index], exists) - _differs(row[index], not exists)
                self._row_wrong[observer] += change
                self.wrong += change

    def _grow(self) -> None:
        size = len(self._world.computers)
        missing = size - len(self._rows)
        if missing:
            for row in self._rows:
                row.extend(bytes(missing))
            self._rows += [bytearray(size) for _ in range(missing)]
            self._row_wrong += [0] * missing
            self._exists += [False] * missing
            self._watching += [False] * missing

    # ---- belief ---------------------------------------------------------------------------------------------------

    def published(self, computer: Computer, event: object) -> None:
        """Fold an event into the row of the node that published it."""
        if isinstance(event, PeerUp):
            self._set(computer, event.peer, PRESENT if event.boot == self._boot_of(event.peer) else FORMER)
        elif isinstance(event, PeerDown):
            target = self._set(computer, event.peer, ABSENT)
            if target is not None:
                was_down = target.state == DOWN or not self._exists[target.index]
                verdict = (computer.index, target.index, event.witnesses, event.private, was_down)
                self.verdicts.append(Verdict(self._world.now, *verdict))
        elif isinstance(event, PeerLeft):
            self._set(computer, event.peer, ABSENT)

    def _boot_of(self, peer: NodeId) -> int | None:
        computer = self._world.find(peer)
        return None if computer is None or computer.machine is None else computer.program.boot_epoch(computer.machine)

    def _set(self, computer: Computer, peer: NodeId, value: int) -> Computer | None:
        target = self._world.find(peer)
        if target is None or target is computer:
            return None
        row = self._rows[computer.index]
        before, row[target.index] = row[target.index], value
        if before != value:
            self.changed_at = self._world.now
            if self._watching[computer.index]:
                exists = self._exists[target.index]
                change = _differs(value, exists) - _differs(before, exists)
                self._row_wrong[computer.index] += change
                self.wrong += change
        return target

    # ---- questions ------------------------------------------------------------------------------------------------

    def sees(self, observer: Computer, target: Computer) -> bool:
        """Whether the observer lists the target as up, be it in a former life."""
        return bool(self._rows[observer.index][target.index])

    def mistakes(self, at_most: int = 5) -> str:
        """A few wrong entries in words, for a failure's message."""
        found = []
        for observer, row in enumerate(self._rows):
            if not self._watching[observer] or not self._row_wrong[observer]:
                continue
            for target, value in enumerate(row):
                if target != observer and _differs(value, self._exists[target]):
                    found.append(f"#{observer} has #{target} {_WORDS[value]}")
                    if len(found) == at_most:
                        return f"{self.wrong} wrong entries: " + ", ".join(found) + " ..."
        return f"{self.wrong} wrong entries: " + ", ".join(found)


def _differs(value: int, exists: bool) -> bool:
    return value != (PRESENT if exists else ABSENT)
