"""Real agents on loopback for the benchmarks: starts them, joins them, asks them, kills them, cleans up after them.

It measures nothing itself but the moments at which an agent was started and said that it is ready.
"""

import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

READY_S: Final = 90.0
STOP_S: Final = 10.0
ANSWER_S: Final = 20.0
PORTS: Final = (12_000, 32_000)
ASKED_AT_ONCE: Final = 16
LOG_CHARS_SHOWN: Final = 2_000
ROOT: Final = Path(__file__).resolve().parent.parent.parent


class BenchmarkError(Exception):
    """A benchmark cannot be run to its end; the message says what to do."""


class Client:
    """One keep-alive connection to an agent's local API. For one thread."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """One request; the decoded answer. Raises OSError or BenchmarkError."""
        payload = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            self._connection.request(method, path, payload, headers)
            answer = self._connection.getresponse()
            said = answer.read()
        except http.client.HTTPException as error:
            self._connection.close()
            raise OSError(f"{method} {path}: {error!r}") from error
        except OSError:
            self._connection.close()
            raise
        if answer.status >= 400:
            raise BenchmarkError(f"{method} {path} was answered {answer.status}: {said.decode(errors='replace')[:300]}")
        return json.loads(said) if said else None

    def get(self, path: str) -> Any:
        """A GET."""
        return self.ask("GET", path)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class LocalAgent:
    """One agent: a data folder of its own, ports that it keeps over restarts."""

    def __init__(
        self,
        folder: Path,
        name: str,
        ports: tuple[int, int, int],
        *,
        options: Sequence[str] = (),
        cores: Iterable[int] = (),
        program: str = "meshnode",
    ) -> None:
        """`program`: the module that is run as `meshnode`."""
        self.folder = folder
        self.name = name
        self.node_id = ""
        self.mesh_id = ""
        self.api_port, self.peer_port, self._onboarding_port = ports
        self.started_at = 0.0
        self.ready_at = 0.0
        self._options = tuple(options)
        self._cores = frozenset(cores)
        self._program = program
        self._log = folder.with_name(f"{folder.name}.log")
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The agent's process."""
        if self._process is None:
            raise BenchmarkError(f"{self.name} is asked for its process before it was started")
        return self._process.pid

    def start(self, join_url: str | None = None) -> None:
        """Start it and wait until it is ready. Raises BenchmarkError."""
        command = [
            sys.executable,
            "-m",
            self._program,
            "up",
            "--json",
            "--data-dir",
            str(self.folder),
            "--name",
            self.name,
        ]
        command += ["--api-port", str(self.api_port), "--peer-host", "127.0.0.1", "--peer-port", str(self.peer_port)]
        command += ["--onboarding-port", str(self._onboarding_port), "--log-level", "warning"]
        command += ["--set", "discovery.multicast=false"]
        for option in self._options:
            command += ["--set", option]
        if join_url is not None:
            command += ["--join", join_url]
        with self._log.open("ab") as log:
            self.started_at = time.monotonic()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=_clean(self.folder),
            )
        if self._cores:
            # Before it has threads, which then inherit it.
            os.sched_setaffinity(self._process.pid, self._cores)
        self._wait_ready(self._process)

    def _wait_ready(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        killer = threading.Timer(READY_S, process.kill)
        killer.start()
        try:
            line = process.stdout.readline()
        finally:
            killer.cancel()
        self.ready_at = time.monotonic()
        if not line:
            raise BenchmarkError(f"{self.name} ended, or was not ready within {READY_S:.0f} s")
        info = json.loads(line)
        self.node_id, self.mesh_id = info["node_id"], info["mesh_id"]

    def log_end(self) -> str:
        """The end of what it logged, empty if nothing: only warnings and worse are logged."""
        return self._log.read_text(errors="replace")[-LOG_CHARS_SHOWN:] if self._log.is_file() else ""

    def client(self) -> Client:
        """A new connection to its API."""
        return Client(self.api_port)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """One request on a connection of its own."""
        client = self.client()
        try:
            return client.ask(method, path, body)
        finally:
            client.close()

    def kill(self) -> float:
        """kill -9; the moment (time.monotonic) at which it was sent."""
        assert self._process is not None
        at = time.monotonic()
        self._process.kill()
        self._ended()
        return at

    def stop(self) -> None:
        """Stop it in good order; by force when that takes too long."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._ended()

    def signal_stop(self) -> None:
        """Ask it to stop, without waiting."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def _ended(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _clean(folder: Path) -> dict[str, str]:
    """The environment without the settings of whoever runs the benchmark, those in files included."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MESHNODE_")}
    return {**kept, "XDG_CONFIG_HOME": str(folder.parent / "config")}


class LocalMesh:
    """Several agents of one mesh. A context manager: afterwards none of them runs and their folders are gone."""

    def __init__(self, *, options: Sequence[str] = ()) -> None:
        self._options = tuple(options)
        self._folder = Path(tempfile.mkdtemp(prefix="meshnode-bench-"))
        self._ports: set[int] = set()
        self.agents: list[LocalAgent] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, BenchmarkError):
            for agent in self.agents:
                if said := agent.log_end():
                    error.add_note(f"{agent.name} had logged:\n{said}")
        for agent in self.agents:
            agent.signal_stop()
        for agent in self.agents:
            agent.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, *, cores: Iterable[int] = (), options: Sequence[str] = (), program: str = "meshnode") -> LocalAgent:
        """One more agent, not yet started."""
        name = f"n{len(self.agents)}"
        ports = (self.free_port(), self.free_port(), self.free_port())
        settings = (*self._options, *options)
        agent = LocalAgent(self._folder / name, name, ports, options=settings, cores=cores, program=program)
        self.agents.append(agent)
        return agent

    def free_port(self) -> int:
        """A port that nobody has, TCP and UDP. Not from the kernel's range for outgoing connections: an agent that is
        dead for a while would find its port taken by one of them.
        """
        while True:
            port = random.randrange(*PORTS)
            with contextlib.ExitStack() as held, contextlib.suppress(OSError):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    held.enter_context(socket.socket(socket.AF_INET, kind)).bind(("127.0.0.1", port))
                if port not in self._ports:
                    self._ports.add(port)
                    return port

    def form(self, count: int, *, at_once: int = 8) -> None:
        """Start agents until there are `count`, the first founding, the others joining it by a URL each."""
        if not self.agents:
            self.add().start()
        founder = self.agents[0]
        joiners = [self.add() for _ in range(count - len(self.agents))]
        self.join(founder, joiners, at_once=at_once)

    def join(self, founder: LocalAgent, joiners: Sequence[LocalAgent], *, at_once: int = 8) -> None:
        """Start agents that join by a URL each; all see all afterwards."""
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda agent: agent.start(invite(founder)), joiners))
        self.wait_all_online()

    def wait_all_online(self, within_s: float = 60.0) -> None:
        """Wait until every agent sees all of them online. Raises BenchmarkError."""

        def one(agent: LocalAgent) -> None:
            until(partial(self._sees_all, agent), within_s, f"{agent.name} sees all {len(self.agents)} online")

        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            list(pool.map(one, self.agents))

    def _sees_all(self, agent: LocalAgent) -> bool:
        return online(agent) == len(self.agents)


def invite(agent: LocalAgent) -> str:
    """A join URL for loopback."""
    return str(agent.ask("POST", "/api/cluster/join-token", {})["join_url"])


def online(agent: LocalAgent) -> int:
    """How many nodes it sees online."""
    return int(agent.ask("GET", "/api/status")["node_count"])


def until(holds: Callable[[], bool], within_s: float, what: str, pause_s: float = 0.1) -> float:
    """Poll until it holds; the moment it did. Raises BenchmarkError."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"did not come within {within_s:.0f} s: {what}")
        time.sleep(pause_s)
    return time.monotonic()
