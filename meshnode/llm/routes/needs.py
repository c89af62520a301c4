"""What the routes need of the services."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from meshnode.llm.model import (
    ChatSession,
    EngineKind,
    GenerationEvent,
    GenerationRequest,
    Loading,
    MessageRole,
    ModelCard,
    PlanReport,
    PullProgress,
    RemovedReport,
    SessionReport,
    VersionsReport,
    WorkerReport,
)
from protocol.ids import NodeId


class Llm(Protocol):
    """Models as they run. Every method raises MeshError."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """One generation; close it to stop it everywhere."""
        ...

    def load(self, model: str, *, stages_min: int, engine: EngineKind | None) -> AsyncGenerator[Loading, None]:
        """Make a model ready; ends when it is."""
        ...

    async def unload(self, model: str) -> None:
        """Free the memory it takes, on all nodes. NOT_FOUND when there is no such model; not loaded is no error."""
        ...

    async def cards(self) -> Sequence[ModelCard]:
        """Every model that can be asked for, those that are ready first."""
        ...

    async def plan(self, model: str, *, context: int | None) -> PlanReport:
        """Where its layers would go now."""
        ...

    async def sessions(self, *, local_only: bool) -> tuple[Sequence[SessionReport], Sequence[NodeId]]:
        """Generations under way, of every entry; and the nodes that could not be asked."""
        ...

    async def standings(self) -> Sequence[VersionsReport]:
        """What different versions of llama-cpp-python mean for the mesh's models, those that want mending first."""
        ...

    async def workers(self) -> Sequence[WorkerReport]:
        """What each node lends, this one included."""
        ...


class Pulls(Protocol):
    """Models on disk. Every method raises MeshError."""

    def pull(self, ref: str, *, node: NodeId | None, whole: bool) -> AsyncGenerator[PullProgress, None]:
        """Fetch a model; ends when it is there. Joined by later asks for the same."""
        ...

    async def remove(self, model: str, *, node: NodeId | None, everywhere: bool, force: bool) -> RemovedReport:
        """Delete it here, on `node`, or everywhere. CONFLICT while it is loaded, unless `force`."""
        ...


class Library(Protocol):
    """Models known by name that nobody need hold yet."""

    def catalogue(self) -> Sequence[ModelCard]:
        """What `pull` knows by name."""
        ...


class Chats(Protocol):
    """Stored conversations. Every method raises MeshError."""

    def list(self) -> Sequence[ChatSession]:
        """Without messages, the last used first."""
        ...

    def read(self, chat: str) -> ChatSession:
        """With all messages."""
        ...

    async def create(self, model: str) -> ChatSession:
        """A new, empty one."""
        ...

    async def append(self, chat: str, role: MessageRole, content: str, sent_at: float | None = None) -> None:
        """Add a message."""
        ...

    async def rename(self, chat: str, title: str) -> None:
        """Give it a title."""
        ...

    async def delete(self, chat: str) -> None:
        """Delete it everywhere, whether it is there or not."""
        ...


class Recording(Protocol):
    """Generations of which both sides are stored in a chat."""

    def generate(self, request: GenerationRequest, chat: str) -> AsyncGenerator[GenerationEvent, None]:
        """As `Llm.generate`; what was said is stored however it ends."""
        ...
