"""The batcher against stages that are honest, and against a last stage that is not."""

import random
from collections import deque
from dataclasses import replace

import pytest

from protocol.sharding.batching import Action, Batcher, StepPlan
from protocol.sharding.frames import Accepted, Finish, FrameError, Open, RefusalCode, Refused, SeqClose, SeqOpen
from protocol.sharding.sampling import Sampling
from protocol.sharding.slots import Limits, cells_needed, common_prefix
from protocol.sharding.steps import Run, Sampled, Taken

ENTRY = b"e" * 20
LIMITS = Limits(slots=3, context=80, cells=100, rows_max=40, prefill_rows=16, prefill_rows_beside_streams=4)


def session(number: int) -> bytes:
    return number.to_bytes(16, "big")


def opening(number: int, prompt: list[int], max_tokens: int = 10, **sampling: object) -> Open:
    return Open(session(number), ENTRY, tuple(prompt), Sampling(max_tokens=max_tokens, **sampling))


def next_token(text: list[int]) -> int:
    """What the stages' model says: it depends on all of the text's end, and repeats itself now and then."""
    return (sum(text[-3:]) * 7 + len(text) % 5) % 11


class Stages:
    """What later stages do, and what they hold; every promise of the batcher is checked here."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held: dict[int, list[int]] = {}
        self.open: dict[int, SeqOpen] = {}
        self.prompts: dict[bytes, list[int]] = {}
        self.said: dict[bytes, list[int]] = {}
        self.finished: set[bytes] = set()

    def do(self, action: Action) -> Sampled | None:
        if isinstance(action, SeqOpen):
            assert action.slot not in self.open
            assert list(action.generated) == self.said[action.session]
            self.open[action.slot] = action
            return None
        if isinstance(action, SeqClose):
            self.open.pop(action.slot)
            return None
        return Sampled(action.number, tuple(self.step(action)))

    def step(self, plan: StepPlan) -> list[Taken]:
        for run in plan.runs:
            held = self.held.setdefault(run.slot, [])
            assert len(held) >= run.start, "a run leaves a hole"
            del held[run.start :]
        taken, row = [], 0
        for run in plan.runs:
            self.held[run.slot] += plan.tokens[row : row + run.rows]
            row += run.rows
            if run.outputs:
                taken.append(self.answer(run))
        assert row == len(plan.tokens) <= self.limits.rows_max
        assert sum(map(len, self.held.values())) <= cells_needed(self.limits)
        return taken

    def answer(self, run: Run) -> Taken:
        opened = self.open.get(run.slot)
        if opened is None or opened.session in self.finished:
            return Taken(run.slot, (), Finish.ERROR)
        said = self.said[opened.session]
        text = [*self.prompts[opened.session], *said]
        assert self.held[run.slot][: len(text)] == text, "the slot holds another text"
        accepted: list[int] = []
        for place in range(run.outputs):
            token = next_token(text)
            text.append(token)
            accepted.append(token)
            said.append(token)
            if len(said) >= opened.sampling.max_tokens:
                self.finished.add(opened.session)
                return Taken(run.slot, tuple(accepted), Finish.LENGTH)
            if place < len(run.drafts) and run.drafts[place] != token:
                break
        return Taken(run.slot, tuple(accepted), Finish.NONE)


def serve(seed: int, stages: int, *, sessions: int = 12, can_rewind: bool = True) -> Batcher:
    rng = random.Random(seed)
    limits = replace(LIMITS, stages=stages, can_rewind=can_rewind)
    batcher, chain, way = Batcher(limits), Stages(limits), deque[Action]()
    opened = 0
    for _ in range(4000):
        if opened < sessions and rng.random() < 0.1:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 50))]
            id_ = session(opened)
            chain.prompts[id_], chain.said[id_] = prompt, []
            assert isinstance(batcher.open(opening(opened, prompt, rng.randrange(1, 40))), Accepted)
            opened += 1
        if opened and rng.random() < 0.01:
            victim = session(rng.randrange(opened))
            batcher.close(victim)
            chain.finished.add(victim)
        way.extend(batcher.actions())
        assert batcher.under_way <= (1 if stages == 1 else stages + 1)
        if way and rng.random() < 0.7:
            sampled = chain.do(way.popleft())
            if sampled is not None:
                batcher.take(sampled)
    assert len(chain.finished) == opened == sessions, "somebody was never served"
    assert batcher.active == batcher.queued == 0
    return batcher


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("seed", range(15))
def test_everybody_is_served_and_slots_hold_what_they_should(seed: int, stages: int) -> None:
    serve(seed, stages)


@pytest.mark.parametrize("seed", range(5))
def test_models_that_cannot_go_back_are_served_too(seed: int) -> None:
    batcher = serve(seed, 2, can_rewind=False)
    assert batcher.drafted == 0


def test_guesses_are_made_and_counted() -> None:
    drafted = [serve(seed, 1) for seed in range(8)]
    assert sum(batcher.drafts_accepted for batcher in drafted) > 0


def run_to_end(batcher: Batcher, chain: Stages) -> list[StepPlan]:
    plans = []
    while actions := batcher.actions():
        for action in actions:
            sampled = chain.do(action)
            if sampled is not None:
                assert isinstance(action, StepPlan)
                plans.append(action)
                batcher.take(sampled)
    return plans


def ask(batcher: Batcher, chain: Stages, number: int, prompt: list[int], max_tokens: int = 3) -> Accepted:
    chain.prompts[session(number)], chain.said[session(number)] = prompt, []
    answer = batcher.open(opening(number, prompt, max_tokens))
    assert isinstance(answer, Accepted)
    return answer


def test_a_shared_beginning_is_not_computed_again() -> None:
    batcher, chain = Batcher(LIMITS), Stages(LIMITS)
    first = ask(batcher, chain, 0, list(range(40)))
    run_to_end(batcher, chain)
    second = ask(batcher, chain, 1, [*range(30), 99, 98])
    assert (first.cached_tokens, second.cached_tokens, second.slot) == (0, 30, first.slot)
    assert run_to_end(batcher, chain)[0].tokens == (99, 98)
    third = ask(batcher, chain, 2, [*range(30), 99, 98])
    assert third.cached_tokens == 31, "the last token is always computed: its output is what is wanted"


def test_a_short_common_beginning_leaves_the_long_one_alone() -> None:
    batcher, chain = Batcher(LIMITS), Stages(LIMITS)
    first = ask(batcher, chain, 0, list(range(40)))
    run_to_end(batcher, chain)
    other = ask(batcher, chain, 1, [0, *range(50, 70)])
    assert other.slot != first.slot


def test_a_prompt_is_fed_in_chunks_and_in_smaller_ones_beside_streams() -> None:
    batcher, chain = Batcher(LIMITS), Stages(LIMITS)
    ask(batcher, chain, 0, list(range(40)), max_tokens=20)
    plans = []
    for _ in range(3):
        for action in batcher.actions():
            sampled = chain.do(action)
            if sampled is not None:
                plans.append(action)
                batcher.take(sampled)
    assert [len(plan.tokens) for plan in plans] == [16, 16, 8]
    ask(batcher, chain, 1, list(range(50, 60)), max_tokens=1)
    plans = run_to_end(batcher, chain)
    mixed = [[run.rows for run in plan.runs if run.slot == 1] for plan in plans]
    assert mixed[:3] == [[4], [4], [2]]
    assert all(any(run.slot == 0 for run in plan.runs) for plan in plans[:3]), "the stream stood still"


def test_groups_share_the_stages() -> None:
    limits = replace(LIMITS, slots=8, cells=400, stages=4, draft_tokens_max=0)
    batcher, chain = Batcher(limits), Stages(limits)
    for number in range(8):
        ask(batcher, chain, number, [number + 1], max_tokens=50)
    way = [action for _ in range(8) for action in batcher.actions()]
    plans = [action for action in way if isinstance(action, StepPlan)]
    assert [len(plan.runs) for plan in plans] == [2, 2, 2, 2]


def test_a_group_is_of_neighbouring_slots_for_only_those_are_computed_at_once() -> None:
    limits = replace(LIMITS, slots=4, cells=400, stages=2, draft_tokens_max=0)
    batcher, chain = Batcher(limits), Stages(limits)
    for number, length in enumerate((4, 60, 4, 4)):
        ask(batcher, chain, number, [number * 80 + place for place in range(length)], max_tokens=18)
    plans = run_to_end(batcher, chain)
    pairs = [sorted(run.slot for run in plan.runs) for plan in plans if [run.rows for run in plan.runs] == [1, 1]]
    assert [0, 1] in pairs
    assert [2, 3] in pairs
    settled = pairs[pairs.index([0, 1]) :]
    apart = [pair for pair in settled if pair[1] - pair[0] != 1]
    assert not apart


@pytest.mark.parametrize("seed", range(5))
def test_those_left_over_join_others_instead_of_being_a_group_of_their_own(seed: int) -> None:
    limits = replace(LIMITS, slots=8, context=300, cells=2400, stages=4, draft_tokens_max=0)
    batcher, chain, rng = Batcher(limits), Stages(limits), random.Random(seed)
    way: deque[Action] = deque()

    def answer() -> StepPlan:
        """The oldest step under way comes back."""
        while not isinstance(action := way.popleft(), StepPlan):
            chain.do(action)
        batcher.take(chain.do(action))
        return action

    for number in range(8):
        ask(batcher, chain, number, [number * 80 + place for place in range(rng.randrange(1, 60))], max_tokens=200)
        for _ in range(rng.randrange(6)):
            way.extend(batcher.actions())
            if batcher.under_way:
                answer()
    groups = []
    for _ in range(120):
        while actions := batcher.actions():
            way.extend(actions)
        groups.append(sorted(run.slot for run in answer().runs))
    assert {len(slots) for slots in groups[-40:]} == {2}
    assert all(slots[1] - slots[0] == 1 for slots in groups[-40:])


REFUSED = {
    "no prompt": (Open(session(1), ENTRY, ()), RefusalCode.BAD_REQUEST, False),
    "too long": (opening(1, [1] * 80), RefusalCode.CONTEXT_FULL, False),
    "twice": (opening(0, [1]), RefusalCode.BAD_REQUEST, False),
}


@pytest.mark.parametrize(("request_", "code", "retryable"), REFUSED.values(), ids=REFUSED)
def test_refusals(request_: Open, code: RefusalCode, retryable: bool) -> None:
    batcher = Batcher(LIMITS)
    batcher.open(opening(0, [1]))
    answer = batcher.open(request_)
    assert isinstance(answer, Refused)
    assert (answer.code, answer.retryable) == (code, retryable)


def test_a_full_queue_is_busy() -> None:
    batcher = Batcher(replace(LIMITS, slots=1, queue_max=2))
    answers = [batcher.open(opening(number, [1])) for number in range(4)]
    assert [type(answer) for answer in answers] == [Accepted, Accepted, Accepted, Refused]
    assert [answer.slot for answer in answers[:3]] == [0, None, None]
    assert answers[3].code is RefusalCode.BUSY


def test_the_context_bounds_the_answer() -> None:
    batcher, chain = Batcher(LIMITS), Stages(LIMITS)
    ask(batcher, chain, 0, [1] * 70, max_tokens=1000)
    run_to_end(batcher, chain)
    assert len(chain.said[session(0)]) == 10


def started() -> tuple[Batcher, StepPlan]:
    batcher = Batcher(LIMITS)
    batcher.open(opening(0, [1, 2, 3, 1, 2]))
    [_, plan] = batcher.actions()
    assert isinstance(plan, StepPlan)
    return batcher, plan


LIES = {
    "another step": Sampled(77, ()),
    "another slot": Sampled(1, (Taken(2, (1,), Finish.NONE),)),
    "more than was asked": Sampled(1, (Taken(0, (1, 2), Finish.NONE),)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies_are_refused_and_change_nothing(lie: Sampled) -> None:
    batcher, plan = started()
    assert plan.number == 1
    with pytest.raises(FrameError):
        batcher.take(lie)
    assert batcher.take(Sampled(1, (Taken(0, (3,), Finish.NONE),)))


def test_tokens_that_were_not_guessed_cannot_be_accepted() -> None:
    batcher, _ = started()
    batcher.take(Sampled(1, (Taken(0, (3,), Finish.NONE),)))
    [plan] = batcher.actions()
    assert isinstance(plan, StepPlan)
    [run] = plan.runs
    assert run.drafts == (1, 2, 3)
    with pytest.raises(FrameError):
        batcher.take(Sampled(2, (Taken(0, (9, 2), Finish.NONE),)))
    batcher.take(Sampled(2, (Taken(0, (1, 9), Finish.NONE),)))
    assert list(batcher.held(0)) == [1, 2, 3, 1, 2, 3, 1]


def test_a_run_that_was_left_out_has_failed() -> None:
    batcher, _ = started()
    [(id_, entry, taken)] = batcher.take(Sampled(1, ()))
    assert (id_, entry, taken.finish) == (session(0), ENTRY, Finish.ERROR)
    assert batcher.active == 0


def test_what_comes_for_a_cancelled_session_is_ignored() -> None:
    batcher, _ = started()
    batcher.close(session(0))
    assert batcher.take(Sampled(1, (Taken(0, (3,), Finish.NONE),))) == []
    assert [type(action) for action in batcher.actions()] == [SeqClose]


def test_a_vanished_node_loses_its_sessions() -> None:
    batcher, _ = started()
    assert batcher.sessions_of(ENTRY) == [session(0)]
    assert batcher.sessions_of(b"x" * 20) == []


@pytest.mark.parametrize("length", [0, 1, 5, 63, 64, 100])
def test_common_prefix(length: int) -> None:
    one = list(range(100))
    other = [*range(length), -1, *range(length + 1, 100)]
    assert common_prefix(one, other, 100) == min(length, 100)
    assert common_prefix(one, one, 7) == 7
