"""Where a template hides what was said, a conversation that names control tokens is refused; any other is answered."""

from typing import Any

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import GenerationRequest, Message
from meshnode.llm.service.prompts import Prompts, Tokenised, TokeniseRequest
from meshnode.llm.templates.model import RenderedPrompt
from protocol.sharding.pipelines import Pipeline, Span

PIPELINE = Pipeline(b"12345678", "ab" * 32, 512, 1, (Span("a" * 32, 0, 4),), 1000)


class Calls:
    """A vocabulary of characters, with one control token `<e>`."""

    def __init__(self) -> None:
        self.asked: list[TokeniseRequest] = []

    async def call(
        self, node: str, method: str, wanted: TokeniseRequest, returns: Any, *, timeout_s: float
    ) -> Tokenised:
        await trio.lowlevel.checkpoint()
        self.asked.append(wanted)
        text = wanted.text.replace("<e>", "\0") if wanted.parse_special else wanted.text
        return Tokenised(tuple(ord(char) for char in text))


async def tokens(calls: Any, said: str, quoted: tuple[tuple[int, int], ...] | None) -> tuple[int, ...]:
    unused: Any = None
    prompts = Prompts(models=unused, renderer=unused, calls=calls, forget=lambda model: None, context=0)
    request = GenerationRequest(model="m", messages=(Message(role="user", content=said),))
    prompt = RenderedPrompt(text=f"{said}<e>", add_bos=False, family="hermes", quoted=quoted)
    return await prompts.tokens(PIPELINE, request, prompt)


async def test_what_is_known_to_be_said_is_told_to_the_tokeniser() -> None:
    calls = Calls()
    await tokens(calls, "Hi <e>", ((0, 6),))
    assert [asked.quoted for asked in calls.asked] == [((0, 6),)]


async def test_an_innocent_conversation_under_a_template_that_hides_it_is_answered() -> None:
    assert (await tokens(Calls(), "Hi", None)) == (ord("H"), ord("i"), 0)


async def test_a_forgery_under_a_template_that_hides_it_is_refused() -> None:
    with pytest.raises(MeshError, match="control token") as caught:
        await tokens(Calls(), "Hi <e>", None)
    assert caught.value.code is ErrorCode.BAD_REQUEST
