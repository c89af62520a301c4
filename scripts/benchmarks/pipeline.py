"""Several engine processes chained by one process, as agents chain them over links: for measuring and for tests.

It relays frames as an agent does and plays the entry of every session. Nothing is checked that an agent would check of
its peers: all processes are its own.
"""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import msgspec
import trio

from meshnode.kernel.errors import MeshError
from meshnode.llm.engine.client import Ended, Engine, Outgoing
from meshnode.llm.engine.process import open_engine
from meshnode.llm.engine.spec import StageSpec
from protocol.ids import NODE_ID_BYTES
from protocol.sharding.frames import (
    Accepted,
    Cancel,
    Destination,
    Embedding,
    Finish,
    Open,
    Pieces,
    Refused,
    StageError,
    Stats,
    encode,
)
from protocol.sharding.sampling import Sampling

ENTRY = bytes(range(NODE_ID_BYTES))
Event = Accepted | Refused | Pieces | Embedding | StageError


@dataclass
class Reply:
    """A whole answer: its tokens, the times they came, and everything that was said."""

    tokens: list[int] = field(default_factory=list)
    text: bytes = b""
    cached_tokens: int = 0
    finish: Finish = Finish.NONE
    error: StageError | Refused | None = None
    embedding: bytes = b""
    times: list[float] = field(default_factory=list)
    alternatives: list[tuple[object, ...]] = field(default_factory=list)
    began: float = 0.0


class StageLostError(Exception):
    """An engine ended while somebody waited for an answer of its pipeline."""


class Pipeline:
    """Loaded stages and the sessions that run on them."""

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self.complaints: list[StageError] = []
        self.stats: dict[int, Stats] = {}
        self.ended: dict[int, Ended] = {}
        self.carried_bytes = 0
        """Bytes of all frames between stages, and from the last one to entries."""

        self._sessions: dict[bytes, trio.MemorySendChannel[Event]] = {}

    async def relay(self, index: int) -> None:
        """Carries what one stage sends until it ends."""
        async for item in self.engines[index].frames():
            if isinstance(item, Ended):
                self.ended[index] = item
                for events in self._sessions.values():
                    events.close()
                continue
            # What is for a stage that has ended is lost, as with a peer that is gone.
            with suppress(MeshError):
                await self._deliver(index, item)

    async def _deliver(self, index: int, item: Outgoing) -> None:
        if item.destination is not Destination.AGENT:
            self.carried_bytes += len(item.frame)
        match item.destination:
            case Destination.NEXT:
                await self.engines[index + 1].send(item.frame)
            case Destination.FIRST:
                await self.engines[0].send(item.frame)
            case Destination.ENTRY:
                message = item.message()
                assert isinstance(message, Event)
                events = self._sessions.get(message.session or b"")
                if events is not None:
                    with suppress(trio.ClosedResourceError):
                        await events.send(message)
            case Destination.AGENT:
                message = item.message()
                if isinstance(message, Stats):
                    self.stats[index] = message
                elif isinstance(message, StageError):
                    self.complaints.append(message)

    @asynccontextmanager
    async def session(
        self, prompt: Sequence[int], sampling: Sampling, *, generated: Sequence[int] = (), pooling: str = ""
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """What an entry hears of one session; left early, the session is cancelled."""
        session = os.urandom(16)
        sending, receiving = trio.open_memory_channel[Event](10_000)
        self._sessions[session] = sending
        try:
            await self.engines[0].send(encode(Open(session, ENTRY, tuple(prompt), sampling, tuple(generated), pooling)))
            yield receiving
        finally:
            del self._sessions[session]
            with trio.CancelScope(shield=True), suppress(MeshError):
                await self.engines[0].send(encode(Cancel(session, ENTRY)))

    async def ask(
        self, prompt: Sequence[int], sampling: Sampling, *, generated: Sequence[int] = (), pooling: str = ""
    ) -> Reply:
        """The whole answer to a prompt."""
        reply = Reply(began=trio.current_time())
        async with self.session(prompt, sampling, generated=generated, pooling=pooling) as events:
            async for event in events:
                match event:
                    case Accepted():
                        reply.cached_tokens = event.cached_tokens
                    case Refused() | StageError():
                        reply.error = event
                        return reply
                    case Embedding():
                        reply.embedding = event.vector
                        return reply
                    case Pieces():
                        reply.tokens += event.tokens
                        reply.text += b"".join(event.pieces)
                        reply.times += [trio.current_time()] * len(event.tokens)
                        reply.alternatives += event.alternatives
                        reply.finish = event.finish
                        if event.finish is not Finish.NONE:
                            return reply
        raise StageLostError(f"a stage ended in the middle of an answer: {self.ended}")


@asynccontextmanager
async def open_pipeline(files: Sequence[tuple[str, int]], spec: StageSpec) -> AsyncIterator[Pipeline]:
    """Loads (path, layers) of each stage with the rest of `spec`, side by side, and relays between them."""
    async with AsyncExitStack() as stack:
        engines: list[Engine] = []
        for index, (path, layers) in enumerate(files):
            stage = msgspec.structs.replace(spec, path=path, layers=layers, stage=index, stages=len(files))
            engines.append(await stack.enter_async_context(open_engine(stage)))
        pipeline = Pipeline(engines)
        async with trio.open_nursery() as nursery:
            for index in range(len(engines)):
                nursery.start_soon(pipeline.relay, index)
            yield pipeline
            nursery.cancel_scope.cancel()
