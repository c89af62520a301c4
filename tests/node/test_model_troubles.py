"""Bad input and bad luck with models, on whole agents: HTTP in, a real engine, an answer that says what to do.

What goes wrong below (frames, files, servers) is tried where it is decided; here is what a person is told of it.
"""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node.loopback import LOOPBACK, REPOSITORY, Agent, Answer, agents, agree, until
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(
    pytest.importorskip("importlib.util").find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed (it needs a C++ compiler)",
)

LOOP = "{% for a in range(99999) %}"
ENDLESS = LOOP * 3 + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with agents() as made:
        one = made.start("one")
        until(lambda: chat(one).status == 200, "the shipped model", 60.0)
        yield one


def chat(agent: Agent, **more: Any) -> Answer:
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0} | more
    return agent.call("POST", "/v1/chat/completions", body, timeout_s=120)


def refused(answer: Answer, status: int, *words: str) -> dict[str, Any]:
    assert answer.status == status, answer.body
    error: dict[str, Any] = answer.json["error"]
    for word in words:
        assert word in error["message"], error
    return error


def answers(agent: Agent, model: str = "auto") -> str:
    """It still does; the answer."""
    answer = chat(agent, model=model)
    assert answer.status == 200, answer.body
    said: str = answer.json["choices"][0]["message"]["content"]
    assert said
    return said


def pulled(agent: Agent, path: Path) -> bytes:
    return agent.call("POST", "/api/llm/pull", {"model": str(path)}, timeout_s=60).body


def functions(count: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"f{number}"}} for number in range(count)]


def test_an_unknown_model_is_answered_with_the_nearest_names(agent: Agent) -> None:
    error = refused(chat(agent, model="mashnode-demo"), 404, "Did you mean meshnode-demo", "`meshnode models --all`")
    assert error["code"] == "model_not_found"
    offered = next(one["model"] for one in agent.get("/api/llm/catalogue"))
    refused(chat(agent, model=offered), 404, f"`meshnode pull {offered}` fetches it")
    assert agent.error("POST", "/api/llm/load", {"model": "mashnode-demo"})["code"] == "not_found"


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a prompt longer than the context": (
        {"messages": [{"role": "user", "content": "hello " * 9000}]},
        ["tokens, and meshnode-demo takes 4096", "Shorten it"],
    ),
    "a prompt longer than any": ({"messages": [{"role": "user", "content": "x" * 5_000_000}]}, ["Shorten the conv"]),
    "a grammar that cannot be compiled": (
        {"response_format": {"type": "grammar", "grammar": "root ::= ("}},
        ["cannot compile this grammar"],
    ),
    "a grammar without end": (
        {"response_format": {"type": "grammar", "grammar": 'root ::= root "a"'}},
        ["no left recursion"],
    ),
    "a schema of no type": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}},
        ["banana"],
    ),
    "ten thousand tools": ({"tools": functions(10_000)}, ["10000", "128"]),
    "a bias for no token": ({"logit_bias": {"999999": 1}}, ["vocabulary of 1536"]),
}


