"""N agents on this machine in one mesh, for development: started, joined by one-time URLs, stopped with Ctrl-C.

Each agent is the real command with its own data folder and ports on 127.0.0.1. The first founds the mesh, the others
join by URLs that the first makes. When all see each other, one JSON object goes to standard output. With --dir the mesh
is kept, and started again the next time.
"""

import argparse
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

HOST: Final = "127.0.0.1"
PORTS_EACH: Final = 3
FIRST_BASE_PORT: Final = 15_000
NODES_MAX: Final = 512
MANY: Final = 16
"""More agents than this on one machine gossip at the pace of the profile `local`."""
ONLINE_LIMIT_S: Final = 300.0
STOP_LIMIT_S: Final = 20.0
POLL_INTERVAL_S: Final = 0.1
SAID_LINES_SHOWN: Final = 15


class MeshDidNotComeUpError(Exception):
    """The mesh did not come up; the message says why."""


@dataclass
class Agent:
    """One agent: its place, its ports, and its process once it is started."""

    number: int
    folder: Path
    base_port: int
    process: subprocess.Popen[bytes] | None = None
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"node-{self.number:02d}"

    @property
    def api_port(self) -> int:
        return self.base_port + PORTS_EACH * self.number

    @property
    def data_dir(self) -> Path:
        return self.folder / self.name

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.err"

    @property
    def is_member(self) -> bool:
        """Whether it was started before, and so knows its mesh."""
        return (self.data_dir / "meshnode.db").exists()

    def start(self, join_url: str | None, more: Sequence[str]) -> None:
        """Start it and wait until it is ready. Raises MeshDidNotComeUpError with the end of what it said."""
        command = [
            *(sys.executable, "-m", "meshnode", "up", "--json", "--name", self.name, "--data-dir", str(self.data_dir)),
            *("--api-port", str(self.api_port), "--peer-host", HOST, "--peer-port", str(self.api_port + 1)),
            *("--onboarding-port", str(self.api_port + 2), *more),
            *(() if join_url is None else ("--join", "-")),
        ]
        with self.log.open("ab") as log:
            # In a session of its own, Ctrl-C reaches it only through us.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{join_url or ''}\n".encode())
            self.process.stdin.close()
        line = self.process.stdout.readline()
        if not line:
            raise MeshDidNotComeUpError(f"{self.name} did not start:\n{self.last_words()}")
        self.ready = json.loads(line)

    def ask(self, path: str, body: Any = None, *, timeout_s: float = 60.0) -> Any:
        """One question to its API."""
        connection = http.client.HTTPConnection(HOST, self.api_port, timeout=timeout_s)
        try:
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            raw = response.read()
        except OSError as error:
            raise MeshDidNotComeUpError(f"{self.name} does not answer ({error}):\n{self.last_words()}") from error
        finally:
            connection.close()
        if response.status >= 400:
            raise MeshDidNotComeUpError(f"{self.name} refuses {path}: {raw.decode('utf-8', 'replace')}")
        return json.loads(raw)

    def last_words(self) -> str:
        with suppress(OSError):
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-SAID_LINES_SHOWN:])
        return ""

    def report(self) -> dict[str, Any]:
        """What a test or a person needs to know of it."""
        return {
            "name": self.name,
            "node_id": self.ready["node_id"],
            "api": self.ready["api"],
            "api_port": self.api_port,
            "peer_port": self.api_port + 1,
            "onboarding_port": self.api_port + 2,
            "data_dir": str(self.data_dir),
            "pid": self.ready["pid"],
        }


