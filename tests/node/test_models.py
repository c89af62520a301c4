"""Models in a mesh of real agents: pinned ones are loaded by themselves, and every member tells the same of them."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.loopback import Agent, Agents, agents, agree, until

DEMO = "meshnode-demo"


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def card(agent: Agent) -> Any:
    return next((one for one in agent.get("/api/llm/models?plan=false") if one["model"] == DEMO), {})


def is_ready(agent: Agent) -> bool:
    listed = agent.get("/v1/models")["data"]
    [told] = [one["meshnode"]["ready"] for one in listed if one["id"] == DEMO]
    return told and card(agent)["ollama_ready"] and card(agent)["pinned"]


@pytest.mark.serial
def test_a_pinned_model_is_loaded_everybody_knows_and_a_new_coordinator_loads_it_again(house: Agents) -> None:
    a, b = house.mesh("a", "b")
    c = house.make("c", **{"llm.pinned": [DEMO, "nobody-has-this"]})
    c.start(a.invite())
    agree([a, b, c])
    for agent in (a, b, c):
        until(lambda agent=agent: is_ready(agent), f"{agent.name} to say that it is ready")
    lists = [agent.get("/v1/models") for agent in (a, b, c)]
    assert lists[0] == lists[1] == lists[2]
    missing = next(one for one in c.get("/api/llm/models?plan=false") if one["model"] == "nobody-has-this")
    assert (missing["pinned"], missing["ollama_ready"]) == (True, False)
    assert "There is no model 'nobody-has-this'" in missing["reason"]
    assert a.error("POST", "/api/llm/unload", {"model": DEMO})["code"] == "conflict", "it is pinned"
    leader = next(one for one in (a, b, c) if one.node_id == c.get("/api/status")["coordinator"]["id"])
    leader.kill()
    left = [one for one in (a, b, c) if one is not leader]
    if c is leader:
        return
    until(lambda: all(is_ready(one) for one in left), "the next coordinator to load it")
