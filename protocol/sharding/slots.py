"""The tables of the batcher: what the stages can hold, what a slot holds, how far a session has come.

Records without decisions; the decisions are in batching.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from protocol.sharding.drafting import Drafter
from protocol.sharding.frames import Open

PREFILL_ROWS_MAX: Final = 256
PREFILL_ROWS_BESIDE_STREAMS: Final = 32
"""Rows of prompt in a step that also serves streams: they wait for it, so it is short."""

PREFILL_ROWS_MIN: Final = 32
EXACT_ROWS_MIN: Final = 16
"""From so many rows in a batch on, a row's numbers are the same in batches of any size (llama.cpp on x86: from 2 or 8
on, by the type of the weights)."""

DRAFT_TOKENS_MAX: Final = 15
QUEUE_MAX: Final = 64
POOLED_ROWS_MAX: Final = 64
"""Every row of a pooled session is an output, and outputs cost memory for the whole vocabulary."""


@dataclass(frozen=True)
class Limits:
    """What the stages can hold. `context` is the longest session, `cells` what all slots hold together, in tokens.

    Wrong guesses stay in a stage's memory until the slot's next run, so it needs cells_needed() of them.
    """

    slots: int
    context: int
    cells: int
    stages: int = 1
    rows_max: int = 512
    prefill_rows: int = PREFILL_ROWS_MAX
    prefill_rows_beside_streams: int = PREFILL_ROWS_BESIDE_STREAMS
    draft_tokens_max: int = DRAFT_TOKENS_MAX
    queue_max: int = QUEUE_MAX
    can_rewind: bool = True
    """False for models with a recurrent state: what a slot holds can be added to or dropped, but not shortened."""


def cells_needed(limits: Limits) -> int:
    """How many cells every stage must have for these limits."""
    return limits.cells + limits.slots * (limits.draft_tokens_max + 1)


@dataclass
class Session:
    """One session, waiting or in a slot."""

    request: Open
    max_tokens: int
    text: list[int]  # prompt and answer
    drafter: Drafter | None
    slot: int | None = None
    fed: int = 0  # tokens of `text` that were put into steps
    awaiting: bool = False  # a step with outputs of this session is under way
    alone: bool = False  # the next token is to be computed without guesses
    arrived: int = 0
    order: int = 0  # whose turn it is: the lowest
    cached: int = 0
    begun: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def is_exact(self) -> bool:
        """Whether the same answer is owed whatever is held already: it is greedy, or its chances are fixed."""
        return self.request.sampling.temperature == 0.0 or self.request.sampling.fixed

    @property
    def is_decoding(self) -> bool:
        return self.fed >= len(self.text) - 1 and not self.request.pooling


@dataclass
class Slot:
    """One sequence number of all stages."""

    held: list[int] = field(default_factory=list)  # tokens whose cells are filled once all steps sent are done
    session: Session | None = None
    used: int = 0
    batched: int = 0  # so many first tokens were computed in batches of EXACT_ROWS_MIN rows or more, as prompts are
    alone_end: int = 0  # and those up to here one by one, as answers are; of the others it is not known

    @property
    def cells(self) -> int:
        return max(len(self.held), 0 if self.session is None else len(self.session.text))

    def computed(self, start: int, rows: int, *, alone: bool) -> None:
        """Rows from `start` on are computed anew, in one batch or, `alone`, one by one."""
        self.batched = min(self.batched, start)
        self.alone_end = max(self.batched, min(self.alone_end, start))
        if alone and self.alone_end == start:
            self.alone_end = start + rows
        elif not alone and rows >= EXACT_ROWS_MIN and self.batched == self.alone_end == start:
            self.batched = self.alone_end = start + rows

    def exact(self, length: int, prompt_length: int) -> int:
        """How many of the first `length` tokens were computed as a new session with such a prompt would do it."""
        if self.batched == prompt_length:
            return min(length, self.alone_end)
        return min(length, prompt_length, self.batched)


def common_prefix(one: Sequence[int], other: Sequence[int], length_max: int) -> int:
    """How many first tokens both share, `length_max` at most."""
    length = min(len(one), len(other), length_max)
    low, high = 0, length
    # Comparing slices runs at the speed of memory; halving finds the first difference in a dozen of them.
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def next_group(decoding: list[Session], stages: int, under_way: int) -> list[Session]:
    """Whose next tokens are computed at once, the longest waiting first.

    The sessions are divided by their slots into as many groups as there are stages, for only rows of slots that follow
    each other are computed at once, and a group more would cost nearly as much as a whole one. Those that came apart
    wait for each other unless fewer than `stages` steps are `under_way`, which would leave a stage idle.
    """
    ordered = sorted(decoding, key=lambda session: session.slot or 0)
    size, larger = divmod(len(ordered), stages)
    ends = [size * number + min(number, larger) for number in range(stages + 1)]
    groups = [ordered[begin:end] for begin, end in pairwise(ends) if end > begin]
    ready = [group for group in groups if not any(session.awaiting for session in group)]
    if not ready and under_way < stages:
        parts = ([session for session in group if not session.awaiting] for group in groups)
        ready = [part for part in parts if part]
    chosen = min(ready, key=lambda group: min(session.order for session in group), default=[])
    return sorted(chosen, key=lambda session: session.order)
