"""One answer of a model as a client sees it that streams it over HTTP, and harm done in the middle of it."""

import http.client
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from tests.node.loopback import LOOPBACK, Agent

ANSWER_S: Final = 90.0
MODEL: Final = "meshnode-demo"


@dataclass
class Streamed:
    """`pieces` as they came, and when; `raw` is every line of the one stream."""

    began: float = 0.0
    pieces: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)
    finish: str = ""
    tokens: int = 0
    cached: int = 0
    ended: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def gap_s(self) -> float:
        """The longest silence between two pieces."""
        return max((later - at for at, later in zip(self.times, self.times[1:], strict=False)), default=0.0)

    @property
    def first_s(self) -> float:
        return self.times[0] - self.began


def stream(
    agent: Agent,
    *,
    tokens: int = 200,
    stages: int = 1,
    engine: str | None = None,
    model: str = MODEL,
    words: str = "Tell me a story.",
    after: int = 0,
    harm: Callable[[], object] = lambda: None,
) -> Streamed:
    """A greedy answer of so many tokens; `harm` is called when `after` pieces of it have come.

    A connection that breaks off ends it where it was: without a finish.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": words}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "meshnode": {"stages": stages, **({"engine": engine} if engine else {})},
    }
    got = Streamed(time.monotonic())
    connection = http.client.HTTPConnection(LOOPBACK, agent.api_port, timeout=ANSWER_S)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            got.errors.append((answer.status, json.loads(answer.read())))
            return got
        with suppress(http.client.IncompleteRead, ConnectionResetError):
            while line := answer.readline():
                _take(got, line)
                if after and len(got.pieces) == after:
                    after = 0
                    harm()
    finally:
        connection.close()
        got.ended = time.monotonic()
    return got


def _take(got: Streamed, line: bytes) -> None:
    got.raw.append(line)
    if not line.startswith(b"data: {"):
        return
    said = json.loads(line[6:])
    if said.get("error"):
        got.errors.append(said["error"])
    if said.get("usage"):
        got.tokens = said["usage"]["completion_tokens"]
        got.cached = said["usage"]["prompt_tokens_details"]["cached_tokens"]
    for choice in said.get("choices", ()):
        got.finish = choice.get("finish_reason") or got.finish
        if piece := choice["delta"].get("content"):
            got.pieces.append(piece)
            got.times.append(time.monotonic())
