"""Two thousand nonsense requests to /v1: each is answered or refused by name, none fails, none leaves anything."""

import json
import random
from collections import Counter
from typing import Any

import psutil
import trio

from tests.support.api_client import Answer, ApiClient
from tests.support.api_server import TOKEN
from tests.surfaces.openai.test_openai import HELLO, Served, served

REQUESTS = 2000
CONNECTIONS = 8
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SOUND: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0.5, "n": 1,
        "stop": ["x"], "seed": 1, "tools": [TOOL], "tool_choice": "auto", "logit_bias": {"5": 1}, "logprobs": True,
        "top_logprobs": 2, "response_format": {"type": "text"}, "stream": False, "user": "me",
    },
    "/v1/completions": {"model": "demo", "prompt": "x", "max_tokens": 5, "n": 1, "logprobs": 1, "stop": "x"},
    "/v1/responses": {
        "model": "demo", "input": [{"role": "user", "content": "hi"}], "instructions": "be kind", "store": False,
        "max_output_tokens": 5, "tools": [{"type": "function", "name": "f"}], "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
    },
    "/v1/embeddings": {"model": "demo", "input": ["a"], "dimensions": 2, "encoding_format": "float"},
}  # fmt: skip
DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**40, 1e308, -0.0, 0.1, "", " ", "a" * 10_000,
    "\x00", "\x1b[2J", "\u202e\ud7ff\U0010ffff", "日本語🦊", "../../etc/passwd", "{{ 7 * 7 }}", [], {}, [None], [[]],
    {"": {}}, {"type": "function"}, {"type": 5}, [{"role": "king"}], [{"role": "user"}], DEEP, {"a": DEEP},
    list(range(300)), {str(number): number for number in range(300)}, "root ::= (", {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}},
]  # fmt: skip
RAW = [
    b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"model": 1e999}', b'{"a":' * 5000, b'"' * 70_000,
    b'{"metadata": ' + b"[" * 100_000, b'{"tool_choice": ' + b'{"a":' * 100_000,
    b'{"model":"demo","model":"demo"}', b"\xef\xbb\xbf{}", b'{"model": "\\ud800"}', b"9" * 5000,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a body something can be put in place of what is there."""
    found = [path] if path else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*path, key))
    return found


def changed(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    made = json.loads(json.dumps(body))
    at = made
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return made


def nonsense(chance: random.Random) -> tuple[str, bytes, str | None]:
    """A path, a body, and the name of a field that nobody knows, if there is one in it."""
    path = chance.choice(list(SOUND))
    body, unknown = SOUND[path], None
    match chance.randrange(10):
        case 0:
            return path, chance.choice(RAW), None
        case 1:
            unknown = f"unknown_{chance.randrange(10**6)}"
            inside = chance.choice([one for one in [(), *places(body)] if isinstance(_at(body, one), dict)])
            if not set(inside) & {"parameters", "logit_bias"}:
                return path, json.dumps(changed(body, (*inside, unknown), chance.choice(ODD))).encode(), unknown
            unknown = None
        case 2:
            body = {key: value for key, value in body.items() if chance.random() < 0.6}
    for _ in range(chance.randrange(1, 4)):
        where = chance.choice(places(body) or [("model",)])
        try:
            body = changed(body, where, chance.choice(ODD))
        except (KeyError, IndexError, TypeError):
            continue  # what was put there before has no such place
    return path, json.dumps(body).encode(), None


def _at(body: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        body = body[key]
    return body


async def ask(client: ApiClient, path: str, body: bytes) -> Answer:
    return await client.request("POST", path, headers={"Content-Type": "application/json"}, body=body)


async def test_two_thousand_nonsense_requests_are_answered_or_refused_and_leave_nothing() -> None:
    chance, statuses, ignored = random.Random(7), Counter[int](), list[bytes]()
    async with served(HELLO) as it:
        await one_after_the_other(it, [nonsense(chance) for _ in range(20)], Counter(), [])
        tasks, descriptors = trio.lowlevel.current_statistics().tasks_living, psutil.Process().num_fds()
        todo = [nonsense(chance) for _ in range(REQUESTS)]
        async with trio.open_nursery() as nursery:
            for number in range(CONNECTIONS):
                nursery.start_soon(one_after_the_other, it, todo[number::CONNECTIONS], statuses, ignored)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert trio.lowlevel.current_statistics().tasks_living <= tasks
        assert psutil.Process().num_fds() <= descriptors + 1
        assert it.llm.closed == len(it.llm.asked)
        assert ignored == []
    assert set(statuses) <= {200, 400, 413}, statuses
    assert statuses[400] > REQUESTS / 2 > statuses[200] > REQUESTS / 50


async def one_after_the_other(
    it: Served, todo: list[tuple[str, bytes, str | None]], statuses: Counter[int], ignored: list[bytes]
) -> None:
    client = ApiClient(it.port, token=TOKEN)
    try:
        await client.__aenter__()
        for path, body, unknown in todo:
            answer = await ask(client, path, body)
            statuses[answer.status] += 1
            assert answer.status < 500, (path, body[:500], answer.body[:500])
            if answer.status >= 400:
                error = answer.json["error"]
                assert error["message"], body[:500]
                assert error["type"] == "invalid_request_error", (body[:500], error)
            if unknown is not None and (answer.status != 400 or unknown not in answer.json["error"]["message"]):
                ignored.append(body)
            if answer.headers.get("connection", "").lower() == "close":
                await client.__aexit__(None, None, None)
                client = ApiClient(it.port, token=TOKEN)
                await client.__aenter__()
    finally:
        await client.__aexit__(None, None, None)


async def test_the_number_of_meshes_is_a_number() -> None:
    async with served(HELLO) as it, ApiClient(it.port, token=TOKEN) as client:
        sound = json.dumps(SOUND["/v1/completions"]).encode()
        for told, status in {"1": 200, "999": 200, "-1": 400, "1e3": 400, "9" * 50: 400, "x": 400}.items():
            headers = {"Content-Type": "application/json", "Meshnode-Hops": told}
            answer = await client.request("POST", "/v1/completions", headers=headers, body=sound)
            assert answer.status == status, told
        assert [request.hops for request in it.llm.asked] == [1, 999]
        for told, names in {"0": ["demo", "up/x:1"], "1": ["demo"]}.items():
            listed = await client.request("GET", "/v1/models", headers={"Meshnode-Hops": told})
            assert [one["id"] for one in listed.json["data"]] == names
