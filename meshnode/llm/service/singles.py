"""Sessions of one message: the token that proves a pipeline, and the vectors of texts. They need no machine to
recover.
"""

import math
import secrets
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import Embedded, EmbeddingRequest
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.entries import Entries
from meshnode.llm.service.models import Models
from meshnode.llm.service.pipelines import Pipelines
from meshnode.llm.service.prompts import Prompts
from protocol.ids import node_id_bytes
from protocol.sharding.frames import (
    Accepted,
    Embedding,
    Message,
    Open,
    Pieces,
    Refused,
    StageError,
    encode,
)
from protocol.sharding.pipelines import Pipeline
from protocol.sharding.sampling import Sampling

PROBE_S: Final = 15.0
EMBED_S: Final = 60.0


class Singles:
    """See the module."""

    def __init__(
        self, *, models: Models, prompts: Prompts, pipelines: Pipelines, calls: Calls, entries: Entries
    ) -> None:
        self._models = models
        self._prompts = prompts
        self._pipelines = pipelines
        self._calls = calls
        self._entries = entries

    async def probe(self, pipeline: Pipeline) -> None:
        """One token through all stages of a pipeline that this node begins. Raises MeshError."""
        opened = Open(
            session=secrets.token_bytes(16),
            entry=node_id_bytes(self._calls.me),
            prompt=(0,),
            sampling=Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, speculate=False),
        )
        with trio.move_on_after(PROBE_S):
            await self._once(pipeline, opened, lambda message: isinstance(message, Pieces) and bool(message.tokens))
            return
        raise MeshError(ErrorCode.TIMEOUT, f"No token came through all stages within {PROBE_S:g} s.", retryable=True)

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        """Vectors of unit length. Raises MeshError."""
        known = self._models.find(request.model)
        if request.dimensions is not None and request.dimensions > known.shape.n_embd:
            raise MeshError(ErrorCode.BAD_REQUEST, f"{known.name} gives {known.shape.n_embd} dimensions at most.")
        pipeline: Pipeline | None = None
        async with aclosing(self._pipelines.ready(known, self._prompts.wanted_context(known))) as steps:
            async for step in steps:
                pipeline = step if isinstance(step, Pipeline) else None
        assert pipeline is not None  # _ready gives one or raises
        ready = pipeline
        vectors: list[tuple[float, ...]] = [()] * len(request.inputs)
        counted = 0

        async def one(index: int, text: str | tuple[int, ...]) -> None:
            nonlocal counted
            tokens = text
            if isinstance(tokens, str):
                tokens = await self._prompts.tokenise(ready, tokens, add_special=True, parse_special=False)
            if len(tokens) > ready.context:
                raise MeshError(
                    ErrorCode.BAD_REQUEST,
                    f"Input {index} has {len(tokens)} tokens; {ready.context} is the limit.",
                    detail={"openai_code": "context_length_exceeded", "param": "input"},
                )
            counted += len(tokens)
            whole = await self._vector(ready, tokens, known.shape.n_embd)
            vectors[index] = unit(whole[: request.dimensions])

        for index, text in enumerate(request.inputs):
            await one(index, text)
        return Embedded(model=known.name, vectors=tuple(vectors), prompt_tokens=counted)

    async def _vector(self, pipeline: Pipeline, tokens: tuple[int, ...], width: int) -> list[float]:
        opened = Open(
            session=secrets.token_bytes(16),
            entry=node_id_bytes(self._calls.me),
            prompt=tokens,
            sampling=Sampling(max_tokens=0),
            pooling="mean",
        )
        with trio.move_on_after(EMBED_S):
            message = await self._once(pipeline, opened, lambda heard: isinstance(heard, Embedding))
            assert isinstance(message, Embedding)  # that is what was waited for
            return self._numbers(pipeline, message.vector, width)
        raise MeshError(ErrorCode.TIMEOUT, f"No vector came within {EMBED_S:g} s. Try again.", retryable=True)

    def _numbers(self, pipeline: Pipeline, vector: bytes, width: int) -> list[float]:
        """A last stage's vector, which is looked at before it is believed. Raises MeshError PROTOCOL_VIOLATION."""
        values: list[float] = list(memoryview(vector).cast("f")) if len(vector) == 4 * width else []
        if not values or not all(map(math.isfinite, values)):
            self._pipelines.forget(pipeline.model)
            raise MeshError(
                ErrorCode.PROTOCOL_VIOLATION,
                f"Node {pipeline.last} sent {len(vector)} bytes that are no vector of {width} numbers. Try again; "
                "if it does so again, unload the model and evict that node.",
                retryable=True,
                detail={"node_id": pipeline.last},
            )
        return values

    async def _once(self, pipeline: Pipeline, opened: Open, wanted: Callable[[Message], bool]) -> Message:
        """Open a session and wait for one message of it. Raises MeshError."""
        async with self._entries.raw(opened.session) as messages:
            await self._entries.open(pipeline, opened.session, encode(opened))
            async for message in messages:
                match message:
                    case MeshError():
                        self._pipelines.forget(pipeline.model)
                        raise message
                    case Refused(_, code, words, retryable):
                        raise MeshError(ErrorCode.UNAVAILABLE, f"{code.value}: {words}", retryable=retryable)
                    case StageError(code, words):
                        raise MeshError(ErrorCode.UNAVAILABLE, f"{code.value}: {words}", retryable=True)
                    case Accepted():
                        continue
                    case _ if wanted(message):
                        return message
        raise MeshError(ErrorCode.UNREACHABLE, "The stream to the model's stages was lost. Try again.", retryable=True)


def unit(values: list[float]) -> tuple[float, ...]:
    """The same direction with length 1; zeros stay."""
    length = math.hypot(*values)
    return tuple(value / length for value in values) if length else tuple(values)
