"""From what was asked to what the model is given: the prompt's tokens, the length of the context, how tokens are
chosen.
"""

import random
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from meshnode.kernel.calls import CALL_S
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import GenerationRequest
from meshnode.llm.model import Sampling as Wishes
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.models import Known, Models
from meshnode.llm.templates.client import TemplateWorker
from meshnode.llm.templates.forcing import grammar_for
from meshnode.llm.templates.model import PROMPT_CHARS_MAX, QUOTED_MAX, Family, RenderedPrompt
from protocol.sharding.frames import Tokens
from protocol.sharding.pipelines import Pipeline, PipelineId
from protocol.sharding.sampling import Grammar, GrammarKind, Sampling
from protocol.sharding.shapes import ModelShape

CONTEXT_DEFAULT: Final = 4096
ANSWER_ROOM: Final = 512  # tokens of an answer that a context must have room for when nobody says how many
FIRST_S: Final = 4.0  # for a first stage to tokenise, where there is a last one that can as well
TEMPERATURE: Final = 0.8
TOP_K: Final = 40
TOP_P: Final = 0.95
MIN_P: Final = 0.05
"""llama.cpp's defaults, for those who say nothing."""


_Place = Annotated[int, msgspec.Meta(ge=0, le=PROMPT_CHARS_MAX)]
Quoted = Annotated[tuple[tuple[_Place, _Place], ...], msgspec.Meta(max_length=QUOTED_MAX)]


class TokeniseRequest(msgspec.Struct, frozen=True, array_like=True):
    """Text to tokens, asked of a node that holds the vocabulary."""

    pipeline: PipelineId
    text: str
    add_special: bool
    parse_special: bool
    quoted: Quoted = ()  # characters, each [first, end), that may name no control tokens


class Tokenised(msgspec.Struct, frozen=True, array_like=True):
    """The tokens."""

    tokens: Tokens


