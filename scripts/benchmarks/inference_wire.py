"""What a split model puts on the wire, how many hops a token takes, and what speculation saves where hops are long.

Every agent's peer port has a proxy before it (delaying_proxy.py), which is the address that the others dial first; it
counts what TLS sends and holds it back for as long as it is told.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, Final, Self

from llama_cpp import Llama

from scripts.benchmarks import random_models
from scripts.benchmarks.agents import ROOT, BenchmarkError, LocalAgent, LocalMesh
from scripts.benchmarks.figures import Figure, figure
from scripts.benchmarks.inference_speed import PROMPT_TOKENS, common
from scripts.benchmarks.random_models import TINY, Shape
from scripts.benchmarks.serving import (
    SHIPPED,
    SHIPPED_FILE,
    Caller,
    load,
    placed,
    prompt_of,
    pull,
    serving_mesh,
    unload,
)

BIAS_EACH_BYTE: Final = 20  # of two tokens that both begin what is to be said, the longer one
HOP_S: Final = 0.010
HOPS_S: Final = (0.02, 0.05)
HOPS_TOLERANCE: Final = 0.25
SPECULATION_GAIN_MIN: Final = 1.9
CODE: Final = "".join(
    f"def {verb}(self, name, value):\\n    self.names.{verb}(name)\\n"
    f"    self.values.{verb}(value)\\n    return self\\n\\n"
    for verb in ("add", "append", "remove", "insert", "find")
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

    def tell(self, **orders: Any) -> list[int]:
        """Give orders; the bytes that have passed on each connection, the oldest first."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> list[int]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError("the delaying proxy ended")
        return list(json.loads(line)["passed_bytes"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()


@contextmanager
def _behind_proxies(count: int) -> Iterator[tuple[LocalMesh, Proxies]]:
    """Agents whose ways lead through proxies. The founder, which coordinates, computes nothing."""
    with Proxies() as proxies:

        def each(mesh: LocalMesh, number: int) -> list[str]:
            return [*proxies.options(mesh, number), *(["llm.lend=false"] if number == 0 else [])]

        with serving_mesh(count, options=common(1, 1), each=each, before=proxies.start) as mesh:
            yield mesh, proxies


def wire(shape: Shape, *, tokens: int) -> list[Figure]:
    """Goals 1 and 2, on one mesh of five."""
    made: list[Figure] = []
    with _behind_proxies(5) as (mesh, proxies):
        entry = mesh.agents[1]
        for one in dict.fromkeys((shape, TINY)):
            model, _ = pull(entry, str(random_models.model(one)))
            for stages in (2, 4):
                before = len(proxies.tell())
                load(entry, model, stages)
                agent = _holder_of_last(mesh, model, one, stages)
                made.append(_bytes(proxies, before, agent, model, one, stages, tokens))
                if one is TINY:
                    made.append(_hops(proxies, agent, model, stages, tokens))
                unload(mesh, model)
    return made


def speculation(*, rounds: int) -> list[Figure]:
    """Goal 12, on a mesh of three."""
    with _behind_proxies(3) as (mesh, proxies):
        load(mesh.agents[1], SHIPPED, 2)
        return _speculation(proxies, mesh.agents[1], rounds)


def _holder_of_last(mesh: LocalMesh, model: str, shape: Shape, stages: int) -> LocalAgent:
    """The agent with the last stage: as an entry it needs no hop of its own for what it hears."""
    last = placed(mesh.agents[1], model, shape, stages)[-1]["node_id"]
    return next(agent for agent in mesh.agents if agent.node_id == last)


def _bytes(
    proxies: Proxies, before: int, agent: LocalAgent, model: str, shape: Shape, stages: int, tokens: int
) -> Figure:
    """What a token adds: the difference between a long answer and a short one, on the streams opened for the model."""
    caller, wish = Caller(agent), {"stages": stages, "speculate": False}
    sizes = []
    for number, count in enumerate((8, 8, 8 + 2 * tokens)):
        began = sum(proxies.tell()[before:])
        caller.complete(model, prompt_of(shape, 40 + number, PROMPT_TOKENS), count, meshnode=wish)
        sizes.append(sum(proxies.tell()[before:]) - began)
    caller.close()
    return figure(
        f"1: bytes a token, {stages} stages, {shape.name}",
        (sizes[2] - sizes[1]) / (2 * tokens),
        "bytes",
        at_most=(stages - 1) * (4 * shape.width + 64) + 64,
        note="TLS included, on all streams opened since the load began; the entry holds the last stage",
    )


def _hops(proxies: Proxies, agent: LocalAgent, model: str, stages: int, tokens: int) -> Figure:
    """By how many delays a token takes longer when every way is longer by one."""
    caller, wish = Caller(agent), {"stages": stages, "speculate": False}
    periods = []
    # Both so long that a token comes alone: faster ones may leave the agent together.
    for number, delay in enumerate(HOPS_S):
        proxies.tell(delay_s=delay)
        caller.complete(model, prompt_of(TINY, 60 + number, 16), 8, meshnode=wish)
        gaps = caller.complete(model, prompt_of(TINY, 70 + number, 16), tokens, meshnode=wish).gaps
        periods.append(median(gaps))
    proxies.tell(delay_s=0.0)
    caller.close()
    low, high = HOPS_S
    return figure(
        f"2: one-way hops a token, {stages} stages",
        (periods[1] - periods[0]) / (high - low),
        "hops",
        at_most=stages + HOPS_TOLERANCE,
        note=f"from token to token {periods[0] * 1e3:.0f} ms with {low * 1e3:.0f} ms a way, {periods[1] * 1e3:.0f} "
        f"with {high * 1e3:.0f}; the coordinator holds no stage",
    )


def _speculation(proxies: Proxies, entry: LocalAgent, rounds: int) -> list[Figure]:
    """Goal 12: the model that ships must write the code of its prompt once more, as editors ask for. So small a model
    cannot do that by itself: a grammar holds it to the text, and a bias to the tokens that the text is made of.
    """
    proxies.tell(delay_s=HOP_S)
    caller = Caller(entry)
    grammar = {"type": "grammar", "grammar": f'root ::= "{CODE}"'}
    words = Llama(str(SHIPPED_FILE), vocab_only=True, verbose=False)
    parts = set(words.tokenize(CODE.replace("\\n", "\n").encode(), add_bos=False))
    bias = {str(token): min(100, BIAS_EACH_BYTE * len(words.detokenize([token]))) for token in sorted(parts)}
    rates: dict[bool, list[float]] = {True: [], False: []}
    texts: set[str] = set()
    for number in range(rounds + 1):
        for speculate in rates:
            asked = f"{number}. Write this class again:\n" + CODE.replace("\\n", "\n")
            answer = caller.chat(
                SHIPPED,
                asked,
                600,
                logit_bias=bias,
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
