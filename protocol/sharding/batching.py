"""What the first stage of a pipeline computes next: slots, continuous batching, prefix reuse, drafts, eviction.

A session waits, then holds a slot. Its prompt is fed in chunks, several of which may be under way in the stages at
once; then its tokens one step at a time, because each needs the one before. Slots keep what they hold after a session,
and the next prompt that begins the same goes there. Pure: it says what to send down the chain, in order, and is told
what was sampled. Its tables are in slots.py; computing is the engine's, choosing tokens the last stage's.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from protocol.sharding.drafting import Drafter
from protocol.sharding.frames import Accepted, Finish, FrameError, Open, RefusalCode, Refused, SeqClose, SeqOpen
from protocol.sharding.slots import (
    EXACT_ROWS_MIN,
    POOLED_ROWS_MAX,
    PREFILL_ROWS_MIN,
    Limits,
    Session,
    Slot,
    common_prefix,
    next_group,
)
from protocol.sharding.steps import OUTPUTS_MAX, Run, Sampled, Taken

REUSE_SHARE_MIN: Final = 0.1
"""A shorter common prefix than this share of the prompt is not worth another session's long one."""


class StepPlan(NamedTuple):
    """Compute this: `tokens` of all runs, one after the other."""

    number: int
    runs: tuple[Run, ...]
    tokens: tuple[int, ...]


Action = SeqOpen | SeqClose | StepPlan


class _Sent(NamedTuple):
    session: bytes
    entry: bytes
    run: Run


