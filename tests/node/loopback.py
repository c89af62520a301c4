"""Real agents as processes of their own, on loopback: started, asked over their local API, stopped and killed.

Its job: ports that nobody uses, data folders that go away, and an HTTP client that blocks. What the process does is in
tests/support/agent_process.py; what agents should do is the tests' business.
"""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

LOOPBACK: Final = "127.0.0.1"
REPOSITORY: Final = Path(__file__).parents[2]
PROCESS: Final = REPOSITORY / "tests" / "support" / "agent_process.py"
START_S: Final = 30.0
SETTLE_S: Final = 20.0
# Below the ports that the kernel gives to outgoing connections, which would collide now and then.
PORT_FIRST: Final = 12_000
PORT_LAST: Final = 31_000


class AgentEndedError(AssertionError):
    """The agent's process ended before it was ready; `error` is what it said, as JSON."""

    def __init__(self, returncode: int, log: str) -> None:
        super().__init__(f"the agent ended with {returncode}\n{log[-4000:]}")
        self.returncode = returncode
        self.log = log
        last = log.splitlines()[-1] if log.strip() else ""
        self.error: dict[str, Any] = json.loads(last) if last.startswith("{") else {}


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Agent:
    """One agent: its folder, its ports, and its process while there is one."""

    name: str
    folder: Path
    api_port: int
    peer_port: int
    onboarding_port: int
    more: dict[str, Any] = field(default_factory=dict)
    clock_ahead_s: float = 0.0
    python_path: str = str(REPOSITORY)
    llama: dict[str, Any] | None = None
    process: "subprocess.Popen[bytes] | None" = None
    node_id: str = ""
    mesh_id: str = ""
    starts: int = 0

    # ---- the process ------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        return {
            "node.data_dir": str(self.folder),
            "node.name": self.name,
            "api.port": self.api_port,
            "peers.host": LOOPBACK,
            "peers.port": self.peer_port,
            "onboarding.port": self.onboarding_port,
            "discovery.multicast": False,
            **self.more,
        }

    @property
    def _out(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{self.starts}.out")

    @property
    def _err(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{self.starts}.err")

    def launch(self, join_url: str | None = None) -> None:
        """Start the process; `ready` waits for it."""
        self.starts += 1
        order = {"settings": self.settings(), "join_url": join_url, "clock_ahead_s": self.clock_ahead_s}
        order["llama"] = self.llama
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(PROCESS), json.dumps(order)],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": self.python_path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def ready(self) -> "Agent":
        """Wait until it serves. Raises AgentEndedError if it ends instead."""
        assert self.process is not None
        deadline = time.monotonic() + START_S
        while not (said := self._out.read_bytes()).endswith(b"\n"):
            code = self.process.poll()
            if code is not None:
                raise AgentEndedError(code, self.log())
            assert time.monotonic() < deadline, f"{self.name} was not ready in time\n{self.log()[-4000:]}"
            time.sleep(0.01)
        info = json.loads(said.splitlines()[0])
        self.node_id, self.mesh_id = info["node_id"], info["mesh_id"]
        return self

    def start(self, join_url: str | None = None) -> "Agent":
        self.launch(join_url)
        return self.ready()

    def refused(self, join_url: str | None = None) -> dict[str, Any]:
        """Start it and expect it to end with an error; what it said."""
        ended: AgentEndedError | None = None
        try:
            self.start(join_url)
        except AgentEndedError as error:
            ended = error
        self.kill()
        assert ended is not None, f"{self.name} started although it should have refused"
        assert ended.returncode == 1, ended
        return ended.error

    def log(self) -> str:
        return self._err.read_text(errors="replace")

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def ended(self, within_s: float) -> int:
        """Wait for the end; the exit code."""
        assert self.process is not None
        code = self.process.wait(within_s)
        self.process = None
        return code

    def stop(self, within_s: float = 15.0) -> int:
        self.terminate()
        return self.ended(within_s)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    # ---- the local API ----------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float = 20.0) -> Answer:
        """One request. `body` may be bytes; anything else is sent as JSON."""
        connection = http.client.HTTPConnection(LOOPBACK, self.api_port, timeout=timeout_s)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"} if data is not None else {})
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, headers, answer.read())
        finally:
            connection.close()

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        """One request that must succeed; its JSON."""
        answer = self.call(method, path, body)
        assert answer.status < 300, f"{self.name}: {method} {path} gave {answer.status}: {answer.body.decode()}"
        return answer.json if answer.body else None

    def error(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """One request that must fail in good order; its error."""
        answer = self.call(method, path, body)
        assert 400 <= answer.status != 500, f"{self.name}: {method} {path} gave {answer.status}: {answer.body.decode()}"
        said: dict[str, Any] = answer.json
        return said

    def get(self, path: str) -> Any:
        return self.ok("GET", path)

    def invite(self, **body: Any) -> str:
        """A join URL."""
        url: str = self.ok("POST", "/api/cluster/join-token", body)["join_url"]
        return url

    def join(self, url: str, *, leave_first: bool = False) -> Any:
        """Go over to another mesh, and wait until the API answers from there."""
        joined = self.ok("POST", "/api/cluster/join-remote", {"url": url, "leave_first": leave_first})
        until(lambda: self.status_or_none().get("mesh_id") == joined["mesh_id"], f"{self.name} to be in the new mesh")
        self.node_id, self.mesh_id = joined["node_id"], joined["mesh_id"]
        return joined

    def status_or_none(self) -> dict[str, Any]:
        """/api/status, or nothing while the agent is between two meshes."""
        try:
            answer = self.call("GET", "/api/status")
        except (OSError, http.client.HTTPException):
            return {}
        status: dict[str, Any] = answer.json if answer.status == 200 else {}
        return status

    def statuses(self) -> dict[str, str]:
        """Name and status of every member, as this agent sees them."""
        return {node["name"]: node["status"] for node in self.get("/api/nodes")}

    def online(self) -> set[str]:
        return {name for name, status in self.statuses().items() if status == "online"}

    def events(self) -> "Events":
        return Events(self)


class Events:
    """A reader of /api/events."""

    def __init__(self, agent: Agent) -> None:
        self._connection = http.client.HTTPConnection(LOOPBACK, agent.api_port, timeout=SETTLE_S)
        self._connection.request("GET", "/api/events", headers={"Accept": "text/event-stream"})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200, self._answer.read()
        self.seen: list[tuple[str, Any]] = []

    def until(self, event: str, matches: Callable[[Any], object] = lambda data: True) -> Any:
        """Read on until such an event comes; its data. Those read before are looked at first."""
        for name, data in self.seen:
            if name == event and matches(data):
                return data
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            name, data = self._next()
            if name:
                self.seen.append((name, data))
            if name == event and matches(data):
                return data
        raise AssertionError(f"no {event} came; seen: {[name for name, _ in self.seen]}")

    def _next(self) -> tuple[str, Any]:
        name, data = "", None
        while line := self._answer.readline():
            text = line.decode().rstrip("\r\n")
            if not text:
                return name, data
            key, _, value = text.partition(":")
            if key == "event":
                name = value.strip()
            elif key == "data":
                data = json.loads(value)
        raise AssertionError("the stream ended")

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


class Agents:
    """Makes agents with folders and ports of their own; `agents` stops all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Agent] = []
        self._ports = _free_ports()

    def make(self, name: str, *, clock_ahead_s: float = 0.0, **more: Any) -> Agent:
        """An agent that does not run yet. Settings as section__name."""
        settings = {key.replace("__", ".", 1): value for key, value in more.items()}
        api, peers, onboarding = (next(self._ports) for _ in range(3))
        agent = Agent(name, self.folder / f"{len(self.made)}", api, peers, onboarding, settings, clock_ahead_s)
        self.made.append(agent)
        return agent

    def start(self, name: str, **more: Any) -> Agent:
        return self.make(name, **more).start()

    def mesh(self, *names: str, **more: Any) -> list[Agent]:
        """A mesh of running agents; the first one founded it, and the others joined it as they started."""
        founder, *others = [self.make(name, **more) for name in names]
        founder.start()
        for other in others:
            other.launch(founder.invite())
        for other in others:
            other.ready()
        whole = [founder, *others]
        agree(whole)
        return whole


@contextmanager
def agents() -> Iterator[Agents]:
    """Agents that are killed, and folders that are deleted, at the end."""
    folder = Path(tempfile.mkdtemp(prefix="mn-"))
    made = Agents(folder)
    try:
        yield made
    finally:
        for agent in made.made:
            agent.kill()
        shutil.rmtree(folder, ignore_errors=True)


def agree(whole: Sequence[Agent], within_s: float = SETTLE_S, online: Iterable[Agent] | None = None) -> None:
    """Wait until each of them lists exactly these (or `online`) as online, and all follow one coordinator."""
    expected = {agent.node_id for agent in (whole if online is None else online)}

    def settled() -> bool:
        leaders = set()
        for agent in whole:
            up = {node["id"] for node in agent.get("/api/nodes") if node["status"] == "online"}
            leader = (agent.get("/api/status").get("coordinator") or {}).get("id")
            if up != expected or leader not in expected:
                return False
            leaders.add(leader)
        return len(leaders) == 1

    until(settled, f"{len(whole)} agents to agree on {len(expected)} nodes", within_s)


def coordinator(whole: Sequence[Agent]) -> Agent:
    """The agent that the first one follows."""
    leader = whole[0].get("/api/status")["coordinator"]["id"]
    return next(agent for agent in whole if agent.node_id == leader)


def until(condition: Callable[[], object], what: str, within_s: float = SETTLE_S) -> float:
    """Wait for what another process will do; the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within_s, f"waited {within_s:g} s in vain for {what}"
        time.sleep(0.05)
    return time.monotonic() - began


def _free_ports() -> Iterator[int]:
    """Ports that are free now, from a place of this process's own."""
    span = PORT_LAST - PORT_FIRST
    first = os.getpid() * 97 % span
    for step in range(span):
        port = PORT_FIRST + (first + step) % span
        if _is_free(port):
            yield port


def _is_free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as sock:
            try:
                sock.bind((LOOPBACK, port))
            except OSError:
                return False
    return True