class LocalMesh:
    """The agents together."""

    def __init__(self, count: int, folder: Path, base_port: int, more: Sequence[str]) -> None:
        self.agents = [Agent(number, folder, base_port) for number in range(count)]
        self.waiting = False
        self._more = more
        self._started_at = time.monotonic()

    def say(self, text: str) -> None:
        """Progress, with the seconds since the start."""
        print(f"[{time.monotonic() - self._started_at:7.1f} s] {text}", file=sys.stderr, flush=True)

    def start(self, side_by_side: int) -> None:
        """Start all; returns when each of them sees all others online, and all follow the same coordinator."""
        founder, *others = self.agents
        founder.start(None, self._more)
        self.say(f"{founder.name} is up in the mesh {founder.ready['mesh_id']}")
        with ThreadPoolExecutor(side_by_side) as pool:
            for done, agent in enumerate(pool.map(self._bring_in, others), start=2):
                if done % 8 == 0 or len(self.agents) <= MANY:
                    self.say(f"{agent.name} is up ({done} of {len(self.agents)})")
        self._wait_online()
        self.say(f"all {len(self.agents)} are online, everywhere, and follow one coordinator")

    def _bring_in(self, agent: Agent) -> Agent:
        url = None
        if not agent.is_member:
            # Made right before it is used, so that it cannot expire in a long queue.
            url = self.agents[0].ask("/api/cluster/join-token", {"role": "member"})["join_url"]
        agent.start(url, self._more)
        return agent

    def _wait_online(self) -> None:
        deadline = time.monotonic() + ONLINE_LIMIT_S
        while True:
            seen = [(agent, *view_of(agent.ask("/api/status"))) for agent in self.agents]
            short = [f"{agent.name} sees {count}" for agent, count, _ in seen if count < len(self.agents)]
            followed = {coordinator for _, _, coordinator in seen}
            if not short and len(followed) == 1 and None not in followed:
                return
            if time.monotonic() > deadline:
                trouble = ", ".join(short) or f"followed as coordinators: {', '.join(map(str, followed))}"
                raise MeshDidNotComeUpError(f"after {ONLINE_LIMIT_S:g} s the mesh is not one: {trouble}")
            time.sleep(POLL_INTERVAL_S)

    def stop(self) -> None:
        """Stop all at once, gracefully; kill what has not ended in time."""
        running = [agent for agent in self.agents if agent.process is not None and agent.process.poll() is None]
        for agent in running:
            assert agent.process is not None
            agent.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_LIMIT_S
        for agent in running:
            assert agent.process is not None
            try:
                agent.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.say(f"{agent.name} did not stop in {STOP_LIMIT_S:g} s and is killed")
                agent.process.kill()
                agent.process.wait()
        for agent in self.agents:
            if agent.process is not None and agent.process.stdout is not None:
                agent.process.stdout.close()

    def wait(self) -> None:
        """Until a signal; says when an agent ends by itself."""
        self.waiting = True
        gone: set[int] = set()
        while True:
            for agent in self.agents:
                assert agent.process is not None
                code = agent.process.poll()
                if code is not None and agent.number not in gone:
                    gone.add(agent.number)
                    self.say(f"{agent.name} ended with code {code}")
            if len(gone) == len(self.agents):
                return
            time.sleep(POLL_INTERVAL_S)


def view_of(status: Any) -> tuple[int, str | None]:
    """How many nodes an agent sees online, and which coordinator it follows that may act; None: none."""
    coordinator = status.get("coordinator")
    return status["node_count"], coordinator["id"] if coordinator and coordinator["quorate"] else None


def free_base_port(count: int) -> int:
    """The first of so many consecutive ports that are free for TCP and UDP."""
    for base in range(FIRST_BASE_PORT, 65_535 - PORTS_EACH * count, 1_000):
        if all(map(is_free, range(base, base + PORTS_EACH * count))):
            return base
    raise MeshDidNotComeUpError("no block of ports is free: name one with --base-port")


def is_free(port: int) -> bool:
    """Whether nothing is bound to the port."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                return False
    return True


@contextmanager
def folder_of(named: Path | None, *, keep: bool) -> Iterator[Path]:
    """Where the data folders are: the named one, which stays, or a fresh one, which goes unless it is kept."""
    if named is not None:
        named.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield named.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="meshnode-"))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def node_count(text: str) -> int:
    """The argument N."""
    count = int(text)
    if not 1 <= count <= NODES_MAX:
        raise argparse.ArgumentTypeError(f"from 1 to {NODES_MAX}")
    return count


def main(arguments: Sequence[str]) -> int:
    """Start, report, wait for Ctrl-C, stop."""
    parser = argparse.ArgumentParser(
        prog="scripts/mesh", description="N local agents, joined to one mesh, until Ctrl-C."
    )
    parser.add_argument("nodes", metavar="N", type=node_count)
    parser.add_argument("--base-port", type=int, help="node K has the ports P+3K (API), P+3K+1 (peers), P+3K+2 (joins)")
    parser.add_argument("--dir", type=Path, help="keep the data folders here, and start the same mesh again next time")
    parser.add_argument("--keep", action="store_true", help="keep the temporary data folders")
    parser.add_argument(
        "--jobs", type=int, default=max(2, 2 * (os.cpu_count() or 1)), help="agents starting side by side"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for all agents")
    told = parser.parse_args(arguments)
    more = [part for setting in told.set for part in ("--set", setting)]
    if told.nodes > MANY and not any(setting.startswith("membership.profile=") for setting in told.set):
        more += ["--set", "membership.profile=local"]
    # Explicitly: a shell that starts us in the background has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with folder_of(told.dir, keep=told.keep) as folder:
            mesh = LocalMesh(told.nodes, folder, told.base_port or free_base_port(told.nodes), more)
            try:
                mesh.start(told.jobs)
                nodes = [agent.report() for agent in mesh.agents]
                print(json.dumps({"mesh_id": mesh.agents[0].ready["mesh_id"], "nodes": nodes}, indent=2), flush=True)
                mesh.say("Ctrl-C stops them")
                mesh.wait()
            except KeyboardInterrupt:
                mesh.say("stopping")
            finally:
                # A second Ctrl-C must not leave half of them running.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                mesh.stop()
                mesh.say("stopped")
    except MeshDidNotComeUpError as failure:
        print(f"scripts/mesh: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