@pytest.mark.parametrize(("body", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_and_the_next_one_answered(
    agent: Agent, body: dict[str, Any], words: list[str]
) -> None:
    refused(chat(agent, **body), 400, *words)
    assert answers(agent)


def test_context_too_long_has_the_code_that_clients_know(agent: Agent) -> None:
    error = refused(chat(agent, messages=[{"role": "user", "content": "hello " * 9000}]), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b'{"model": "auto", "messages": "hi"}'])
def test_malformed_json_is_a_bad_request(agent: Agent, body: bytes) -> None:
    answer = agent.call("POST", "/v1/chat/completions", body)
    assert refused(answer, 400)["type"] == "invalid_request_error"


def test_a_hostile_template_costs_its_request_alone(agent: Agent, tmp_path: Path) -> None:
    tiny = tiny_model("llama", layers=2, seed=5)
    tiny.fields = [(name, value) for name, value in tiny.fields if name != "tokenizer.chat_template"]
    tiny.key("tokenizer.chat_template", "str", ENDLESS)
    (tmp_path / "hostile.gguf").write_bytes(tiny.bytes())
    assert b"llm_pull_done" in pulled(agent, tmp_path / "hostile.gguf")
    refused(chat(agent, model="hostile"), 400, "chat template", "/v1/completions")
    assert answers(agent, "meshnode-demo")
    assert agent.ok("DELETE", "/api/llm/models/hostile") is not None


def test_a_file_that_is_no_model_is_refused_by_name(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    assert b"zip archive" in pulled(agent, tmp_path / "x.gguf")
    assert b"pickle that can run code" in pulled(agent, tmp_path / "x.pt")
    assert b"cannot be read" in pulled(agent, tmp_path / "nothing.gguf")
    assert [one["id"] for one in agent.get("/v1/models")["data"]] == ["meshnode-demo"]


def test_a_client_that_disconnects_frees_what_it_had(agent: Agent) -> None:
    for number in range(12):
        connection = http.client.HTTPConnection(LOOPBACK, agent.api_port, timeout=20)
        prompt = f"{number} " + "tell me a story " * 200
        body = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.close()
    until(lambda: agent.get("/api/llm/inference/sessions") == [], "sessions to end")
    assert answers(agent)


def test_an_architecture_that_is_not_certified_says_how_it_can_be_run(agent: Agent, tmp_path: Path) -> None:
    body = tiny_model("llama", layers=4, seed=6).bytes().replace(b"llama", b"bloom")
    (tmp_path / "uncut.gguf").write_bytes(body)
    assert b"llm_pull_done" in pulled(agent, tmp_path / "uncut.gguf")
    plan = agent.get("/api/llm/plan?model=uncut")
    assert plan["plans"][0]["engine"] == "local"
    error = refused(chat(agent, model="uncut", meshnode={"stages": 2}), 503)
    assert error["message"]
    agent.ok("DELETE", "/api/llm/models/uncut")


def test_a_model_that_fits_nowhere_says_by_how_much_and_what_would(tmp_path: Path) -> None:
    with agents() as made:
        small = made.start("small", llm__memory_bytes_max=20_000_000)
        until(lambda: b"GB short" in chat(small).body, "a plan")
        error = refused(chat(small), 503, "GB short")
        plan = small.get("/api/llm/plan?model=meshnode-demo")
        assert plan["fits"] is False
        assert plan["bytes_needed"] > plan["bytes_free"]
        assert "needs" in error["message"], error
        assert "Traceback" not in small.log()


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "llama_cpp":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "llama_cpp" else found(name, package)
"""


def test_an_engine_that_nodes_lack_is_refused_with_how_to_get_it() -> None:
    with agents() as made:
        two = [made.make(name, llm__threads=1) for name in ("one", "two")]
        for agent in two:
            agent.llama = {"rpc": "not_built"}
        two[0].start()
        two[1].start(two[0].invite())
        agree(two)
        until(lambda: "two" in chat(two[0], meshnode={"engine": "rpc"}).body.decode(), "both offers")
        said = refused(
            chat(two[0], meshnode={"engine": "rpc"}), 503, "llama.cpp's RPC", "built without RPC", "CMAKE_ARGS="
        )
        assert "one: its llama-cpp-python" in said["message"]
        assert answers(two[0])


def test_a_node_without_the_extra_serves_v1_by_routing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    with agents() as made:
        able, bare = made.make("able"), made.make("bare")
        bare.python_path = f"{tmp_path}:{REPOSITORY}"
        able.start()
        bare.start(able.invite())
        until(lambda: bare.online() == {"able", "bare"}, "both to be online")
        until(lambda: lent(bare) == {"able": True, "bare": False}, "both offers")
        assert answers(bare) == answers(able)
        streamed = chat(bare, stream=True)
        assert b"[DONE]" in streamed.body
        able.kill()
        gone = chat(bare)
        assert gone.status in (502, 503)
        assert gone.json["error"]["message"]


def lent(agent: Agent) -> dict[str, bool]:
    """Who can run models, as this agent knows it."""
    return {one["node_name"]: one["ollama_ready"] for one in agent.get("/api/llm/inference/capabilities")}
