"""One answer over real agents, engines and links while its stages are killed, stopped, sent away and come back.

Whatever happens, the one stream goes on with the bytes of an undisturbed answer of one node. The bounds on silences are
wide, as these tests share their machine; what they are on a quiet one is in docs/performance.md.
"""

import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.node.loopback import Agent, agents, agree, until
from tests.node.streaming import Streamed, stream

pytestmark = [
    pytest.mark.serial,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"),
]

TOKENS = 200
HALF = 100
THREE = 3
LONG = "Tell me a story of a cat who had a friend, and of the day when both of them went out to see the garden."
"""Longer than what is always computed anew so that the numbers of an answer depend on nothing that is held."""

SILENCE_S = 30.0
BACK_S = 60.0


class House:
    """Agents of one mesh that hold the shipped model, and its undisturbed answer. Each test leaves it whole."""

    def __init__(self, whole: list[Agent]) -> None:
        self.whole = whole
        self.by_id = {agent.node_id: agent for agent in whole}
        self.answer = complete(stream(whole[0], tokens=TOKENS))

    def coordinator(self, seen_by: Agent) -> Agent:
        return self.by_id[seen_by.get("/api/status")["coordinator"]["id"]]

    def stages(self, entry: Agent) -> list[Agent]:
        """Who computes the one answer that this entry gives now."""
        [report] = entry.get("/api/llm/inference/sessions?scope=local")
        return [self.by_id[stage["node_id"]] for stage in report["stages"]]

    def loaded(self, entry: Agent) -> list[Agent]:
        """Have the model in three stages; who holds them."""
        seen: list[list[Agent]] = []
        got = stream(entry, tokens=16, stages=THREE, after=1, harm=lambda: seen.append(self.stages(entry)))
        complete(got, tokens=16)
        assert len(seen[0]) == THREE
        return seen[0]

    def other_than(self, *agents: Agent) -> Agent:
        return next(agent for agent in self.whole if agent not in agents)

    def disturbed(self, entry: Agent, harm: Callable[[], object]) -> Streamed:
        """The answer, harmed half-way, which must be the undisturbed one."""
        got = complete(stream(entry, tokens=TOKENS, stages=THREE, after=HALF, harm=harm))
        assert got.text == self.answer.text
        assert got.gap_s < SILENCE_S
        return got

    def whole_again(self, agent: Agent) -> None:
        """It comes back, and nobody else is restarted for that."""
        if agent.process is None:
            agent.start()
        agree(self.whole, BACK_S)


def complete(got: Streamed, tokens: int = TOKENS) -> Streamed:
    """One stream to its end, without an error and without a token too few or too many."""
    assert got.errors == []
    assert (got.tokens, got.finish) == (tokens, "length")
    assert [line for line in got.raw if line.startswith(b"data: ")][-1].strip() == b"data: [DONE]"
    return got


