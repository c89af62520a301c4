"""Real agents in hosts of `tests.support.netns`: started, asked over their local API, watched, killed, frozen.

Its job is the process and its API as a person on that host would use it. What must be true of a mesh is the tests'
business.
"""

import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tests.support.netns import Host, socket_in

API_PORT: Final = 4892
READY_LIMIT_S: Final = 40.0
STOP_LIMIT_S: Final = 10.0
ANSWER_LIMIT_S: Final = 10.0
POLL_INTERVAL_S: Final = 0.05
SAID_LINES_SHOWN: Final = 25

_ROOT: Final = Path(__file__).parents[2]
_PROCESS: Final = Path(__file__).with_name("agent_process.py")


class AgentFailedError(AssertionError):
    """The agent did not do what it was asked for; the message has its last words."""


class Events:
    """What one run of an agent told on /api/events: (when, name of the event, its data)."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self.heard: list[tuple[float, str, Any]] = []
        self._connection = connection
        self._socket: socket.socket = connection.sock
        self._thread = threading.Thread(target=self._listen, name="events", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with suppress(OSError, http.client.HTTPException, ValueError):
            self._connection.request("GET", "/api/events")
            stream = self._connection.getresponse()
            name = ""
            while line := stream.readline():
                field, _, value = line.decode().strip().partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    self.heard.append((time.monotonic(), name, json.loads(value)))

    def close(self) -> None:
        """Stop listening."""
        # Closing alone does not wake the reader.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(ANSWER_LIMIT_S)
        self._connection.close()


class Agent:
    """One data folder on one host; its process comes and goes."""

    def __init__(self, host: Host, folder: Path, *, settings: Mapping[str, Any] | None = None, **world: Any) -> None:
        """`world`: `clock_ahead_s`, `versions`; see `agent_process`."""
        self.host = host
        self.name = host.name
        self.world = world
        self.data_dir = folder / host.name
        self.settings = {
            "node.name": host.name,
            "node.data_dir": str(self.data_dir),
            "log.level": "debug",
            **(settings or {}),
        }
        self.said = folder / f"{host.name}.err"
        self.process: subprocess.Popen[bytes] | None = None
        self.node_id = ""
        self.past: list[tuple[float, str, Any]] = []
        self._events: Events | None = None

    # ---- its process -----------------------------------------------------------------------------------------------

    def start(self, join_url: str | None = None) -> float:
        """Start it and wait until it is ready; returns the seconds that took. Raises AgentFailedError."""
        began = time.monotonic()
        options = {"settings": self.settings, "join_url": join_url, **self.world}
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.host.namespace, sys.executable, "-u", str(_PROCESS), json.dumps(options)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                cwd=_ROOT,
                env={**os.environ, "PYTHONPATH": str(_ROOT)},
                start_new_session=True,
            )
        self.node_id = json.loads(self._first_line())["node_id"]
        self._events = Events(self._connect(timeout_s=None))
        return time.monotonic() - began

    def _first_line(self) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(READY_LIMIT_S) else b""
        if not line:
            last_words = self.last_words()
            self.kill()
            raise AgentFailedError(f"{self.name} did not get ready:\n{last_words}")
        return line

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to its process, which this object started."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> float:
        """kill -9; returns the time of death."""
        self.signal(signal.SIGKILL)
        return self._ended()

    def stop(self) -> float:
        """Stop it in good order, or kill it when that takes too long; returns when it was over."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        assert self.process is not None
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AgentFailedError(f"{self.name} did not stop in {STOP_LIMIT_S} s:\n{self.last_words()}") from None
        return self._ended()

    def _ended(self) -> float:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.wait(STOP_LIMIT_S)
        self.process.stdout.close()
        died_at = time.monotonic()
        if self._events is not None:
            self._events.close()
            self.past += self._events.heard
            self._events = None
        return died_at

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        return "\n".join(self.said.read_text(errors="replace").splitlines()[-SAID_LINES_SHOWN:])

    # ---- its API ---------------------------------------------------------------------------------------------------

    def _connect(self, timeout_s: float | None = ANSWER_LIMIT_S) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", API_PORT)
        connection.sock = socket_in(self.host.namespace, socket.AF_INET)
        connection.sock.settimeout(timeout_s)
        connection.sock.connect(("127.0.0.1", API_PORT))
        return connection

    def ask(self, path: str, body: Any = None, *, method: str | None = None) -> Any:
        """One question to its API, from its own host. Raises AgentFailedError."""
        try:
            connection = self._connect()
        except OSError as error:
            raise AgentFailedError(f"{self.name} does not answer ({error}):\n{self.last_words()}") from error
        try:
            content = None if body is None else json.dumps(body)
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})
            response = connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise AgentFailedError(f"{self.name} does not answer {path} ({error!r}):\n{self.last_words()}") from error
        finally:
            connection.close()
        if response.status >= 400:
            raise AgentFailedError(f"{self.name} refuses {path}: {raw.decode(errors='replace')}")
        return json.loads(raw) if raw else None

    def invite(self) -> str:
        """A join URL for a member."""
        return str(self.ask("/api/cluster/join-token", {"role": "member"})["join_url"])

    def nodes(self) -> dict[str, dict[str, Any]]:
        """What it says of every member, by name."""
        return {node["name"]: node for node in self.ask("/api/nodes")}

    def online(self) -> set[str]:
        """The names of those it sees online."""
        return {name for name, node in self.nodes().items() if node["status"] == "online"}

    def coordinator(self) -> dict[str, Any]:
        """Whom it follows; empty if it follows nobody."""
        found = self.ask("/api/status").get("coordinator")
        return found if isinstance(found, dict) else {}

    def heard(self, *names: str, since: float = 0.0) -> list[tuple[float, str, Any]]:
        """The events of these names that it told since a point in time."""
        events = [*self.past, *(self._events.heard if self._events is not None else [])]
        return [event for event in events if event[1] in names and event[0] >= since]

    def deaths(self, since: float) -> list[tuple[float, str]]:
        """Whom it called offline since then, and when."""
        return [
            (at, data["node"]["name"] if "node" in data else data["name"])
            for at, _, data in self.heard("node_offline", since=since)
        ]


