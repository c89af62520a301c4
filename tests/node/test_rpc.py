"""Real agents that share a model by llama.cpp's RPC, because it cannot be cut or because somebody asks for it.

Nothing of it can be reached from outside, an answer is what one node says, and whoever lends may die or be evicted.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshnode.llm.gguf.tiny.maker import F16, Maker
from meshnode.llm.service.lending import rpc_support
from tests.node.loopback import Agent, agents, agree, until
from tests.node.streaming import MODEL, Streamed, stream

SUPPORT = rpc_support()
pytestmark = [
    pytest.mark.serial,
    pytest.mark.timeout(300),
    pytest.mark.skipif(SUPPORT != "yes", reason=f"llama.cpp's RPC cannot be used here ({SUPPORT or 'no engine'})"),
]
TOKENS = 160
HALF = 60
THREE = 3
BACK_S = 60.0
SESSIONS = "/api/llm/inference/sessions?scope=local"


def engines(agent: Agent) -> list[psutil.Process]:
    assert agent.process is not None
    found = []
    for child in psutil.Process(agent.process.pid).children():
        with suppress(psutil.Error):  # one that has just ended
            if "meshnode.llm.engine" in " ".join(child.cmdline()):
                found.append(child)
    return found


def servers(agent: Agent) -> list[psutil.Process]:
    """Its engines that lend: alone in a mount namespace, unlike all others."""
    own = os.readlink("/proc/self/ns/mnt")
    return [engine for engine in engines(agent) if os.readlink(f"/proc/{engine.pid}/ns/mnt") != own]


def ports(agent: Agent) -> set[int]:
    """What the agent and its engines listen on in the machine's network; `ss -tln` shows the same."""
    assert agent.process is not None
    sockets = set()
    for process in (psutil.Process(agent.process.pid), *engines(agent)):
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(entry))
            except FileNotFoundError:
                continue  # it was closed meanwhile
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


class House:
    """Three agents with the shipped model, and what one of them says alone."""

    def __init__(self, whole: list[Agent]) -> None:
        self.whole = whole
        self.by_id = {agent.node_id: agent for agent in whole}
        self.alone = stream(whole[0], tokens=TOKENS)
        assert self.alone.errors == []

    def stages(self, entry: Agent) -> list[Agent]:
        """Who computes the one answer that this entry gives now, and who lends."""
        [report] = entry.get(SESSIONS)
        assert report["engine"] == "rpc", report
        return [self.by_id[stage["node_id"]] for stage in report["stages"]]

    def ask(
        self, entry: Agent, harm: Callable[[], object], *, stages: int = 2, tokens: int = TOKENS, after: int = HALF
    ) -> Streamed:
        """An answer with llama.cpp's RPC over so many nodes, harmed in the middle."""
        return stream(entry, tokens=tokens, stages=stages, engine="rpc", after=after, harm=harm)

    def loaded(self, stages: int = 2) -> list[Agent]:
        """Have the model so; who computes, and who lends."""
        seen: list[list[Agent]] = []
        entry = self.whole[0]
        got = self.ask(entry, lambda: seen.append(self.stages(entry)), stages=stages, tokens=8, after=1)
        assert got.errors == []
        return seen[0]

    def other_than(self, *agents: Agent) -> Agent:
        return next(agent for agent in self.whole if agent not in agents)

    def unloaded(self) -> None:
        """Nothing of the model is left anywhere, and everybody is back."""
        left = [agent for agent in self.whole if agent.process is not None]
        left[0].ok("POST", "/api/llm/unload", {"model": MODEL})
        until(lambda: not any(engines(agent) for agent in left), "all engines to be gone")
        for agent in self.whole:
            if agent not in left:
                agent.start()
        agree(self.whole, BACK_S)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with agents() as made:
        yield House(made.mesh("a", "b", "c", llm__threads=1))


def complete(got: Streamed, alone: Streamed) -> None:
    """To its end, with the words of one node."""
    assert got.errors == []
    assert (got.tokens, got.finish) == (TOKENS, "length")
    assert got.text == alone.text