def engines(agent: Agent) -> list[psutil.Process]:
    assert agent.process is not None
    children = psutil.Process(agent.process.pid).children()
    return [child for child in children if "meshnode.llm.engine" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def built() -> Iterator[House]:
    with agents() as made:
        yield House(made.mesh("a", "b", "c", "d", llm__threads=1))


@pytest.fixture
def house(built: House) -> House:
    """Whole, whatever an earlier test left: one that failed half-way is not to fail the others."""
    for agent in built.whole:
        if agent.process is None or agent.process.poll() is not None:
            agent.start()
    agree(built.whole, BACK_S)
    return built


def test_three_stages_say_what_one_says(house: House) -> None:
    entry = house.whole[0]
    house.loaded(entry)
    got = complete(stream(entry, tokens=TOKENS, stages=THREE))
    assert got.text == house.answer.text


def test_an_engine_is_killed(house: House) -> None:
    _, middle, _ = house.loaded(house.whole[0])
    killed: list[psutil.Process] = []

    def kill() -> None:
        killed.extend(engines(middle))
        for engine in killed:
            engine.kill()

    house.disturbed(house.other_than(middle), kill)
    assert killed, "the stage, and whatever else it computes"


def test_a_whole_agent_is_killed_and_used_again_when_it_is_back(house: House) -> None:
    _, middle, _ = house.loaded(house.whole[0])
    entry = house.other_than(middle)
    house.disturbed(entry, middle.kill)
    house.whole_again(middle)
    # With three of four nodes, which three is the planner's choice: without one of the others it is this one's turn.
    away = next(agent for agent in house.whole if agent not in (middle, entry))
    away.stop()
    agree([agent for agent in house.whole if agent is not away], BACK_S)
    assert middle in house.loaded(entry)
    house.whole_again(away)


def test_the_coordinator_is_killed_while_its_pipeline_works(house: House) -> None:
    leader = house.coordinator(house.whole[0])
    entry = house.other_than(leader)
    house.loaded(entry)
    house.disturbed(entry, leader.kill)
    # Nobody waits for its return, and whoever asks meanwhile is served, whatever it asks for.
    complete(stream(entry, tokens=8, model="auto"), tokens=8)
    house.whole_again(leader)


def test_an_agent_is_stopped(house: House) -> None:
    *_, last = house.loaded(house.whole[0])
    process = last.process
    assert process is not None
    try:
        house.disturbed(house.other_than(last), lambda: process.send_signal(signal.SIGSTOP))
    finally:
        process.send_signal(signal.SIGCONT)
    house.whole_again(last)


def test_an_agent_says_goodbye(house: House) -> None:
    first, _, _ = house.loaded(house.whole[0])
    house.disturbed(house.other_than(first), first.terminate)
    first.ended(30)
    house.whole_again(first)


def test_whose_entry_died_is_served_at_another_and_leaves_no_session_behind(house: House) -> None:
    leader = house.coordinator(house.whole[0])
    stages = house.loaded(leader)
    # One without a stage, if there is such a one: what the stages hold can be looked at afterwards.
    entry = min((agent for agent in house.whole if agent is not leader), key=lambda agent: agent in stages)
    before = {engine.pid for agent in stages for engine in engines(agent)}
    broken = stream(entry, tokens=TOKENS, stages=THREE, after=HALF, harm=entry.kill, words=LONG)
    assert (broken.finish, broken.errors) == ("", [])
    got = complete(stream(leader, tokens=TOKENS, stages=THREE))
    assert got.text == house.answer.text
    until(lambda: leader.get("/api/llm/inference/sessions") == [], "the dead entry's session to be gone")
    if entry not in stages:
        # One more may be there for a moment: a node measures itself with an engine of its own.
        assert before <= {engine.pid for agent in stages for engine in engines(agent)}, "the stages stand"
        # Not before: while the dead entry's session held its sequence, the prompt in it was nobody else's to use.
        again = complete(stream(leader, tokens=8, stages=THREE, words=LONG), tokens=8)
        assert again.cached > 0, "and know the prompt"
    house.whole_again(entry)


def test_with_too_few_nodes_left_an_answer_goes_on_with_fewer_stages_and_says_so(house: House) -> None:
    leader = house.coordinator(house.whole[0])
    away, gone, entry = [agent for agent in house.whole if agent is not leader]
    away.stop()
    agree([leader, gone, entry], BACK_S)
    assert gone in house.loaded(entry)
    told: list[str] = []

    def told_so() -> bool:
        reports = entry.get("/api/llm/inference/sessions?scope=local")
        told.extend(report["error"] or "" for report in reports)
        return any("goes on with 2" in words for words in told)

    watcher = threading.Thread(target=lambda: until(told_so, "the session to say so", SILENCE_S))

    def kill() -> None:
        gone.kill()
        watcher.start()

    house.disturbed(entry, kill)
    watcher.join(SILENCE_S)
    assert any("needs more than the 2" in words for words in told), told
    # What cannot be is refused with its reason, and nobody waits for it.
    refused = stream(entry, tokens=8, stages=THREE)
    assert "needs more than the 2" in str(refused.errors)
    gone.start()
    house.whole_again(away)
    assert len(house.loaded(entry)) == THREE
