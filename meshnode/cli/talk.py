"""One conversation: what was said so far, the next turn, and the chat of the mesh that stores both sides."""

from contextlib import closing
from pathlib import Path
from typing import Any

from meshnode.cli.client import AgentClient
from meshnode.cli.stream import Listener, Turn, follow
from meshnode.kernel.errors import ErrorCode, MeshError

CHATS = "/api/llm/sessions"


class Talk:
    """`fields` go into every request; `system` begins every new conversation."""

    def __init__(self, agent: AgentClient, *, model: str, system: str | None, fields: dict[str, Any]) -> None:
        self._agent = agent
        self._system = system
        self._fields = fields
        self.model = model
        self.chat: str | None = None
        self.title = ""
        self.messages: list[dict[str, str]] = []
        self.renew()

    def renew(self) -> None:
        """Begin anew; the chat so far stays stored."""
        self.chat, self.title = None, ""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def resume(self, wanted: str) -> None:
        """Go on with a stored chat, named by its id or the beginning of it. Raises MeshError."""
        found = self.stored()
        matches = [chat for chat in found if chat["id"] == wanted] or [
            chat for chat in found if chat["id"].startswith((wanted, f"sess_{wanted}"))
        ]
        if len(matches) != 1:
            what = "No stored chat has" if not matches else f"{len(matches)} stored chats have"
            raise MeshError(
                ErrorCode.CONFLICT if matches else ErrorCode.NOT_FOUND,
                f"{what} an id that begins with {wanted!r}; /sessions in `meshnode chat` lists them.",
            )
        chat = self._agent.get(f"{CHATS}/{matches[0]['id']}")
        self.chat, self.title = chat["id"], chat["title"]
        self.messages = [{"role": line["role"], "content": line["content"]} for line in chat["messages"]]

    def stored(self) -> list[Any]:
        """The chats of the mesh, the last used first."""
        return self._agent.pages(CHATS)

    def say(self, words: str, turn: Turn, listener: Listener) -> None:
        """Say something and follow the answer into `turn`.

        However it ends, what was said stays; only a question that got no answer at all is taken back, so that it can be
        asked again. Raises MeshError and KeyboardInterrupt.
        """
        if self.chat is None:
            # Only now: who starts and says nothing leaves no empty chat behind.
            self.chat = str(self._agent.post(CHATS, {"model": self.model})["id"])
        self.messages.append({"role": "user", "content": words})
        body = {"model": self.model, "messages": self.messages, "session_id": self.chat, **self._fields}
        try:
            with closing(self._agent.post_events("/api/llm/chat", body)) as events:
                follow(events, turn, listener)
        finally:
            if turn.text:
                self.messages.append({"role": "assistant", "content": turn.text})
            elif turn.finish_reason is None:
                self.messages.pop()

    def save(self, path: Path) -> None:
        """Write it down as Markdown into a file that is not there yet. Raises MeshError."""
        parts = [f"# {self.title or 'Chat with ' + self.model}"]
        parts += [f"**{message['role']}**\n\n{message['content']}" for message in self.messages]
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write("\n\n".join(parts) + "\n")
        except FileExistsError as error:
            raise MeshError(ErrorCode.CONFLICT, f"{path} is there already: name another file.") from error
        except OSError as error:
            raise MeshError(ErrorCode.FORBIDDEN, f"{path} cannot be written ({error.strerror}).") from error
