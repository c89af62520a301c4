"""Generations whose two sides are stored as they happen: whoever loses the connection finds them in the chat.

What the person said is stored before the model is asked, what came of the answer however it ends: whole, stopped or cut
off by a failure. It leaves storing to `chats`, and answering to whoever generates.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final, Protocol

import trio

from meshnode.llm.model import ChatSession, GenerationEvent, GenerationRequest, Message, TextDelta

STORE_S: Final = 10.0
"""How long storing may take once the client has left."""


class Generates(Protocol):
    """Who answers."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]: ...


class Stores(Protocol):
    """Where chats are."""

    def read(self, chat: str) -> ChatSession: ...
    async def append(self, chat: str, role: str, content: str, sent_at: float | None = None) -> None: ...


class Recording:
    """See the module."""

    def __init__(self, *, llm: Generates, chats: Stores) -> None:
        self._llm = llm
        self._chats = chats

    async def generate(self, request: GenerationRequest, chat: str) -> AsyncGenerator[GenerationEvent, None]:
        """As the generation itself. Raises MeshError NOT_FOUND for an unknown chat; then nobody was asked."""
        for message in unstored(self._chats.read(chat), request.messages):
            await self._chats.append(chat, message.role, message.content)
        said: list[str] = []
        try:
            async with aclosing(self._llm.generate(request)) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        said.append(event.text)
                    yield event
        finally:
            if any(said):
                with trio.move_on_after(STORE_S, shield=True):
                    await self._chats.append(chat, "assistant", "".join(said))


def unstored(chat: ChatSession, messages: Sequence[Message]) -> Sequence[Message]:
    """What of a conversation a chat does not have yet.

    A conversation that goes on from what is stored, or repeats its last turn because no answer came, adds the rest. One
    that does not (a turn was edited, an answer cut off) adds what was said since the last answer.
    """
    stored = [(line.role, line.content) for line in chat.messages]
    told = [(message.role, message.content) for message in messages]
    if told[: len(stored)] == stored:
        return messages[len(stored) :]
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    return messages[answers[-1] + 1 :] if answers else messages
