"""Completions, the endpoint from before chat: bare prompts, and their own form of log probabilities."""

from typing import Any

from meshnode.llm.model import Finished, GenerationEvent, GenerationRequest, TextDelta, TokenDetail, Usage
from meshnode.surfaces.openai.errors import invalid, unsupported
from meshnode.surfaces.openai.schema import CompletionRequest, Prompts
from meshnode.surfaces.openai.translate.asking import engine_of, refuse, sampling_of, stages_of
from meshnode.surfaces.openai.translate.chat import refuse_streaming, usage_of

TOKENS_DEFAULT = 16  # what this endpoint has always meant by nothing
PROMPTS_MAX = 64


def requests_of(request: CompletionRequest) -> list[GenerationRequest]:
    """One generation for each prompt and choice, those of one prompt together. Raises MeshError BAD_REQUEST."""
    refuse(request, "suffix")
    if request.echo:
        raise unsupported("echo", "put the prompt before the answer on your side.")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "ask for n choices and choose.")
    refuse_streaming(request.stream, request.stream_options)
    prompts = prompts_of(request.prompt, "prompt")
    if len(prompts) * (request.n or 1) > PROMPTS_MAX:
        raise invalid("prompt", f"and n ask for more than {PROMPTS_MAX} answers at once.")
    return [
        GenerationRequest(
            model=request.model,
            prompt=prompt,
            sampling=sampling_of(
                request, tokens_max=request.max_tokens or TOKENS_DEFAULT, logprobs=request.logprobs, seed_step=step
            ),
            stages_min=stages_of(request.meshnode),
            engine=engine_of(request.meshnode),
        )
        for prompt in prompts
        for step in range(request.n or 1)
    ]


def prompts_of(given: Prompts, name: str) -> list[str | tuple[int, ...]]:
    """One or several texts or lists of tokens."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid(name, "is empty.")
    if isinstance(given[0], int):
        return [_tokens(given, name)]
    return [entry if isinstance(entry, str) else _tokens(entry, name) for entry in given]


def _tokens(given: Any, name: str) -> tuple[int, ...]:
    if not given or any(not isinstance(token, int) or not 0 <= token < 2**31 for token in given):
        raise invalid(name, "has something else than token numbers in a list of tokens.")
    return tuple(given)


def _logprobs(tokens: list[TokenDetail], offset: int) -> dict[str, Any]:
    told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        text = token.bytes.decode("utf-8", "replace")
        told["tokens"].append(text)
        told["token_logprobs"].append(token.logprob)
        told["top_logprobs"].append({other.bytes.decode("utf-8", "replace"): other.logprob for other in token.top})
        told["text_offset"].append(offset)
        offset += len(text)
    return told


def _together(usages: list[Usage], choices_each: int) -> Usage:
    """Prompts are counted once for all their choices."""
    prompts = usages[::choices_each]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )


class CompletionChunks:
    """Events of all choices to the chunks of a stream."""

    def __init__(
        self, answer_id: str, created: int, model: str, *, choices: int, choices_each: int, include_usage: bool
    ) -> None:
        self._head = {"id": answer_id, "object": "text_completion", "created": created, "model": model}
        self._include_usage = include_usage
        self._choices_each = choices_each
        self._offsets = [0] * choices
        self._usages: dict[int, Usage] = {}

    def chunks(self, choice: int, event: GenerationEvent) -> list[dict[str, Any]]:
        """What to send for one event."""
        match event:
            case TextDelta(text=text, tokens=tokens) if text or tokens:
                logprobs = _logprobs(list(tokens), self._offsets[choice]) if tokens else None
                self._offsets[choice] += len(text)
                return [self._chunk(choice, text, logprobs, None)]
            case Finished(reason=reason, usage=usage):
                self._usages[choice] = usage
                return [self._chunk(choice, "", None, reason)]
        return []

    def last(self) -> list[dict[str, Any]]:
        """After all choices: the usage, where it was asked for."""
        if not self._include_usage or not self._usages:
            return []
        usages = [self._usages[number] for number in sorted(self._usages)]
        return [self._head | {"choices": [], "usage": usage_of(_together(usages, self._choices_each))}]

    def _chunk(self, choice: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        told = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}
        chunk = self._head | {"choices": [told]}
        return chunk | {"usage": None} if self._include_usage else chunk


class CompletionAnswer:
    """Events of all choices to one answer."""

    def __init__(self, answer_id: str, created: int, model: str, *, choices: int, choices_each: int) -> None:
        self._head = {"id": answer_id, "object": "text_completion", "created": created, "model": model}
        self._choices_each = choices_each
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._tokens: list[list[TokenDetail]] = [[] for _ in range(choices)]
        self._ends: dict[int, Finished] = {}

    def add(self, choice: int, event: GenerationEvent) -> None:
        """Take in one event."""
        match event:
            case TextDelta(text=text, tokens=tokens):
                self._texts[choice].append(text)
                self._tokens[choice].extend(tokens)
            case Finished():
                self._ends[choice] = event

    def body(self) -> dict[str, Any]:
        """The answer, once every choice has finished."""
        choices = [
            {
                "index": number,
                "text": "".join(texts),
                "logprobs": _logprobs(self._tokens[number], 0) if self._tokens[number] else None,
                "finish_reason": self._ends[number].reason,
            }
            for number, texts in enumerate(self._texts)
        ]
        usages = [self._ends[number].usage for number in sorted(self._ends)]
        return self._head | {"choices": choices, "usage": usage_of(_together(usages, self._choices_each))}
