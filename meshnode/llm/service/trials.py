"""Tests versions of llama-cpp-python against each other, at the coordinator, and remembers what came of it.

A tiny model runs whole on a node of each version, then cut in two, the halves on one and the other and the other way
round, by the same engines, links and frames as any model. Tokens and log-probabilities must be equal to the last bit.
When a test is wanted, and what a result allows, is decided in protocol/sharding/selftests.py.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.kernel.records import RecordWriter
from meshnode.llm.gguf.tiny.maker import VOCABULARY
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.entries import Entries
from meshnode.llm.service.trialstages import CONTEXT, LAYERS, TinyModel, TrialEnd, TrialStage, made
from protocol.ids import NodeId, node_id_bytes
from protocol.node import Node
from protocol.records.collection import Collection, only_owner
from protocol.sharding.frames import Alternative, Finish, Message, Open, Pieces, Refused, StageError, encode
from protocol.sharding.pipelines import PIPELINE_ID_BYTES, Pipeline, Span
from protocol.sharding.sampling import LOGPROBS_MAX, Sampling
from protocol.sharding.selftests import AGAIN_S, OUTCOMES_MAX, Findings, Outcome, Pair, Wanted
from protocol.wire import limits

SELFTESTS: Final = "llm/selftests"
TEST_S: Final = 75.0
END_S: Final = 5.0
PROMPTS: Final = (40, 1, 2, 5, 9, 130)
"""Lengths in tokens: each is one batch or several, of other sizes, which llama.cpp computes by other kernels."""

TOKENS: Final = 8  # of each answer, computed one by one

Said = tuple[Alternative, ...]


def selftests_collection() -> Collection:
    """Each node says what it found itself."""
    return Collection(SELFTESTS, may_write=only_owner, value_bytes_max=16_384, records_max=limits.ROSTER_MAX)


def difference(one: Sequence[Said], other: Sequence[Said]) -> float:
    """The largest of any log-probability; inf where tokens, chosen or likeliest, are others."""
    if [[each.token for each in said] for said in one] != [[each.token for each in said] for said in other]:
        return math.inf
    pairs = (pair for left, right in zip(one, other, strict=True) for pair in zip(left, right, strict=True))
    worst = [abs(left.logprob - right.logprob) for left, right in pairs if left.logprob != right.logprob]
    return math.inf if any(math.isnan(each) for each in worst) else max(worst, default=0.0)


class Trials:
    """See the module. One test at a time."""

    def __init__(
        self,
        *,
        calls: Calls,
        entries: Entries,
        hub: Node,
        writer: RecordWriter,
        offload: Offload,
        now: Callable[[], float],
        log: Logger,
    ) -> None:
        self._calls = calls
        self._entries = entries
        self._hub = hub
        self._writer = writer
        self._offload = offload
        self._now = now
        self._log = log
        self._running: set[Pair] = set()
        self._failed: dict[Pair, tuple[float, str]] = {}
        self._turn = trio.Lock()
        self._nursery: trio.Nursery | None = None

    def tested(self) -> Findings:
        """What counts now: the results of the node that coordinates, for it loads; here also what could not be run."""
        leader = self._hub.election.coordinator
        now = self._now()
        failed = {pair: words for pair, (at, words) in self._failed.items() if now - at < AGAIN_S}
        return Findings.of(() if leader is None else self._outcomes(leader), failed)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    def want(self, wanted: Wanted) -> None:
        """Run a test soon, unless it is under way. Returns at once."""
        if self._nursery is not None and wanted.pair not in self._running:
            self._running.add(wanted.pair)
            self._nursery.start_soon(self._test, wanted)

    def _outcomes(self, node: NodeId) -> list[Outcome]:
        record = self._hub.records.get(SELFTESTS, node.encode("ascii"))
        if record is None:
            return []
        try:
            return msgspec.msgpack.decode(record.value, type=list[Outcome])
        except (msgspec.DecodeError, msgspec.ValidationError):
            return []

    async def _test(self, wanted: Wanted) -> None:
        pair = wanted.pair
        told = {"versions": f"{pair.one}, {pair.other}", "architecture": pair.architecture, "weights": pair.kind}
        try:
            async with self._turn:
                found = math.nan
                with trio.move_on_after(TEST_S):
                    found = await self._measure(wanted)
                if math.isnan(found):
                    raise MeshError(ErrorCode.TIMEOUT, f"it took longer than {TEST_S:g} s")
                outcome = Outcome(*pair, found)
                mine = [one for one in self._outcomes(self._calls.me) if one.pair != pair]
                value = msgspec.msgpack.encode([*mine[-OUTCOMES_MAX + 1 :], outcome])
                await self._writer.put(SELFTESTS, self._calls.me.encode("ascii"), value)
                self._failed.pop(pair, None)
                self._log.info("two versions of llama-cpp-python were tested", difference=found, **told)
        except MeshError as error:
            self._failed[pair] = (self._now(), error.message[:200])
            self._log.warning("two versions of llama-cpp-python could not be tested", why=error.message, **told)
        finally:
            self._running.discard(pair)

    async def _measure(self, wanted: Wanted) -> float:
        """The largest difference between the four ways to run the tiny model. Raises MeshError."""
        model = await self._offload(made, wanted.pair.architecture, wanted.pair.kind)
        if model is None or model.cut is None:
            raise MeshError(ErrorCode.BAD_REQUEST, "there is no test model of this architecture")
        one, other = wanted.nodes
        # First those that can differ without any cut; only two engines a node run at once.
        answers = await self._both(model, wanted.pair, ((one,), (other,)))
        answers += await self._both(model, wanted.pair, ((one, other), (other, one)))
        return max(difference(left, right) for left, right in pairwise(answers))

    async def _both(self, model: TinyModel, pair: Pair, ways: Sequence[tuple[NodeId, ...]]) -> list[list[Said]]:
        found: dict[int, list[Said] | MeshError] = {}

        async def run(index: int, nodes: tuple[NodeId, ...]) -> None:
            try:
                found[index] = await self._answers(model, pair, nodes)
            except MeshError as error:
                found[index] = error

        async with trio.open_nursery() as nursery:
            for index, nodes in enumerate(ways):
                nursery.start_soon(run, index, nodes)
        answers = []
        for index in range(len(ways)):
            answer = found[index]
            if isinstance(answer, MeshError):
                raise answer
            answers.append(answer)
        return answers

    async def _answers(self, model: TinyModel, pair: Pair, nodes: tuple[NodeId, ...]) -> list[Said]:
        """What a pipeline over these nodes says to every prompt. Raises MeshError with the stage's own reason."""
        edges = (0, LAYERS) if len(nodes) == 1 else (0, model.cut or 0, LAYERS)
        spans = tuple(Span(node, *edge) for node, edge in zip(nodes, pairwise(edges), strict=True))
        name = secrets.token_bytes(PIPELINE_ID_BYTES)
        pipeline = Pipeline(name, model.digest, CONTEXT, 1, spans, VOCABULARY)
        broken: list[str] = []
        try:
            for node in nodes:
                wish = TrialStage(pipeline, pair.architecture, pair.kind)
                refused = await self._calls.call(node, "llm.trial", wish, str)
                if refused:
                    raise MeshError(ErrorCode.UNAVAILABLE, refused)
            said: list[Said] = []
            for length in PROMPTS:
                said += await self._answer(pipeline, length)
            return said
        except MeshError as error:
            broken = [error.message]
            raise MeshError(ErrorCode.UNAVAILABLE, await self._end(pipeline) or error.message) from error
        finally:
            if not broken:
                with trio.CancelScope(shield=True), trio.move_on_after(END_S):
                    await self._end(pipeline)

    async def _end(self, pipeline: Pipeline) -> str:
        """Let go of the stages: empty, or what the first that broke says of it."""
        words = ""
        for node in pipeline.nodes:
            try:
                told = await self._calls.call(node, "llm.trial_end", TrialEnd(pipeline.id), str, timeout_s=END_S)
            except MeshError:
                continue  # it ends by itself
            words = words or told
        return words

    async def _answer(self, pipeline: Pipeline, length: int) -> list[Said]:
        opened = Open(
            session=secrets.token_bytes(16),
            entry=node_id_bytes(self._calls.me),
            # No two prompts begin alike, so nothing of one is there for another.
            prompt=tuple((7 * place + 3 + length) % VOCABULARY for place in range(length)),
            sampling=Sampling(
                max_tokens=TOKENS, temperature=0.0, ignore_eos=True, speculate=False, logprobs=LOGPROBS_MAX
            ),
        )
        said: list[Said] = []
        async with self._entries.raw(opened.session) as messages:
            await self._entries.open(pipeline, opened.session, encode(opened))
            async for message in messages:
                if _takes_in(message, said):
                    return said
        raise MeshError(ErrorCode.UNREACHABLE, "The stream to a stage was lost.", retryable=True)


def _takes_in(message: Message | MeshError, said: list[Said]) -> bool:
    """Whether the answer is complete with this. Raises MeshError where there will be none."""
    match message:
        case MeshError():
            raise message
        case Refused(words=words) | StageError(words=words):
            raise MeshError(ErrorCode.UNAVAILABLE, words)
        case Pieces(alternatives=alternatives, finish=finish):
            said += alternatives
            if finish is not Finish.NONE and len(said) != TOKENS:
                raise MeshError(ErrorCode.UNAVAILABLE, f"an answer of {len(said)} tokens, not {TOKENS}")
            return len(said) == TOKENS
    return False
