"""Every native route of a running agent, asked with garbage: an answer in good order, never a failure of ours."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.loopback import Agent, agents

# These would end the agent's mesh; what they do with good input has tests of its own.
EFFECTIVE = {("POST", "/api/cluster/leave")}
TEXTS = (
    "%20",
    "..",
    "%2e%2e",
    "%00",
    "a" * 300,
    "%F0%9F%A6%8A",
    "-1",
    "0",
    "null",
    "'%20OR%201",
    "%ff%fe",
    "a%2Fb",
    "~",
)
QUERIES = ("", "?", "?limit=-1", "?limit=x", "?cursor=nowhere", "?scope=galaxy", "?a=b&a=c", "?%ff=%ff", "?lost=maybe")
BODIES: tuple[Any, ...] = (
    None, b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b"1e999", b'"' + b"x" * 5000 + b'"', b"[" * 3000,
    b'{"a":1,"a":2}',
    {"role": "king"}, {"ttl_s": -1}, {"ttl_s": 1e300}, {"count": 0}, {"count": 10**30}, {"interval_s": None},
    {"url": 7}, {"url": "http://\u0000"}, {"url": "http://[::1/join/x#y.z"}, {"url": "x://" + "y" * 9000},
    {"force": "yes"}, {"unknown": {"deep": [[[[]]]]}},
)  # fmt: skip


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with agents() as made:
        yield made.start("target")


def filled(path: str, text: str) -> str:
    while "{" in path:
        head, _, rest = path.partition("{")
        path = head + text + rest.partition("}")[2]
    return path


def test_every_route_bears_garbage(agent: Agent) -> None:
    document = agent.get("/openapi.json")
    chance = random.Random(7)
    asked: set[int] = set()
    for path, methods in document["paths"].items():
        streams = path == "/api/events"
        for method in [name.upper() for name in methods]:
            if (method, path) in EFFECTIVE:
                continue
            for number in range(24):
                text = TEXTS[number % len(TEXTS)]
                query = chance.choice(QUERIES) or "?"
                body = chance.choice(BODIES) if method != "GET" else None
                if streams and query in ("", "?"):
                    continue  # it would be answered, and go on for ever
                answer = agent.call(method, filled(path, text) + query, body)
                asked.add(answer.status)
                assert answer.status < 500 or answer.status in (501, 502, 503, 504), (
                    f"{method} {filled(path, text)}{query} with {body!r:.200}: {answer.status} {answer.body[:500]!r}"
                )
                if answer.status >= 400 and answer.headers.get("content-type", "").startswith("application/json"):
                    expected = {"error"} if path.startswith("/v1/") else {"error", "code", "retryable"}
                    assert set(answer.json) >= expected
    assert {400, 404} <= asked
    assert agent.get("/api/status")["node_count"] == 1
    assert "Traceback" not in agent.log()


def test_paths_and_methods_that_do_not_exist(agent: Agent) -> None:
    assert agent.error("GET", "/api/nothing")["code"] == "not_found"
    assert agent.error("PUT", "/api/status")["code"] == "method_not_allowed"
    assert agent.error("GET", "/api/nodes/nobody")["code"] == "unknown_node"
    assert agent.error("DELETE", "/api/nodes/nobody")["code"] == "unknown_node"
    assert agent.error("DELETE", f"/api/nodes/{agent.node_id}")["code"] == "bad_request"
    assert agent.error("DELETE", "/api/cluster/invitations/nothing")["code"] in ("not_found", "bad_request")
