"""What a coordinator hears of nodes: their reports, and what became of its commands."""

from typing import Final

from protocol.effects import Publish
from protocol.placement.books import Book
from protocol.placement.commands import CommandAnswer, Running
from protocol.placement.queueing import TaskKey
from protocol.placement.scheduling_events import CommandAnswered, NodeTrusted, ReadTask, Reported
from protocol.placement.settling import Settling
from protocol.placement.tasks import AttemptId
from protocol.placement.tracking import Doubt, Promise, SchedulingState, Tracked

ASKED_MAX: Final = 8192
ASK_AGAIN_S: Final = 5.0
REFUSED_S: Final = 0.5
REFUSED_S_MAX: Final = 30.0


class Hearing:
    """One part of the scheduling machine; see the module."""

    def __init__(self, state: SchedulingState, settling: Settling) -> None:
        self._s = state
        self._settling = settling

    # ---- reports -----------------------------------------------------------------------------------------------------

    def reported(self, event: Reported, now: float) -> None:
        """All that runs there now, and what ended."""
        s, node, report = self._s, event.node, event.report
        if not s.is_member(node):
            return
        before = s.books.reported(node, report, now)
        if before is None:
            return
        book = s.books.of(node, now)
        s.dirty.add(node)
        touched: dict[TaskKey, None] = {}
        for ended in report.ended:
            task = s.tasks.get((ended.submitter, ended.task))
            if task is not None and ended.attempt.ending is not None:
                task.hear(node, ended.attempt)
                touched[task.key] = None
        for running in report.running:
            key = (running.submitter, running.task)
            task = s.tasks.get(key)
            if task is None:
                self._ask_about(key, now)
            elif self._show(task, book, running):
                touched[key] = None
            self._speaks_well(book, running, before.get(running.attempt))
        for attempt, running in before.items():
            task = s.tasks.get((running.submitter, running.task))
            if attempt not in book.shown and task is not None and task.shown.get(attempt, ("", 0))[0] == node:
                touched[task.key] = None
                if not task.has_ended(node, attempt):
                    del task.shown[attempt]
                    self._doubt(task, book, attempt, running.generation, now)
        for attempt, (key, _) in list(book.promised.items()):
            task = s.tasks.get(key)
            promise = None if task is None else task.promises.get(attempt)
            if task is None or promise is None:
                s.books.release(node, attempt)
            elif task.has_ended(node, attempt):
                touched[key] = None
            elif promise.phase == "taken" and promise.knows_from <= (report.boot, report.number):
                self._settling.drop(task, promise)
                self._doubt(task, book, attempt, promise.generation, now)
                touched[key] = None
        for key in touched:
            self._settling.settle(s.tasks[key], now)

    def _show(self, task: Tracked, book: Book, running: Running) -> bool:
        """It runs there. Whether that is news."""
        name = running.attempt
        if task.has_ended(book.node, name):
            return False  # the report was made before it ended
        promise = task.promises.get(name)
        if promise is not None and promise.node == book.node:
            self._settling.drop(task, promise)
        if task.shown.get(name) == (book.node, running.generation):
            return False
        task.shown[name] = (book.node, running.generation)
        return True

    def _doubt(self, task: Tracked, book: Book, name: AttemptId, generation: int, now: float) -> None:
        """It was there, and is not shown any more: it ended, and that is still to be heard."""
        task.doubts.setdefault(name, Doubt(book.node, generation, now, was_begun=True))

    def _ask_about(self, key: TaskKey, now: float) -> None:
        """A task that runs there and is not known here: it ended elsewhere, or its order has not come yet."""
        asked = self._s.asked_about
        if now < asked.get(key, -1e9) + ASK_AGAIN_S:
            return
        if len(asked) >= ASKED_MAX:
            asked.clear()
        asked[key] = now
        self._s.out.append(ReadTask(*key))

    def _speaks_well(self, book: Book, running: Running, before: Running | None) -> None:
        good_s = self._s.params.good_s
        is_first = running.ran_s >= good_s and (before is None or before.ran_s < good_s)
        if is_first and book.breaker.succeeded(running.attempt):
            self._s.out.append(Publish(NodeTrusted(book.node)))

    # ---- answers -----------------------------------------------------------------------------------------------------

    def answered(self, event: CommandAnswered, now: float) -> None:
        """What came of a command."""
        s = self._s
        key = s.under_way.pop(event.attempt, None)
        task = None if key is None else s.tasks.get(key)
        if task is None:
            return
        promise, answer = task.promises.get(event.attempt), event.answer
        if answer is None:
            if promise is not None and promise.phase == "asked":
                promise.phase, promise.ever_unsure = "unsure", True
                task.told[event.attempt] = now
        else:
            written = answer.attempt
            if written is not None and written.attempt == event.attempt:
                task.hear(event.node, written)
                doubt = task.doubts.get(event.attempt)
                if doubt is not None and written.ending is None:
                    doubt.was_begun = True
            if promise is not None and promise.phase == "asked":
                task.told.pop(event.attempt, None)
                self._taken_or_refused(task, promise, answer, now)
        self._settling.settle(task, now)

    def _taken_or_refused(self, task: Tracked, promise: Promise, answer: CommandAnswer, now: float) -> None:
        s = self._s
        if not answer.code:
            promise.phase, promise.knows_from = "taken", (answer.boot, answer.number)
            task.refusals = 0
            return
        book = s.books.of(promise.node, now)
        self._settling.drop(task, promise)
        book.breaker.over(promise.attempt)
        if task.terms.mode == "at_most_once" and promise.ever_unsure:
            # An earlier one of these commands may still be on its way: only a void attempt is certainly none.
            task.doubts[promise.attempt] = Doubt(promise.node, promise.generation, now, was_begun=False)
        else:
            s.noting.free(promise.attempt)
        match answer.code:
            case "full" | "closed":
                book.shut = answer.words or answer.code
            case "unfit":
                book.fits[s.waiting(task).shape] = False
            case "unwritten":
                self._settling.blame(promise.node, promise.attempt, answer.words, now)
            case _:
                task.refusals += 1
                task.due = max(task.due, now + min(REFUSED_S_MAX, REFUSED_S * 2.0 ** min(task.refusals, 10)))