def test_three_nodes_say_what_one_says_and_nothing_listens(house: House) -> None:
    open_before = {agent.name: ports(agent) for agent in house.whole}
    seen: list[dict[str, set[int]]] = []
    holders = house.loaded(THREE)
    assert {agent.name for agent in holders} == {"a", "b", "c"}
    for entry in house.whole:
        got = house.ask(entry, lambda: seen.append({agent.name: ports(agent) for agent in house.whole}), stages=THREE)
        complete(got, house.alone)
    assert seen == [open_before] * THREE
    house.unloaded()


@pytest.mark.parametrize("whose", ["engine", "agent"])
def test_an_answer_outlives_whoever_lends(house: House, whose: str) -> None:
    _, lender = house.loaded()
    killed: list[str] = []

    def kill() -> None:
        [engine] = servers(lender)
        killed.append(lender.name)
        if whose == "agent":
            lender.kill()
        else:
            engine.kill()

    complete(house.ask(house.other_than(lender), kill), house.alone)
    assert len(killed) == 1
    house.unloaded()


def test_an_answer_outlives_whoever_computes(house: House) -> None:
    client, _ = house.loaded()
    complete(house.ask(house.other_than(client), client.kill), house.alone)
    house.unloaded()


def test_a_server_that_hangs_is_replaced(house: House) -> None:
    _, lender = house.loaded()

    def stop() -> None:
        [engine] = servers(lender)
        engine.suspend()

    complete(house.ask(house.other_than(lender), stop), house.alone)
    house.unloaded()


def test_the_only_lender_is_evicted_and_the_answer_goes_on_without() -> None:
    with agents() as made:
        one, other, third = (made.make(name, llm__threads=1, llm__lend=name != "c") for name in "abc")
        one.start()
        for agent in (other, third):
            agent.start(one.invite())
        agree([one, other, third])
        house = House([one, other, third])
        client, lender = house.loaded()
        assert {client.name, lender.name} == {"a", "b"}
        complete(house.ask(client, lambda: client.ok("DELETE", f"/api/nodes/{lender.node_id}")), house.alone)
        until(lambda: not servers(lender), "the evicted node's server to be gone")
        until(lambda: {node["id"] for node in client.get("/api/nodes")} == {client.node_id, third.node_id}, "two nodes")


# ---- a model that cannot be cut -------------------------------------------------------------------------------------

PLAN = "/api/llm/plan?model=tiny-gemma"
CONTEXT = 512
WHOLE_BYTES = 150_000_000
"""Less than the model takes with its buffers, more than a half of it does."""


def uncut(path: Path) -> Path:
    """A model of an architecture that the pipeline refuses: 112 MB of weights."""
    m = Maker("gemma", (F16,), 8, 0, d=512, ff=4096)
    m.sizes(head=True)
    m.rms()
    m.vocabulary()
    m.ends(output=False)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "ffn_norm", m.d)
        m.gated(block)
    path.write_bytes(m.file.bytes())
    return path


def completed(agent: Agent, model: str) -> Any:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return agent.call("POST", "/v1/completions", body, timeout_s=120.0)


def test_a_model_that_no_node_holds_and_that_cannot_be_cut_is_shared(tmp_path: Path) -> None:
    path = uncut(tmp_path / "tiny-gemma.gguf")
    with agents() as made:
        roomy = made.start("roomy", llm__threads=1, llm__context=CONTEXT)
        assert roomy.call("POST", "/api/llm/pull", {"model": str(path)}, timeout_s=60.0).status == 200
        expected = completed(roomy, "tiny-gemma")
        assert expected.status == 200, expected.body
    with agents() as made:
        whole = made.mesh("a", "b", "c", llm__threads=1, llm__context=CONTEXT, llm__memory_bytes_max=WHOLE_BYTES)
        assert whole[0].call("POST", "/api/llm/pull", {"model": str(path)}, timeout_s=60.0).status == 200
        until(lambda: whole[1].call("GET", PLAN).status == 200 and whole[1].get(PLAN)["fits"], "a plan")
        plan = whole[1].get(PLAN)
        assert "llama.cpp's RPC" in plan["reason"], plan
        answer = completed(whole[1], "tiny-gemma")
        assert answer.status == 200, answer.body
        assert json.loads(answer.body)["choices"][0]["text"] == json.loads(expected.body)["choices"][0]["text"]
        agree(whole)