class Batcher:
    """The sequencer of one pipeline. Every method returns or raises at once; nothing here knows the time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._slots = [Slot() for _ in range(limits.slots)]
        self._sessions: dict[bytes, Session] = {}
        self._waiting: deque[Session] = deque()
        self._under_way: dict[int, tuple[_Sent, ...]] = {}
        self._actions: list[Action] = []
        self._drops: list[int] = []  # slots that the next step empties
        self._step = 0
        self._order = 0
        self.drafting = True
        """Whether to guess at all; the engine knows whether it pays."""

        self.drafted = 0
        self.drafts_accepted = 0

    # ---- figures

    @property
    def active(self) -> int:
        """Sessions that hold a slot."""
        return sum(slot.session is not None for slot in self._slots)

    @property
    def queued(self) -> int:
        """Sessions that wait for one."""
        return len(self._waiting)

    @property
    def under_way(self) -> int:
        """Steps that were sent and not answered."""
        return len(self._under_way)

    @property
    def cells_used(self) -> int:
        """Tokens that all slots hold, and those promised to sessions whose prompt is still being fed."""
        return sum(slot.cells for slot in self._slots)

    def all_sessions(self) -> list[tuple[bytes, bytes]]:
        """Session and entry of all."""
        return [(id_, session.request.entry) for id_, session in self._sessions.items()]

    def sessions_of(self, entry: bytes) -> list[bytes]:
        """All sessions of a node: what to cancel when it is gone."""
        return [id_ for id_, session in self._sessions.items() if session.request.entry == entry]

    def entry_of(self, session: bytes) -> bytes | None:
        """Whose session it is; None for an unknown one."""
        known = self._sessions.get(session)
        return None if known is None else known.request.entry

    def cached_of(self, session: bytes) -> int:
        """How many tokens of a session's prompt were not computed again; 0 for an unknown one."""
        known = self._sessions.get(session)
        return 0 if known is None else known.cached

    def waiting_sessions(self) -> list[tuple[bytes, bytes]]:
        """Session and entry of those without a slot, whom only this stage can tell that it lives."""
        return [(session.request.session, session.request.entry) for session in self._waiting]

    # ---- sessions come and go

    def open(self, request: Open) -> Accepted | Refused:
        """Take a session in or refuse it; a refusal changes nothing. `request.sampling` has a grammar that compiles."""
        limits, length = self._limits, len(request.prompt) + len(request.generated)
        if request.session in self._sessions:
            return Refused(request.session, RefusalCode.BAD_REQUEST, "This session is open already.", retryable=False)
        if not request.prompt:
            return Refused(request.session, RefusalCode.BAD_REQUEST, "The prompt has no tokens.", retryable=False)
        room = min(limits.context, limits.cells)
        if length + (0 if request.pooling else 1) > room:
            words = f"{length} tokens do not fit into a context of {room}. Shorten the conversation."
            return Refused(request.session, RefusalCode.CONTEXT_FULL, words, retryable=False)
        if len(self._waiting) >= limits.queue_max:
            words = f"{len(self._waiting)} sessions wait already. Try again later."
            return Refused(request.session, RefusalCode.BUSY, words, retryable=True)
        text = [*request.prompt, *request.generated]
        guesses = limits.draft_tokens_max if limits.can_rewind and request.sampling.speculate else 0
        self._order += 1
        session = Session(
            request,
            max_tokens=min(request.sampling.max_tokens, room - len(request.prompt)),
            text=text,
            drafter=Drafter(guesses, text) if guesses and not request.pooling else None,
            arrived=self._order,
            order=self._order,
        )
        self._sessions[request.session] = session
        self._waiting.append(session)
        self._admit()
        return Accepted(request.session, session.slot, session.cached)

    def close(self, session_id: bytes) -> None:
        """The session is over, cancelled or failed. Steps under way go on; what they bring is ignored."""
        session = self._sessions.pop(session_id, None)
        if session is None:
            return
        if session.slot is None:
            self._waiting.remove(session)
            return
        self._leave(session)

    def _leave(self, session: Session) -> None:
        number, session.slot = session.slot, None
        assert number is not None
        slot = self._slots[number]
        # Guesses under way may be wrong, so only what is known to be text counts as held.
        slot.held = slot.held[: len(session.text)]
        slot.session = None
        self._touch(slot)
        self._actions.append(SeqClose(session.request.session, number))

    def forget(self, number: int) -> None:
        """What a slot holds is not to be relied on (its stage failed half-way): the next step empties it."""
        self._slots[number].held = []
        self._drops.append(number)

    def held(self, number: int) -> Sequence[int]:
        """The tokens a slot holds."""
        return self._slots[number].held

    def restore(self, number: int, tokens: Sequence[int]) -> None:
        """An idle slot was filled from a snapshot. Raises FrameError if it is not idle or does not fit."""
        slot = self._slots[number]
        if slot.session is not None or self.cells_used - len(slot.held) + len(tokens) > self._limits.cells:
            raise FrameError(f"slot {number} cannot take a snapshot of {len(tokens)} tokens")
        slot.held = list(tokens)
        self._touch(slot)

    def is_idle(self, number: int) -> bool:
        """Whether a slot exists and has no session."""
        return number < len(self._slots) and self._slots[number].session is None

    def _touch(self, slot: Slot) -> None:
        self._order += 1
        slot.used = self._order

    # ---- a slot for a session

    def _admit(self) -> None:
        while self._waiting:
            session = self._waiting[0]
            number, reuse = self._choose_slot(session)
            if number is None:
                return
            slot = self._slots[number]
            if not self._make_room(len(session.text) + 1 - len(slot.held), keep=number):
                return
            self._waiting.popleft()
            slot.held = slot.held[:reuse]
            slot.session = session
            session.slot, session.fed, session.awaiting = number, reuse, False
            if not session.begun:
                session.begun, session.cached = True, min(reuse, session.prompt_length)
            self._actions.append(self._seq_open(session, number))

    def _seq_open(self, session: Session, number: int) -> SeqOpen:
        request, sampling = session.request, session.request.sampling
        recent = request.prompt[-sampling.penalty_window :] if sampling.has_penalties else ()
        return SeqOpen(
            request.session,
            number,
            request.entry,
            msgspec.structs.replace(sampling, max_tokens=session.max_tokens),
            tuple(session.text[session.prompt_length :]),
            recent,
            request.pooling,
            session.prompt_length,
        )

    def _choose_slot(self, session: Session) -> tuple[int | None, int]:
        """The idle slot that holds the longest beginning of the text, and how much of it; else the longest unused."""
        idle = [number for number, slot in enumerate(self._slots) if slot.session is None]
        if not idle:
            return None, 0
        oldest = min(idle, key=lambda number: (bool(self._slots[number].held), self._slots[number].used))
        if session.request.pooling:
            return oldest, 0
        common = {number: self._reusable(self._slots[number], session) for number in idle}
        best = max(idle, key=lambda number: (common[number], -self._slots[number].used))
        if common[best] < REUSE_SHARE_MIN * len(session.text):
            return oldest, common[oldest]
        return best, common[best]

    def _reusable(self, slot: Slot, session: Session) -> int:
        # The last token is always computed: its output is what everything is for.
        length = common_prefix(slot.held, session.text, len(session.text) - 1)
        if session.is_exact:
            length = slot.exact(length, session.prompt_length)
            if length < session.prompt_length:
                # What is left is a batch of the size from which on sizes do not matter.
                length = max(0, min(length, session.prompt_length - EXACT_ROWS_MIN))
        return length if self._limits.can_rewind or length == len(slot.held) else 0

    def _make_room(self, needed: int, keep: int | None = None) -> bool:
        """Drop what idle slots hold, longest unused first, until `needed` cells are free."""
        free = self._limits.cells - self.cells_used
        if free >= needed:
            return True
        idle = [number for number, slot in enumerate(self._slots) if slot.session is None and slot.held]
        idle = sorted((number for number in idle if number != keep), key=lambda number: self._slots[number].used)
        if free + sum(len(self._slots[number].held) for number in idle) < needed:
            return False
        for number in idle:
            if free >= needed:
                break
            free += len(self._slots[number].held)
            self.forget(number)
        return True

    # ---- steps

    def slow_down(self) -> None:
        """A step took so long that streams stall and signs of life come late: feed prompts in smaller chunks."""
        rows = max(PREFILL_ROWS_MIN, self._limits.prefill_rows // 2)
        self._limits = dataclasses.replace(self._limits, prefill_rows=rows)

    def actions(self) -> list[Action]:
        """What to do and send on now, in this order; at most one step. Empty: wait for a frame."""
        self._admit()
        stages = self._limits.stages
        # One more than there are stages, so that the first one never waits for the way of an answer.
        plan = self._plan_step() if len(self._under_way) < (1 if stages == 1 else stages + 1) else None
        done, self._actions = self._actions, []
        if plan is not None:
            done.append(plan)
        return done

    def _plan_step(self) -> StepPlan | None:
        chosen: list[tuple[Session, Run]] = []
        rows = self._plan_decoding(chosen)
        self._plan_prefill(chosen, rows)
        # A slot that was emptied and is used again is truncated by its own run.
        used = {run.slot for _, run in chosen}
        runs = [Run(number, 0, 0, 0) for number in dict.fromkeys(self._drops) if number not in used]
        self._drops = []
        tokens: list[int] = []
        sent: list[_Sent] = []
        for session, run in chosen:
            slot = self._slots[run.slot]
            new = [*session.text[run.start : run.start + run.rows], *run.drafts]
            new = new[: run.rows]
            slot.held[run.start :] = new
            slot.computed(run.start, run.rows, alone=run.rows == 1 or bool(run.drafts and not session.request.pooling))
            tokens += new
            runs.append(run)
            sent.append(_Sent(session.request.session, session.request.entry, run))
        if not runs:
            return None
        self._step = (self._step + 1) % (1 << 32)
        self._under_way[self._step] = tuple(sent)
        return StepPlan(self._step, tuple(runs), tuple(tokens))

    def _plan_decoding(self, chosen: list[tuple[Session, Run]]) -> int:
        """One token and its guesses for the sessions whose turn it is; several groups share the stages."""
        decoding = [s for s in self._sessions.values() if s.slot is not None and s.is_decoding]
        under_way = sum(any(one.run.outputs for one in sent) for sent in self._under_way.values())
        rows = 0
        for session in next_group(decoding, self._limits.stages, under_way):
            if session.slot is None:
                continue  # it had to make room for an older one a moment ago
            at = len(session.text) - 1
            room = min(self._limits.rows_max - rows, OUTPUTS_MAX) - 1
            left = session.max_tokens - (len(session.text) - session.prompt_length) - 1
            drafts: tuple[int, ...] = ()
            if self.drafting and session.drafter is not None and not session.alone:
                drafts = session.drafter.draft(max(0, min(room, left)))
            session.alone = False
            if room < 0 or not self._room_for(session, 1 + len(drafts), chosen):
                continue
            run = Run(session.slot, 1 + len(drafts), at, 1 + len(drafts), drafts)
            chosen.append((session, run))
            rows += run.rows
            session.fed, session.awaiting = len(session.text), True
            self._order += 1
            session.order = self._order
        return rows

    def _room_for(self, session: Session, rows: int, chosen: list[tuple[Session, Run]]) -> bool:
        """Cells for the next rows, at the cost of what idle slots hold, then of the session that came last."""
        assert session.slot is not None
        needed = len(session.text) - 1 + rows - self._slots[session.slot].cells
        while not self._make_room(needed):
            younger = [s for s in self._sessions.values() if s.slot is not None and s.arrived > session.arrived]
            free = [s for s in younger if not s.awaiting and all(s is not other for other, _ in chosen)]
            if free:
                self._put_back(max(free, key=lambda other: other.arrived))
            elif younger:
                return False  # its turn comes again when one of them was answered
            else:
                self._put_back(session)
                return False
        return True

    def _put_back(self, session: Session) -> None:
        """Take a session's slot away; it begins again, with what it has said so far, when there is room."""
        number = session.slot
        assert number is not None
        self._leave(session)
        self.forget(number)
        self._waiting.appendleft(session)

    def _plan_prefill(self, chosen: list[tuple[Session, Run]], rows: int) -> None:
        limits = self._limits
        holding = [session for session in self._sessions.values() if session.slot is not None]
        streams = any(session.is_decoding for session in holding)
        wanted = limits.prefill_rows_beside_streams if streams else limits.prefill_rows
        budget = min(limits.rows_max - rows, wanted)
        feeding = [session for session in holding if not session.awaiting and not session.is_decoding]
        for session in sorted(feeding, key=lambda session: session.order):
            left = len(session.text) - session.fed
            if left <= 0 or budget <= 0:
                continue
            part = session.prompt_length - session.fed if session.is_exact else left
            if part <= 0:
                part = 1  # what was said before is computed as it was then: one by one
            assert session.slot is not None
            pooled = bool(session.request.pooling)
            count = min(left, part, budget, POOLED_ROWS_MAX if pooled else budget)
            least = min(EXACT_ROWS_MIN, wanted // 2)
            if not pooled and count < part:
                # Neither these rows nor the rest may be too small a batch: their numbers would be others.
                count = min(count, part - least) if part >= 2 * least else part
                if count < least or count > budget:
                    continue  # in the next step there is room
            last = count == left
            outputs = count if pooled else int(last)
            at = session.fed
            drafts = tuple(session.text[at + 1 : at + count]) if pooled else ()
            chosen.append((session, Run(session.slot, count, at, outputs, drafts)))
            session.fed += count
            session.awaiting = last
            budget -= count

    # ---- what came back

    def take(self, sampled: Sampled) -> list[tuple[bytes, bytes, Taken]]:
        """The last stage's answer to a step. Returns session, entry and what was taken, of sessions still open.

        Raises FrameError if it does not belong to a step under way; nothing has changed then.
        """
        sent = self._under_way.get(sampled.step)
        if sent is None:
            raise FrameError(f"tokens of step {sampled.step}, which is not under way")
        by_slot = {one.run.slot: one for one in sent if one.run.outputs}
        for taken in sampled.runs:
            one = by_slot.get(taken.slot)
            if one is None or len(taken.tokens) > one.run.outputs:
                raise FrameError(f"step {sampled.step} has no {len(taken.tokens)} outputs for slot {taken.slot}")
            if taken.tokens[:-1] != one.run.drafts[: max(0, len(taken.tokens) - 1)]:
                raise FrameError(f"slot {taken.slot}: tokens were accepted that were not guessed")
        answers = {taken.slot: taken for taken in sampled.runs}
        del self._under_way[sampled.step]
        # A run that a stage on the way had to leave out has failed.
        settled = [(one, answers.get(slot, Taken(slot, (), Finish.ERROR))) for slot, one in by_slot.items()]
        return [(one.session, one.entry, taken) for one, taken in settled if self._settle(one, taken)]

    def _settle(self, one: _Sent, taken: Taken) -> bool:
        session = self._sessions.get(one.session)
        if session is None or session.slot != one.run.slot:
            return False
        run = one.run
        session.awaiting = False
        if not session.request.pooling:
            right = max(0, len(taken.tokens) - 1)
            # Guesses that were not accepted lie behind what counts; the next run overwrites them.
            self._slots[run.slot].held[run.start + run.rows - (run.outputs - 1) + right :] = []
            session.text += taken.tokens
            if session.drafter is not None:
                session.drafter.extend(taken.tokens)
                session.drafter.judge(len(run.drafts), right)
            self.drafted += len(run.drafts)
            self.drafts_accepted += right
            session.alone = not taken.tokens
            session.fed = len(session.text) - 1
        if taken.finish is not Finish.NONE:
            self.close(one.session)
        if taken.finish is Finish.ERROR:
            self.forget(run.slot)
        return True
