"""Both sides of a generation are stored, however it ends."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import (
    ChatLine,
    ChatSession,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Message,
    MessageRole,
    ReasoningDelta,
    TextDelta,
    Usage,
)
from meshnode.llm.service.recording import Recording, unstored

DONE = Finished(reason="stop", usage=Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=2))


class Model:
    """Answers by a script: an event, an error to raise, or None for a silence without end."""

    def __init__(self, *script: Any) -> None:
        self.script = script
        self.asked = 0
        self.closed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.asked += 1
        try:
            for event in self.script:
                await trio.lowlevel.checkpoint()
                if event is None:
                    await trio.sleep_forever()
                if isinstance(event, MeshError):
                    raise event
                yield event
        finally:
            self.closed += 1


class Notebook:
    """Chats as the recording sees them; storing takes a moment, as a disk does."""

    def __init__(self, *lines: tuple[str, str]) -> None:
        self.lines = list(lines)

    def read(self, chat: str) -> ChatSession:
        if chat != "sess_1":
            raise MeshError(ErrorCode.NOT_FOUND, "no such chat")
        return chat_of(*self.lines)

    async def append(self, chat: str, role: str, content: str, sent_at: float | None = None) -> None:
        await trio.sleep(0.01)
        self.lines.append((role, content))


def chat_of(*lines: tuple[str, str]) -> ChatSession:
    stored = tuple(ChatLine(role=role, content=content, sent_at="") for role, content in lines)
    return ChatSession(id="sess_1", model="m", title="t", created_at="", updated_at="", messages=stored)


def asking(*turns: tuple[MessageRole, str]) -> GenerationRequest:
    return GenerationRequest(model="m", messages=tuple(Message(role=role, content=text) for role, text in turns))


HI = asking(("user", "hi"))
HELLO = (ReasoningDelta(text="hm"), TextDelta(text="Hel"), TextDelta(text="lo"), DONE)


async def test_a_whole_answer_is_stored_behind_its_question() -> None:
    model, book = Model(*HELLO), Notebook()
    told = [event async for event in Recording(llm=model, chats=book).generate(HI, "sess_1")]
    assert told == list(HELLO)
    assert book.lines == [("user", "hi"), ("assistant", "Hello")]


async def test_a_client_that_leaves_stops_the_answer_and_loses_nothing() -> None:
    model, book = Model(TextDelta(text="Hel"), None), Notebook()
    with trio.move_on_after(0.1) as scope:
        async with aclosing(Recording(llm=model, chats=book).generate(HI, "sess_1")) as events:
            async for _ in events:
                pass
    assert scope.cancelled_caught
    assert model.closed == 1
    assert book.lines == [("user", "hi"), ("assistant", "Hel")]


async def test_a_reader_that_has_heard_enough_stops_the_answer() -> None:
    model, book = Model(TextDelta(text="Hel"), TextDelta(text="lo"), DONE), Notebook()
    async with aclosing(Recording(llm=model, chats=book).generate(HI, "sess_1")) as events:
        await anext(events)
    assert model.closed == 1
    assert book.lines == [("user", "hi"), ("assistant", "Hel")]


async def test_a_failure_keeps_what_was_said_and_is_told() -> None:
    lost = MeshError(ErrorCode.UNAVAILABLE, "all nodes are gone")
    for script, stored in (((TextDelta(text="Hel"), lost), [("assistant", "Hel")]), ((lost,), [])):
        model, book = Model(*script), Notebook()
        with pytest.raises(MeshError) as caught:
            _ = [event async for event in Recording(llm=model, chats=book).generate(HI, "sess_1")]
        assert caught.value is lost
        assert book.lines == [("user", "hi"), *stored]


async def test_an_unknown_chat_is_refused_before_anybody_is_asked() -> None:
    model = Model(*HELLO)
    with pytest.raises(MeshError, match="no such chat"):
        _ = [event async for event in Recording(llm=model, chats=Notebook()).generate(HI, "sess_2")]
    assert model.asked == 0


@pytest.mark.parametrize(
    ("stored", "told", "added"),
    [
        ([], "S U", "S U"),
        (["U"], "U", ""),  # asked again, because no answer came
        (["S", "U", "A"], "S U A V", "V"),
        (["U", "A"], "U A V B W", "V B W"),  # said elsewhere, and stored now
        (["U", "A"], "U B V", "V"),  # the client saw less of the answer than was stored
        (["U", "A"], "V", "V"),  # a client that sends its last message alone
        (["U", "A"], "U A", ""),
    ],
)
def test_what_of_a_conversation_is_new(stored: list[str], told: str, added: str) -> None:
    roles: dict[str, MessageRole] = {"S": "system", "A": "assistant", "B": "assistant"}
    chat = chat_of(*((roles.get(word, "user"), word) for word in stored))
    request = asking(*((roles.get(word, "user"), word) for word in told.split()))
    assert [message.content for message in unstored(chat, request.messages)] == added.split()
