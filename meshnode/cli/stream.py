"""One answer of a model, followed while it is streamed. What it looks like is its listener's."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from meshnode.cli.frames import ServerEvent
from meshnode.kernel.errors import ErrorCode, MeshError


@dataclass
class Turn:
    """An answer as far as it has come."""

    model: str = ""
    text: str = ""
    reasoning: str = ""
    shards: list[Any] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None

    def report(self) -> dict[str, Any]:
        """The answer for programs."""
        said = {"model": self.model, "answer": self.text, "finish_reason": self.finish_reason}
        return said | ({"reasoning": self.reasoning} if self.reasoning else {}) | {
            "usage": self.usage,
            "shards": self.shards,
        }  # fmt: skip


class Listener(Protocol):
    """Is told what comes, as it comes."""

    def waiting(self, words: str) -> None: ...
    def reasoning(self, text: str) -> None: ...
    def text(self, text: str) -> None: ...
    def rerouted(self, words: str) -> None: ...


def follow(events: Iterator[ServerEvent], turn: Turn, listener: Listener) -> None:
    """Until the answer is whole. Raises MeshError; `turn` then has what came before."""
    for event in events:
        data = event.data
        match event.name:
            case "inference_info":
                listener.waiting(_waiting(data))
            case "inference_routed":
                turn.model, turn.shards = data["model"], data["shards"]
            case "inference_fallback":
                turn.shards = data["shards"]
                listener.rerouted(data["message"])
            case "llm_reasoning":
                turn.reasoning += data["token"]
                listener.reasoning(data["token"])
            case "llm_token" if data["token"]:
                turn.text += data["token"]
                listener.text(data["token"])
            case "llm_done":
                turn.usage, turn.finish_reason = data["usage"], data["finish_reason"]
                return
        failed = stream_error(event, "llm_error")
        if failed is not None:
            raise failed
    raise MeshError(
        ErrorCode.UNAVAILABLE, "The agent ended the stream before the answer was whole. Ask again.", retryable=True
    )


def stream_error(event: ServerEvent, named: str) -> MeshError | None:
    """The failure that an event tells of: the stream's own (`named`), or that of every stream."""
    if event.name in (named, "error"):
        code = str(event.data.get("code", ""))
        known = ErrorCode(code) if code in set(ErrorCode) else ErrorCode.INTERNAL
        return MeshError(known, event.data["error"], retryable=event.data.get("retryable") is True)
    if event.name in ("closing", "dropped"):
        reason = event.data.get("reason", "it is stopping")
        return MeshError(ErrorCode.UNAVAILABLE, f"The agent ended the stream: {reason}. Try again.", retryable=True)
    return None


def _waiting(data: Any) -> str:
    share = f" {100 * data['completed'] // data['total']}%" if data.get("total") else ""
    return f"{data['message']}{share}"