class Prompts:
    """See the module. `forget` is told when a stage could not be asked."""

    def __init__(
        self,
        *,
        models: Models,
        renderer: TemplateWorker,
        calls: Calls,
        forget: Callable[[str], None],
        context: int,
    ) -> None:
        self._models = models
        self._renderer = renderer
        self._calls = calls
        self._forget = forget
        self._context = context

    async def rendered(self, known: Known, request: GenerationRequest) -> RenderedPrompt | None:
        """The conversation as the model wants it written; None for a bare prompt."""
        if request.prompt is not None:
            return None
        return await self._renderer.render(
            await self._models.template(known),
            request.messages,
            request.tools,
            request.tool_choice,
            template_kwargs=request.template_kwargs,
        )

    async def tokens(
        self, pipeline: Pipeline, request: GenerationRequest, prompt: RenderedPrompt | None
    ) -> tuple[int, ...]:
        if prompt is not None:
            if prompt.quoted is None:
                await self._check_innocent(pipeline, request)
            tokens = await self.tokenise(
                pipeline, prompt.text, add_special=prompt.add_bos, parse_special=True, quoted=prompt.quoted or ()
            )
        elif isinstance(request.prompt, str):
            tokens = await self.tokenise(pipeline, request.prompt, add_special=True, parse_special=False)
        else:
            tokens = tuple(request.prompt or ())
        if pipeline.vocabulary and any(token >= pipeline.vocabulary for token in tokens):
            raise MeshError(ErrorCode.BAD_REQUEST, f"A token is outside the vocabulary of {pipeline.vocabulary}.")
        if not tokens:
            raise MeshError(ErrorCode.BAD_REQUEST, "The prompt is empty. Say something.")
        return tokens

    async def _check_innocent(self, pipeline: Pipeline, request: GenerationRequest) -> None:
        """Where the template hides what was said, nobody may say control tokens. Raises MeshError BAD_REQUEST."""
        said = "\n".join(
            part
            for message in request.messages
            for part in (message.content, message.reasoning or "", *(call.arguments for call in message.tool_calls))
        )
        said += "\n".join(msgspec.json.encode(tool).decode() for tool in request.tools)
        plain = await self.tokenise(pipeline, said, add_special=False, parse_special=False)
        if plain != await self.tokenise(pipeline, said, add_special=False, parse_special=True):
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                "Something said in this conversation names a control token of the model, and its chat template changes "
                "what was said, so that it could be mistaken for one. Leave it out, or write it with a blank inside.",
            )

    async def tokenise(
        self, pipeline: Pipeline, text: str, *, add_special: bool, parse_special: bool, quoted: Quoted = ()
    ) -> tuple[int, ...]:
        """Ask the first stage, then the last: both hold the vocabulary. Raises MeshError."""
        wanted = TokeniseRequest(pipeline.id, text, add_special, parse_special, quoted)
        nodes = tuple(dict.fromkeys((pipeline.first, pipeline.last)))
        words = ""
        for node in nodes:
            # A first stage that hangs must not take all the time that there is for the last one.
            within_s = CALL_S if node == nodes[-1] else FIRST_S
            try:
                return (await self._calls.call(node, "llm.tokenise", wanted, Tokenised, timeout_s=within_s)).tokens
            except MeshError as error:
                if error.code is ErrorCode.TOO_LARGE:
                    said = f"The prompt has {len(text)} characters, more than any context here takes."
                    raise too_long(said) from error
                if not error.retryable:
                    raise
                self._forget(pipeline.model)
                words = error.message
        # What is not found is a stage, not the model: nobody should be told that this mesh has no such model.
        raise MeshError(ErrorCode.UNAVAILABLE, f"The model's stages do not answer: {words}", retryable=True)

    def wanted_context(self, known: Known, tokens: int = 0) -> int:
        return self.usual_context(known.shape, tokens)

    def usual_context(self, shape: ModelShape, tokens: int = 0) -> int:
        """As the settings say, or as a prompt of so many tokens needs; no longer than the model knows."""
        return min(shape.context_max, max(self._context or CONTEXT_DEFAULT, tokens))

    def context_for(self, known: Known, pipeline: Pipeline, tokens: tuple[int, ...], wishes: Wishes) -> int:
        """How long a context the session needs. Raises MeshError, as OpenAI's clients know it, if no model has it."""
        longest = known.shape.context_max
        if len(tokens) + 1 > longest:
            raise too_long(f"The prompt has {len(tokens)} tokens, and {known.name} takes {longest} with its answer.")
        needed = min(longest, len(tokens) + (wishes.tokens_max or ANSWER_ROOM))
        if needed <= pipeline.context:
            return pipeline.context
        # In steps, so that a chat that grows does not load its model anew at every turn.
        return min(longest, 1 << (needed - 1).bit_length())

    def sampling(self, request: GenerationRequest, prompt: RenderedPrompt | None, tokens_max: int) -> Sampling:
        wishes = request.sampling
        gbnf = request.answer.gbnf
        if request.answer.kind != "grammar":
            family: Family = "hermes" if prompt is None else prompt.family
            thinking = prompt is not None and prompt.thinking
            gbnf = grammar_for(family, request.tools, request.tool_choice, request.answer, thinking=thinking)
        return Sampling(
            max_tokens=tokens_max,
            temperature=TEMPERATURE if wishes.temperature is None else wishes.temperature,
            top_k=TOP_K if wishes.top_k is None else wishes.top_k,
            top_p=TOP_P if wishes.top_p is None else wishes.top_p,
            min_p=MIN_P if wishes.min_p is None else wishes.min_p,
            repeat_penalty=wishes.repeat_penalty or 1.0,
            frequency_penalty=wishes.frequency_penalty,
            presence_penalty=wishes.presence_penalty,
            seed=random.SystemRandom().getrandbits(63) if wishes.seed is None else wishes.seed % 2**63,
            logit_bias={token: _bias(bias) for token, bias in wishes.logit_bias.items()},
            logprobs=wishes.logprobs,
            grammar=None if gbnf is None else Grammar(GrammarKind.GBNF, gbnf),
            ignore_eos=wishes.ignore_eos,
            speculate=wishes.speculate,
            special_pieces=prompt is not None,
            fixed=wishes.seed is not None,
        )


def _bias(bias: float) -> float:
    """-100 means never, as OpenAI's documentation has it."""
    return float("-inf") if bias <= -100 else bias


def too_long(words: str) -> MeshError:
    """A prompt that no context holds, as OpenAI's clients know it."""
    return MeshError(
        ErrorCode.BAD_REQUEST,
        f"{words} Shorten it.",
        detail={"openai_code": "context_length_exceeded", "param": "messages"},
    )
