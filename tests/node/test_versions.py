"""Two real agents whose engines claim to be of different versions: tested against each other, then combined or not.

The engines are real, and so is all between them; an odd one is told to compute attention in another way.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.loopback import Agent, Agents, agents, agree, until

OLD, NEW = "0.3.35", "0.3.36"
PLAN = "/api/llm/plan?model=meshnode-demo"
STATUS = "/api/llm/status?scope=local"
MEMORY = 130_000_000
"""The shipped model (146 MB, or 110 MB a half) does not fit into this alone, and does into twice as much, even beside
itself: plans are for what is free.
"""

pytestmark = [
    pytest.mark.serial,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"),
]


@pytest.fixture
def made() -> Iterator[Agents]:
    with agents() as several:
        yield several


def mesh(made: Agents, *llamas: dict[str, Any]) -> list[Agent]:
    """An agent for each kind of engine, all offering memory."""
    whole = [made.make(f"n{number}", llm__memory_bytes_max=MEMORY) for number in range(len(llamas))]
    for agent, llama in zip(whole, llamas, strict=True):
        agent.llama = llama
    whole[0].start()
    for other in whole[1:]:
        other.start(whole[0].invite())
    agree(whole)
    # Records travel after nodes agree on who is there.
    until(lambda: all(agent.call("GET", PLAN).status == 200 for agent in whole), "plans")
    until(lambda: NEW in plan(whole[0])["reason"], "both offers")
    return whole


def plan(agent: Agent) -> Any:
    return agent.get(PLAN)


def test_exact_versions_are_combined_after_their_test(made: Agents) -> None:
    whole = mesh(made, {"version": OLD}, {"version": NEW})
    before = plan(whole[1])
    assert not before["fits"]
    for word in (f"{OLD} (on n0)", f"{NEW} (on n1)", "tested against each other"):
        assert word in before["reason"]
    body = {"model": "meshnode-demo", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    answer = whole[0].call("POST", "/v1/chat/completions", body, timeout_s=200.0)
    assert answer.status == 200, answer.body
    assert "were tested" in whole[0].log() + whole[1].log()
    for agent in whole:
        assert plan(agent)["fits"], plan(agent)
        assert [one["effect"] for one in agent.get(STATUS)["versions"]] == ["shared"]


def test_versions_that_differ_are_refused_by_name(made: Agents) -> None:
    whole = mesh(made, {"version": OLD, "flash_attention": True}, {"version": NEW})
    body = {"model": "meshnode-demo", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    answer = whole[0].call("POST", "/v1/chat/completions", body, timeout_s=200.0)
    assert answer.status == 503, answer.body
    # The other node hears of the test by a record, a moment later.
    until(lambda: "differ" in plan(whole[1])["reason"], "the record of the test on the other node")
    for words in (answer.body.decode(), plan(whole[1])["reason"]):
        assert f"{OLD} (on n0)" in words
        assert f"{NEW} (on n1)" in words
        assert "differ" in words
        assert f"update llama-cpp-python on n0 to {NEW}, as on n1" in words
    for agent in whole:
        (told,) = agent.get(STATUS)["versions"]
        assert (told["effect"], told["outdated"], told["update_to"]) == ("apart", [whole[0].node_id], NEW)


def test_a_version_that_gives_no_hidden_states_is_marked_by_its_first_try(made: Agents) -> None:
    whole = mesh(made, {"version": OLD, "uncut": True}, {"version": NEW})
    body = {"model": "meshnode-demo", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    answer = whole[0].call("POST", "/v1/chat/completions", body, timeout_s=200.0)
    assert answer.status == 503, answer.body
    for agent in whole:
        until(lambda agent=agent: "whole_only" in [one["effect"] for one in agent.get(STATUS)["versions"]], "the mark")
        workers = {one["node_name"]: one["whole_only"] for one in agent.get("/api/llm/inference/capabilities")}
        assert workers == {"n0": ["llama"], "n1": []}
        assert "n0: only whole llama models" in plan(agent)["reason"]