class Mesh:
    """Agents that belong together. Closing it ends every process that it started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.agents: dict[str, Agent] = {}

    def __getitem__(self, name: str) -> Agent:
        return self.agents[name]

    def agent(self, host: Host, *, settings: Mapping[str, Any] | None = None, **world: Any) -> Agent:
        """An agent on that host, not started."""
        self.agents[host.name] = Agent(host, self._folder, settings=settings, **world)
        return self.agents[host.name]

    @property
    def running(self) -> list[Agent]:
        return [agent for agent in self.agents.values() if agent.runs]

    def form(self) -> dict[str, float]:
        """The first agent founds, the others join by URLs, all at once; returns the seconds from start to ready."""
        founder, *others = self.agents.values()
        took = {founder.name: founder.start()}
        with ThreadPoolExecutor(max(1, len(others))) as pool:
            urls = [founder.invite() for _ in others]
            took |= dict(zip([agent.name for agent in others], pool.map(Agent.start, others, urls), strict=True))
        return took

    def start(self, agents: Iterable[Agent]) -> None:
        """Start these again, all at once."""
        listed = list(agents)
        with ThreadPoolExecutor(max(1, len(listed))) as pool:
            list(pool.map(Agent.start, listed))

    def close(self) -> None:
        """Kill what still runs."""
        for agent in self.running:
            agent.kill()


def wait_until(condition: Callable[[], bool], limit_s: float, what: Callable[[], object] | str) -> float:
    """Poll until it is so; returns the seconds that took. Fails with `what` after the limit."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() > began + limit_s:
            said = what if isinstance(what, str) else what()
            raise AgentFailedError(f"not within {limit_s:g} s: {said}")
        time.sleep(POLL_INTERVAL_S)
    return time.monotonic() - began


def agree(agents: Sequence[Agent], names: Iterable[str]) -> bool:
    """Whether each of these agents sees exactly these online."""
    wanted = set(names)
    return all(agent.online() == wanted for agent in agents)


def wait_agreed(agents: Sequence[Agent], names: Iterable[str], limit_s: float) -> float:
    """Wait until all of them see exactly these online; returns the seconds that took."""
    wanted = set(names)
    return wait_until(
        lambda: agree(agents, wanted),
        limit_s,
        lambda: (
            f"{sorted(wanted)} online everywhere; seen { ({agent.name: sorted(agent.online()) for agent in agents}) }"
        ),
    )


def one_coordinator(agents: Sequence[Agent], *, quorate: bool = True) -> bool:
    """Whether all follow the same one, which is quorate and one of them."""
    found = [agent.coordinator() for agent in agents]
    names = {each.get("name") for each in found}
    return (
        len(names) == 1
        and names <= {agent.name for agent in agents}
        and all(each.get("quorate") is quorate for each in found)
    )
