"""What a coordinator does about one task: place it, start it, wait, ask, stop, place it again, or let go of it.

`settle` looks at all that is known of a task and does what is to be done now; it is called whenever something of it
changed or is due, and calling it once more does no harm.
"""

from math import ceil
from typing import Final

from protocol.effects import Publish
from protocol.ids import NodeId
from protocol.placement.books import RESERVE_AFTER_S
from protocol.placement.commands import Note, StartAttempt, StopAttempt, VoidAttempt
from protocol.placement.queueing import Waiting
from protocol.placement.scheduling_events import DeclareLost, NodeShunned, NodeTrusted, TaskPlaced
from protocol.placement.standing import LOSSES_MAX, Standing, blames_node, standing
from protocol.placement.tasks import Attempt, AttemptId
from protocol.placement.tracking import Doubt, Promise, SchedulingState, Tracked

_Live = dict[AttemptId, tuple[NodeId, int]]
"""Attempts that may run: where, and of which generation."""

DOUBLE_WORDS: Final = "another attempt of it runs, and began before"
EVICTED_WORDS: Final = "its node was evicted before it said anything; it may have done anything from nothing to all"


class Settling:
    """One part of the scheduling machine; see the module."""

    def __init__(self, state: SchedulingState) -> None:
        self._s = state

    # ---- one task ----------------------------------------------------------------------------------------------------

    def settle(self, task: Tracked, now: float) -> None:
        """Do what is to be done of it now."""
        s = self._s
        self._strike(task)
        self._take_up_notes(task, now)
        attempts = task.attempts()
        stands = task.standing = standing(task.terms, task.wish, attempts, s.is_member)
        for executor, attempt in attempts:
            if attempt.ending is not None:
                self._close(task, executor, attempt, now)
        live = self._live(task, attempts, now)
        self._index(task, {node for node, _ in live.values()})
        wish = task.wish
        halted = stands.is_ended or wish.cancelled or wish.deleted or not s.is_member(task.terms.submitter)
        current = {name: where for name, where in live.items() if where[1] >= wish.generation and not halted}
        for name, (node, generation) in list(live.items()):
            if name not in current and self._stop(task, name, node, generation, stands.words or "cancelled", now):
                del live[name]
        self._thin_out(task, current, now)
        for name, promise in list(task.promises.items()):
            if name in current:
                self._pursue(task, promise, now)
                if name not in task.promises:
                    del current[name]
        for name, doubt in list(task.doubts.items()):
            if name in current:
                self._ask(task, name, doubt, now)
        task.waits_for, task.waits_for_notes = "", False
        if halted:
            s.queue.remove(task.key)
            if stands.is_ended and not live and not task.heard:
                self.let_go(task)
                s.noting.over(task.key)
        else:
            self._queue(task, stands, current, now)

    def let_go(self, task: Tracked) -> None:
        """It ended, or its order is gone; what notes say of it is another matter."""
        s = self._s
        for promise in list(task.promises.values()):
            self.drop(task, promise)
        s.queue.remove(task.key)
        self._index(task, set())
        s.tasks.pop(task.key, None)

    def drop(self, task: Tracked, promise: Promise) -> None:
        """The promise is kept or void: it counts against the node no more."""
        task.promises.pop(promise.attempt, None)
        task.told.pop(promise.attempt, None)
        self._s.books.release(promise.node, promise.attempt)
        self._s.dirty.add(promise.node)

    def _strike(self, task: Tracked) -> None:
        """Nodes that were evicted since: what they said but never wrote down is void."""
        is_member = self._s.is_member
        if all(map(is_member, task.nodes)) and all(is_member(executor) for executor, _ in task.heard):
            return
        me = self._s.me
        task.heard = {where: each for where, each in task.heard.items() if is_member(where[0]) or where[0] == me}
        task.shown = {name: where for name, where in task.shown.items() if is_member(where[0])}
        task.doubts = {name: doubt for name, doubt in task.doubts.items() if is_member(doubt.node)}
        for promise in [promise for promise in task.promises.values() if not is_member(promise.node)]:
            self.drop(task, promise)
            if promise.phase == "noting":
                self._s.noting.free(promise.attempt)

    def _take_up_notes(self, task: Tracked, now: float) -> None:
        """Attempts that others may have started, as notes say: their executors are asked, or they are lost."""
        s = self._s
        if task.terms.mode != "at_most_once":
            return
        known: set[AttemptId] | None = None
        for note in s.noting.of(task.key):
            if known is None:
                known = {attempt.attempt for _, attempt in task.attempts()}
                known.update(task.promises, task.shown, task.doubts)
            if note.attempt in known or note.generation < task.wish.generation:
                continue
            if s.is_member(note.executor):
                since = now - s.params.doubt_s
                task.doubts[note.attempt] = Doubt(note.executor, note.generation, since, was_begun=False)
            elif note.generation == task.wish.generation:
                at_ms = max(1, s.wall_ms(now))
                lost = Attempt(
                    note.attempt, note.generation, 1, s.term, 0, ended_ms=at_ms, ending="lost", words=EVICTED_WORDS
                )
                task.heard[s.me, note.attempt] = lost
                s.out.append(DeclareLost(task.key[0], task.key[1], lost))

    def _close(self, task: Tracked, executor: NodeId, attempt: Attempt, now: float) -> None:
        """An attempt is known to have ended; the first time, that says something of its node."""
        name = attempt.attempt
        promise = task.promises.get(name)
        if promise is not None:
            self.drop(task, promise)
        if promise is not None or name in task.shown:
            self.credit(executor, attempt, now)
        task.shown.pop(name, None)
        task.doubts.pop(name, None)
        task.told.pop(name, None)

    def credit(self, node: NodeId, attempt: Attempt, now: float) -> None:
        """What an end says of its node."""
        breaker = self._s.books.of(node, now).breaker
        if blames_node(attempt):
            self.blame(node, attempt.attempt, attempt.words or f"an attempt was {attempt.ending}", now)
        elif attempt.ending in ("cancelled", "no_input"):
            breaker.over(attempt.attempt)
        elif breaker.succeeded(attempt.attempt):
            self._s.out.append(Publish(NodeTrusted(node)))

    def blame(self, node: NodeId, attempt: AttemptId, words: str, now: float) -> None:
        """It failed by its own fault."""
        pause_s = self._s.books.of(node, now).breaker.failed(attempt, words, now)
        if pause_s:
            self._s.out.append(Publish(NodeShunned(node, pause_s, words)))
            self._s.look_again(now + pause_s)

    def _live(self, task: Tracked, attempts: list[tuple[NodeId, Attempt]], now: float) -> _Live:
        live: _Live = {}
        for executor, attempt in attempts:
            name = attempt.attempt
            if attempt.ending is not None or not self._s.is_member(executor):
                continue
            live[name] = (executor, attempt.generation)
            if name in task.shown or name in task.promises:
                task.doubts.pop(name, None)
            elif name not in task.doubts and self._s.books.of(executor, now).lent is not None:
                task.doubts[name] = Doubt(executor, attempt.generation, now, was_begun=True)
        for name, where in task.shown.items():
            live[name] = where
            task.doubts.pop(name, None)
        for promise in task.promises.values():
            live[promise.attempt] = (promise.node, promise.generation)
        for name, doubt in task.doubts.items():
            live.setdefault(name, (doubt.node, doubt.generation))
        return live

    def _index(self, task: Tracked, nodes: set[NodeId]) -> None:
        by_node = self._s.by_node
        for node in task.nodes - nodes:
            by_node[node].discard(task.key)
            if not by_node[node]:
                del by_node[node]
        for node in nodes - task.nodes:
            by_node.setdefault(node, set()).add(task.key)
        task.nodes = nodes

    # ---- commands ----------------------------------------------------------------------------------------------------

    def _stop(self, task: Tracked, name: AttemptId, node: NodeId, generation: int, why: str, now: float) -> bool:
        """Have it stopped. Whether nothing of it is left: it was never commanded."""
        s = self._s
        promise = task.promises.get(name)
        if promise is not None and promise.phase == "noting":
            self.drop(task, promise)
            s.noting.free(name)
            return True
        if self._may_tell(task, name, node, now):
            was_begun = promise is None and not (name in task.doubts and not task.doubts[name].was_begun)
            s.command(node, StopAttempt(*task.key, name, generation, was_begun, why[:200]), now)
        return False

    def _ask(self, task: Tracked, name: AttemptId, doubt: Doubt, now: float) -> None:
        s = self._s
        if now < doubt.since + s.params.doubt_s:
            s.wake(task, doubt.since + s.params.doubt_s)
        elif self._may_tell(task, name, doubt.node, now):
            s.command(doubt.node, VoidAttempt(*task.key, name, doubt.generation, doubt.was_begun), now)

    def _may_tell(self, task: Tracked, name: AttemptId, node: NodeId, now: float) -> bool:
        """Whether a command goes out now; if not, it is looked at again when it may."""
        s = self._s
        again_at = task.told.get(name, -1e9) + s.params.again_s
        if name in s.under_way or s.books.of(node, now).down_since is not None:
            return False  # its answer, or that it is up, leads here again
        if now < again_at:
            s.wake(task, again_at)
            return False
        s.wake(task, now + s.params.again_s)
        return True

    def _thin_out(self, task: Tracked, current: _Live, now: float) -> None:
        """After a heal two may run: the one that has run for longest goes on."""
        if len(current) < 2:
            return
        ran: list[tuple[float, AttemptId]] = []
        for name, (node, _) in current.items():
            book = self._s.books.of(node, now)
            if book.down_since is None and name in book.shown:
                ran.append((-book.shown[name].ran_s, name))
        if not ran:
            return
        _, kept = min(ran)
        for name, (node, generation) in current.items():
            if name != kept:
                self._stop(task, name, node, generation, DOUBLE_WORDS, now)

    # ---- promises ----------------------------------------------------------------------------------------------------

    def _pursue(self, task: Tracked, promise: Promise, now: float) -> None:
        """Bring a promise on its way, or give it up."""
        s, params = self._s, self._s.params
        if promise.phase == "noting":
            if s.noting.is_held(promise.attempt):
                self._start(task, promise, now)
            elif now >= promise.at + params.note_s:
                self.drop(task, promise)
                s.noting.free(promise.attempt)
            else:
                s.wake(task, promise.at + params.note_s)
        elif promise.phase == "unsure":
            if task.terms.mode == "at_least_once" and now >= promise.at + params.start_s:
                self.drop(task, promise)
                self.blame(promise.node, promise.attempt, "it did not answer a command", now)
                return
            again_at = task.told.get(promise.attempt, now) + params.unsure_s
            is_up = s.books.of(promise.node, now).down_since is None
            if now < again_at or not is_up:
                s.wake(task, again_at if now < again_at else max(now + params.again_s, promise.at + params.start_s))
            elif promise.attempt not in s.under_way:
                self._start(task, promise, now)

    def _start(self, task: Tracked, promise: Promise, now: float) -> None:
        promise.phase = "asked"
        order = StartAttempt(*task.key, promise.attempt, promise.generation, promise.number, promise.why)
        self._s.command(promise.node, order, now, exclusive=task.terms.mode == "at_most_once")

    # ---- the queue ---------------------------------------------------------------------------------------------------

    def _queue(self, task: Tracked, stands: Standing, current: _Live, now: float) -> None:
        """Whether it waits for a place, or for something else."""
        s, params = self._s, self._s.params
        live = list(current.values())
        here = [node for node, _ in live if not s.books.is_gone(node, params.gone_s, now)]
        may_queue = False
        if here:
            for node in here:
                down_since = s.books.of(node, now).down_since
                if down_since is not None:
                    s.wake(task, down_since + params.gone_s)
        elif live and task.terms.mode == "at_most_once":
            name = s.books.of(live[0][0], now).name
            task.waits_for = f"it may run on {name}, which is not heard: it waits for it, or for a person to end it"
        elif live and len(live) + stands.losses > LOSSES_MAX:
            task.waits_for = f"{len(live)} nodes that it was started on are not heard: it waits for one of them"
        elif stands.state == "pending" or live:
            if stands.pause_s and task.due_of != stands.failed_ms:
                left_s = (stands.again_at_ms - s.wall_ms(now)) / 1000
                task.due_of, task.due = stands.failed_ms, now + min(stands.pause_s, max(0.0, left_s))
            if now < task.due:
                task.waits_for = stands.words or "its last node refused it; it is tried again"
                s.wake(task, task.due)
            elif task.terms.mode == "at_most_once" and not s.noting.is_ready:
                task.waits_for_notes = True
            else:
                may_queue = True
        if may_queue:
            s.enqueue(task)
        else:
            s.queue.remove(task.key)

    def place(self, waiting: Waiting, now: float) -> bool:
        """Its turn: whether there was room. The queue lets go of it then."""
        s, task = self._s, self._s.tasks[waiting.key]
        shape = waiting.shape
        found = None
        if shape not in s.refused:
            among = s.dirty if shape in s.blocked else None
            found = s.books.choose(waiting, task.terms.mark, task.failed_at, among, now)
        if found is None:
            s.refused.add(shape)
            s.block(shape)
            if shape not in s.unreserved:
                over_at = s.books.reserve(waiting, now)
                if over_at is not None:
                    s.look_again(float(ceil(over_at)))  # many end within the same second
                elif now - waiting.since >= RESERVE_AFTER_S:
                    s.unreserved.add(shape)
            return False
        book, choice = found
        name = f"{s.rng.getrandbits(64):016x}"
        stands = task.standing
        assert stands is not None  # it was settled before it was queued
        number = max(stands.number, 1 + max((promise.number for promise in task.promises.values()), default=0))
        generation = task.wish.generation
        promise = Promise(book.node, name, generation, number, choice.words, now, "noting")
        task.promises[name] = promise
        s.books.promise(book, name, task.key, shape)
        self._index(task, task.nodes | {book.node})
        s.placed += 1
        s.out.append(Publish(TaskPlaced(task.key[0], task.key[1], name, book.node, number, choice.words)))
        if task.terms.mode == "at_least_once":
            self._start(task, promise, now)
        else:
            s.noting.hold(task.key, Note(task.key[0], task.key[1], generation, name, book.node))
            s.wake(task, now + s.params.note_s)
        return True
