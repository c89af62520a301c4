"""The notes that this node holds as a voter: drives protocol/placement/witnessing.py, and stores what it wants."""

from collections.abc import Awaitable, Callable

import trio

from meshnode.kernel.machines import MachineRunner
from protocol.effects import Persist
from protocol.ids import NodeId
from protocol.placement.commands import NotesAnswer, NotesCommand
from protocol.placement.tasks import TaskId
from protocol.placement.witnessing import AnswerNotes, NotesCommanded, OrderGone, Witness, WitnessingInput


class Witnessing:
    """See the module. `persist` returns once the change is durable."""

    def __init__(
        self, *, machine: Witness, persist: Callable[[Persist], Awaitable[None]], now: Callable[[], float]
    ) -> None:
        self._machine = machine
        self._persist = persist
        self._runner: MachineRunner[WitnessingInput] = MachineRunner(
            handle=lambda event, at: machine.handle(event, at),  # type: ignore[arg-type]  # it sets no timers
            perform=self._perform,
            now=now,
        )
        self._answers: dict[int, tuple[trio.Event, list[NotesAnswer]]] = {}
        self._asked = 0

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._runner.run()

    def forget_gone(self, is_known: Callable[[NodeId, TaskId], bool]) -> None:
        """Once all records are known: let go of notes whose order was deleted meanwhile."""
        for submitter, task in {(note.submitter, note.task) for note in self._machine.notes}:
            if not is_known(submitter, task):
                self.order_gone(submitter, task)

    def order_gone(self, submitter: NodeId, task: TaskId) -> None:
        """An order was deleted."""
        self._runner.submit(OrderGone(submitter, task))

    async def command(self, peer: NodeId, message: NotesCommand) -> NotesAnswer:
        """`tasks.notes`."""
        self._asked += 1
        call, answered, answers = self._asked, trio.Event(), list[NotesAnswer]()
        self._answers[call] = (answered, answers)
        try:
            self._runner.submit(NotesCommanded(peer, message, call))
            await answered.wait()
        finally:
            del self._answers[call]
        return answers[0]

    async def _perform(self, effect: object) -> None:
        match effect:
            case Persist():
                await self._persist(effect)
            case AnswerNotes(call, answer):
                waiting = self._answers.get(call)
                if waiting is not None:
                    waiting[1].append(answer)
                    waiting[0].set()
            case _:
                raise TypeError(f"witnessing cannot perform {effect!r}")
