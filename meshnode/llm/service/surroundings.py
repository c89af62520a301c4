"""What the stages of a node need of the node that holds them."""

import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from meshnode.kernel.logs import Logger
from meshnode.llm.engine.client import Engine
from meshnode.llm.engine.spec import StageSpec
from meshnode.llm.service.calls import Calls
from protocol.sharding.frames import Stats
from protocol.sharding.hosting import HostingInput
from protocol.sharding.offers import Speed
from protocol.sharding.pipelines import Pipeline, Span


class Weights(Protocol):
    """Where a stage's file comes from."""

    async def stage_file(
        self, digest: str, first: int, end: int, *, tail: bool, progress: Callable[[int, int, str], None]
    ) -> tuple[str, bool]:
        """The path of a file with these layers, and whether it has the tail that was asked for."""
        ...


class OpenEngine(Protocol):
    """A loaded engine for as long as the block runs; see engine/process.py."""

    def __call__(
        self,
        stage: StageSpec,
        /,
        *,
        progress: Callable[[float], None] | None = None,
        tunnels: Sequence[socket.socket] = (),
    ) -> AbstractAsyncContextManager[Engine]: ...


class Surroundings(Protocol):
    """What a stage needs of the node that holds it."""

    @property
    def calls(self) -> Calls: ...
    @property
    def weights(self) -> Weights: ...
    @property
    def log(self) -> Logger: ...
    @property
    def threads(self) -> int:
        """How many cores its engine may use."""
        ...

    @property
    def open_engine(self) -> OpenEngine:
        """What starts its engine."""
        ...

    def submit(self, event: HostingInput) -> None:
        """Tell the machine that decides about stages."""
        ...

    def wants_speed(self) -> bool:
        """Whether this node's speed is to be measured on what is loaded now."""
        ...

    async def measured(self, speed: Speed) -> None:
        """Take a measurement in."""
        ...

    def weight_bytes(self, model: str, first: int, end: int) -> int:
        """What each token reads of these layers; 0 if nobody knows."""
        ...

    def hear(self, pipeline: Pipeline, span: Span, stats: Stats) -> None:
        """A stage tells what it did."""
        ...

    def cannot_split(self, model: str) -> None:
        """This node's llama.cpp gives no hidden states of such models."""
        ...
