"""What is asked of the template worker, and what comes back."""

import struct
from typing import Any, Final, Literal

import msgspec

from meshnode.llm.model import Message, Tool

TEMPLATE_CHARS_MAX: Final = 256 * 1024
REQUEST_BYTES_MAX: Final = 16 * 1024 * 1024
PROMPT_CHARS_MAX: Final = 4 * 1024 * 1024
TOOLS_MAX: Final = 128
MESSAGES_MAX: Final = 4096
QUOTED_MAX: Final = 16_384
LENGTH: Final = struct.Struct("<I")  # before each frame between client and worker

Family = Literal["hermes", "llama3", "mistral", "mistral_args", "deepseek", "deepseek_args", "cohere", "harmony"]
"""How a model writes tool calls: `<tool_call>{json}</tool_call>` (Hermes, Qwen, and whoever has no way of their own);
bare JSON or `<|python_tag|>` (Llama 3); `[TOOL_CALLS][{json}]`; `[TOOL_CALLS]name[ARGS]{json}` (Mistral); DeepSeek's
marks, with fenced or bare JSON; a list within `<|START_ACTION|>` (Cohere); messages over channels (gpt-oss), whose
thoughts and answers are told apart in the same way."""


class TemplateSource(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's file says about prompts. `bos` and `eos` are the text of these tokens; `adds_bos`: the tokeniser
    puts the first one there by itself."""

    template: str | None = None
    tool_template: str | None = None
    architecture: str = ""
    bos: str = ""
    eos: str = ""
    adds_bos: bool = True


class RenderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt to be written. `now` in unix seconds, for templates that tell the model the date."""

    source: TemplateSource
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    add_generation_prompt: bool = True
    template_kwargs: dict[str, Any] = {}
    now: float = 0.0


class RenderedPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="prompt"):
    """The prompt, and what to know while reading the answer.

    `text` never begins with the bos token when the tokeniser adds it (`add_bos`). `thinking`: the prompt ends inside
    `<think>`. `stops`: what ends a turn under a default template, which the model's tokens may not know.
    `quoted`: the characters of `text` that somebody said, each [first, end); None where that is not known.
    """

    text: str
    add_bos: bool
    family: Family
    thinking: bool = False
    stops: tuple[str, ...] = ()
    quoted: tuple[tuple[int, int], ...] | None = None


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal"):
    """Why there is no prompt, in words. `hostile`: the template broke a limit, and is not to be tried again."""

    words: str
    hostile: bool = False
