"""What a split model puts on the wire, how many hops a token takes, and what speculation saves where hops are long.

Every agent's peer port has a proxy before it (delaying_proxy.py), which is the address that the others dial first; it
counts what TLS sends and holds it back for as long as it is told.
"""

import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any, Final, Self

from scripts.benchmarks import random_models
from scripts.benchmarks.agents import ROOT, BenchmarkError, LocalAgent, LocalMesh
from scripts.benchmarks.figures import Figure, figure
from scripts.benchmarks.inference_speed import PROMPT_TOKENS, common
from scripts.benchmarks.random_models import TINY, Shape
from scripts.benchmarks.serving import (
    SHIPPED,
    Caller,
    load,
    placed,
    prompt_of,
    pull,
    serving_mesh,
    unload,
)

HOP_S: Final = 0.010
HOPS_TOLERANCE: Final = 0.25
SPECULATION_GAIN_MIN: Final = 1.9
CODE: Final = (
    "def add(self, name, value):\\n    self.names.append(name)\\n    self.values.append(value)\\n    return self\\n\\n"
    "def remove(self, name, value):\\n    self.names.remove(name)\\n    self.values.remove(value)\\n    return self\\n\\n"
    "def insert(self, name, value):\\n    self.names.insert(0, name)\\n    self.values.insert(0, value)\\n"
    "    return self\\n\\n"
)


class Proxies:
    """The process before all peer ports. A context manager around the mesh."""

    def __init__(self) -> None:
        self._listen: list[int] = []
        self._process: subprocess.Popen[str] | None = None

    def options(self, mesh: LocalMesh, _number: int) -> list[str]:
        """What the next agent must be told; notes its port too."""
        self._listen.append(mesh.free_port())
        return [f"peers.advertise=127.0.0.1:{self._listen[-1]}"]

    def start(self, mesh: LocalMesh) -> None:
        """Serve: before the agents start, so that they find each other through it."""
        pairs = [f"{listen}:{agent.peer_port}" for listen, agent in zip(self._listen, mesh.agents, strict=True)]
        command = [sys.executable, "-m", "scripts.benchmarks.delaying_proxy", *pairs]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self._read()

    def tell(self, **orders: Any) -> int:
        """Give orders; the bytes that have passed."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError("the delaying proxy ended")
        return int(json.loads(line)["passed_bytes"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()


def wire(shape: Shape, *, tokens: int, rounds: int) -> list[Figure]:
    """Goals 1, 2 and 12, on one mesh of five. The founder, which coordinates, computes nothing."""
    threads = max(1, (os.cpu_count() or 1) // 2)
    made: list[Figure] = []
    with Proxies() as proxies:

        def each(mesh: LocalMesh, number: int) -> list[str]:
            return [*proxies.options(mesh, number), *(["llm.lend=false"] if number == 0 else [])]

        with serving_mesh(5, options=common(1, threads), each=each, before=proxies.start) as mesh:
            entry = mesh.agents[1]
            for one in dict.fromkeys((shape, TINY)):
                model, _ = pull(entry, str(random_models.model(one)))
                for stages in (2, 4):
                    load(entry, model, stages)
                    agent = _holder_of_last(mesh, model, one, stages)
                    made.append(_bytes(proxies, agent, model, one, stages, tokens))
                    if one is TINY:
                        made.append(_hops(proxies, agent, model, stages, tokens))
                    unload(mesh, model)
            load(entry, SHIPPED, 2)
            made += _speculation(proxies, entry, rounds)
    return made


def _holder_of_last(mesh: LocalMesh, model: str, shape: Shape, stages: int) -> LocalAgent:
    """The agent with the last stage: as an entry it needs no hop of its own for what it hears."""
    last = placed(mesh.agents[1], model, shape, stages)[-1]["node_id"]
    return next(agent for agent in mesh.agents if agent.node_id == last)


def _bytes(proxies: Proxies, agent: LocalAgent, model: str, shape: Shape, stages: int, tokens: int) -> Figure:
    """What a token adds: the difference between a long answer and a short one, less what passes without any."""
    caller, wish = Caller(agent), {"stages": stages, "speculate": False}
    sizes, lasted = [], []
    for number, count in enumerate((8, 8 + 4 * tokens)):
        before, began = proxies.tell(), time.monotonic()
        caller.complete(model, prompt_of(shape, 40 + number, PROMPT_TOKENS), count, meshnode=wish)
        sizes.append(proxies.tell() - before)
        lasted.append(time.monotonic() - began)
    before = proxies.tell()
    time.sleep(5.0)
    idle = (proxies.tell() - before) / 5.0
    caller.close()
    each = (sizes[1] - sizes[0] - idle * (lasted[1] - lasted[0])) / (4 * tokens)
    return figure(
        f"1: bytes a token, {stages} stages, {shape.name}",
        each,
        "bytes",
        at_most=(stages - 1) * (4 * shape.width + 64) + 64,
        note=f"of TLS on all links, less {idle:.0f} bytes/s of the mesh at rest; the entry holds the last stage",
    )


def _hops(proxies: Proxies, agent: LocalAgent, model: str, stages: int, tokens: int) -> Figure:
    """By how many delays a token takes longer when every way is longer by one."""
    caller, wish = Caller(agent), {"stages": stages, "speculate": False}
    periods = []
    for number, delay in enumerate((0.0, HOP_S)):
        proxies.tell(delay_s=delay)
        caller.complete(model, prompt_of(TINY, 60 + number, 16), 8, meshnode=wish)
        periods.append(1 / caller.complete(model, prompt_of(TINY, 70 + number, 16), tokens, meshnode=wish).rate)
    proxies.tell(delay_s=0.0)
    caller.close()
    return figure(
        f"2: one-way hops a token, {stages} stages",
        (periods[1] - periods[0]) / HOP_S,
        "hops",
        at_most=stages + HOPS_TOLERANCE,
        note=f"what {HOP_S * 1e3:.0f} ms a way add to a token ({periods[0] * 1e3:.1f} ms without); "
        "the coordinator holds no stage",
    )


def _speculation(proxies: Proxies, entry: LocalAgent, rounds: int) -> list[Figure]:
    """Goal 12: the shipped model must say a text of code, which a grammar holds it to; 20 ms there and back."""
    proxies.tell(delay_s=HOP_S)
    caller = Caller(entry)
    grammar = {"type": "grammar", "grammar": f'root ::= "{CODE}"'}
    rates: dict[bool, list[float]] = {True: [], False: []}
    texts: set[str] = set()
    for number in range(rounds + 1):
        for speculate in rates:
            words = "Write the class again. " + CODE.replace("\\n", "\n").replace("names", f"keys{number}")
            answer = caller.chat(
                SHIPPED,
                words,
                600,
                response_format=grammar,
                meshnode={"stages": 2, "speculate": speculate},
            )
            texts.add(answer.text)
            if number:
                rates[speculate].append(answer.rate)
    proxies.tell(delay_s=0.0)
    caller.close()
    ratios = [fast / slow for fast, slow in zip(rates[True], rates[False], strict=True)]
    same = "byte-identical" if len(texts) == 1 else "NOT byte-identical"
    return [
        figure(
            "12: speculation at 20 ms of round trip, code, 2 stages",
            median(ratios),
            "times",
            at_least=SPECULATION_GAIN_MIN,
            reference=median(rates[False]),
            reference_name="tok/s without",
            note=f"{median(rates[True]):.1f} tok/s; greedy, {same}; {answer.tokens} tokens",
        )
    ]
