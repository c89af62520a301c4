"""A small, real HTTP server: answers what a test tells it to in the form of the local API, and notes what it hears."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One answer: JSON, or bytes as they are."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """Answered only to whoever sends this token; 401 to others."""
    is_agent: bool = True
    ends: bool = False
    """The connection ends after it, unannounced."""
    chunks: tuple[bytes, ...] = ()
    """An event stream, which then ends ..."""
    hangs: bool = False
    """... or is silent until the client leaves."""


@dataclass
class Heard:
    """One request as it arrived."""

    method: str
    path: str
    body: Any
    headers: dict[str, str]


class FakeAgent:
    """Answers by method and path, such as `GET /api/status`; several answers for one are given one after the other."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {"GET /healthz": [Answer({"status": "ok"})]}
        self.heard: list[Heard] = []
        self.port = 0
        self.left = threading.Event()
        """Set when a client left a stream that hangs."""

    def on(self, what: str, *answers: Answer) -> None:
        """What is answered to e.g. `POST /api/cluster/leave`; the last answer is repeated."""
        self.answers[what] = list(answers)

    def asked(self, method: str = "") -> list[str]:
        """`METHOD path` of what was heard, health checks aside."""
        return [f"{one.method} {one.path}" for one in self.heard if one.path != "/healthz" and method in one.method]

    def answer(self, heard: Heard) -> Answer:
        """The answer to one request."""
        self.heard.append(heard)
        known = self.answers.get(f"{heard.method} {heard.path}")
        if not known:
            return refusal(404, "not_found", f"there is no {heard.path}")
        chosen = known.pop(0) if len(known) > 1 else known[0]
        if chosen.token is not None and heard.headers.get("authorization") != f"Bearer {chosen.token}":
            refused = refusal(401, "unauthorized", "This request needs the token.")
            refused.ends = True  # as the real agent does, whose refusal comes before the body
            return refused
        return chosen


def refusal(status: int, code: str, message: str, **detail: Any) -> Answer:
    """An error as the local API says it."""
    body = {"error": message, "code": code, "retryable": False}
    return Answer(body | ({"detail": detail} if detail else {}), status)


def _handler(agent: FakeAgent) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            if self.headers.get("transfer-encoding") == "chunked":
                raw = b"".join(iter(self._chunk, b""))
            else:
                raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = agent.answer(Heard(self.command, self.path, self._said(raw), headers))
            self.send_response(answer.status)
            if answer.is_agent:
                self.send_header("X-Request-Id", "test-1")
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.chunks:
                self._stream(answer)
                return
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            body = b"" if answer.status == 204 else body
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = answer.ends

        def _chunk(self) -> bytes:
            data = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return data

        def _said(self, raw: bytes) -> Any:
            if self.headers.get("content-type") == "application/octet-stream":
                return raw
            return json.loads(raw) if raw else None

        def _stream(self, answer: Answer) -> None:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in answer.chunks:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            if answer.hangs:
                self.rfile.read(1)
                agent.left.set()
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

        # The names are those that http.server calls.
        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 -- as http.server demands

        def handle(self) -> None:
            # Who has seen enough of a stream goes away in the middle of it.
            with suppress(ConnectionError):
                super().handle()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler


@contextmanager
def fake_agent() -> Iterator[FakeAgent]:
    """A fake agent that listens on a free loopback port until the end."""
    agent = FakeAgent()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(agent)) as server:
        server.daemon_threads = True
        agent.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield agent
        finally:
            server.shutdown()
            thread.join()
