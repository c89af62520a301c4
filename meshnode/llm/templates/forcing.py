"""Which grammar an answer must satisfy: from tool_choice, response_format, and how the model writes calls.

A call that may but need not come (`auto`) is only looked for afterwards, unless the answer has a forced format
anyway: then the grammar allows that format or calls. With `required` or a named tool, calls are forced from the first
character on.
"""

from collections.abc import Sequence
from typing import Final

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import AnswerFormat, Tool, ToolChoice
from meshnode.llm.templates.families import (
    COHERE_MARKS,
    COHERE_THOUGHT_CLOSES,
    COHERE_THOUGHT_OPENS,
    HARMONY_CHANNEL,
    HARMONY_END,
    HARMONY_FINAL,
    HARMONY_MESSAGE,
    HARMONY_START,
    calls_rule,
)
from meshnode.llm.templates.model import TOOLS_MAX, Family
from meshnode.llm.templates.schema import GRAMMAR_CHARS_MAX, Rules, literal


def _until(mark: str) -> str:
    """Everything but the mark, then the mark: one character at a time, since a grammar knows no "not this word".

    Only the mark's first character may begin it, and each time that it comes it may: `<</think>` ends a thought, too.
    """
    first, begun = mark[0], [literal(mark[:at]) for at in range(1, len(mark))]
    left = " | ".join(f"{part} [^{first}{mark[at]}]" for at, part in enumerate(begun, 1))
    again = f"({' | '.join(begun)})*"
    return f"([^{first}] | {again} ({left}))* {again} {literal(mark)}"


_THOUGHT: Final = f'{_until("</think>")} "\\n"{{0,2}}'
_COHERE_THOUGHT: Final = _until(COHERE_THOUGHT_CLOSES)
# Nothing of a thought may look like the beginning of a mark; `<|end|>` ends it.
_HARMONY_THOUGHT: Final = (
    f'{literal(f"{HARMONY_CHANNEL}analysis{HARMONY_MESSAGE}")} ([^<] | "<"+ [^|<])* "<"* '
    f"{literal(f'{HARMONY_END}{HARMONY_START}assistant')}"
)


def check_tools(tools: Sequence[Tool]) -> None:
    """Refuses too many tools, tools without a proper name, and two of one name, with BAD_REQUEST."""
    if len(tools) > TOOLS_MAX:
        raise MeshError(
            ErrorCode.BAD_REQUEST, f"{len(tools)} tools were sent; at most {TOOLS_MAX} are taken in one request."
        )
    names = [tool.name for tool in tools]
    for name in names:
        if not 1 <= len(name) <= 64 or not all(char.isascii() and (char.isalnum() or char in "_-.") for char in name):
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                f"{name[:80]!r} is no name for a tool: 1 to 64 of letters, digits, _, - and dots.",
            )
        if names.count(name) > 1:
            raise MeshError(ErrorCode.BAD_REQUEST, f"Two tools are called {name!r}; give each a name of its own.")


def grammar_for(
    family: Family,
    tools: Sequence[Tool],
    tool_choice: ToolChoice,
    answer_format: AnswerFormat,
    *,
    thinking: bool = False,
) -> str | None:
    """GBNF text that the answer must satisfy, or None when it is free.

    `thinking`: the prompt ends inside `<think>`, so the answer closes it first.

        Raises: MeshError: BAD_REQUEST for a tool that is not there, formats that exclude each other, a schema that
        cannot be said.
    """
    check_tools(tools)
    callable_tools = _callable(tools, tool_choice)
    must_call = tool_choice.mode == "required" or tool_choice.name is not None
    if answer_format.kind == "grammar":
        return _own(answer_format, bool(callable_tools))
    rules = Rules(strict=True)
    rules.define("root", "")
    options = []
    head = {"harmony": f"{literal(HARMONY_FINAL)} ", "cohere": f"{literal(COHERE_MARKS[0])}? "}.get(family, "")
    if not must_call and answer_format.kind == "json_object":
        options.append(head + rules.basic("object"))
    if not must_call and answer_format.kind == "json_schema":
        if answer_format.schema is None:
            raise MeshError(ErrorCode.BAD_REQUEST, "response_format json_schema comes without a schema.")
        options.append(f"{head}({rules.body(answer_format.schema)})" if head else rules.body(answer_format.schema))
    if callable_tools and (must_call or options):
        options.append(
            calls_rule(rules, family, callable_tools, parallel=tool_choice.parallel and not tool_choice.name)
        )
    if not options:
        return None
    body = " | ".join(options)
    thought = _thought(family, thinking=thinking)
    rules.replace("root", f"{thought} ({body})" if thought else body)
    return rules.text()


def _thought(family: Family, *, thinking: bool) -> str:
    """What may, or after a prompt that opened a thought must, come first; empty: nothing."""
    if family == "cohere":
        return _COHERE_THOUGHT if thinking else f"({literal(COHERE_THOUGHT_OPENS)} {_COHERE_THOUGHT})?"
    if thinking:
        return _THOUGHT
    return f"({_HARMONY_THOUGHT})?" if family == "harmony" else ""


def _callable(tools: Sequence[Tool], choice: ToolChoice) -> Sequence[Tool]:
    if choice.name is not None:
        named = [tool for tool in tools if tool.name == choice.name]
        if not named:
            there = ", ".join(tool.name for tool in tools) or "none"
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                f"tool_choice names {choice.name!r:.80}, which is not among the tools ({there:.400}).",
            )
        return named
    if choice.mode == "required" and not tools:
        raise MeshError(ErrorCode.BAD_REQUEST, "tool_choice is required, but there are no tools.")
    return () if choice.mode == "none" else tools


def _own(answer_format: AnswerFormat, with_tools: bool) -> str:
    if not answer_format.gbnf:
        raise MeshError(ErrorCode.BAD_REQUEST, "The answer format is a grammar, but the grammar is missing.")
    if len(answer_format.gbnf) > GRAMMAR_CHARS_MAX:
        raise MeshError(ErrorCode.BAD_REQUEST, f"The grammar is longer than {GRAMMAR_CHARS_MAX} characters.")
    if with_tools:
        raise MeshError(ErrorCode.BAD_REQUEST, "A grammar of one's own and tools exclude each other; send one of them.")
    return answer_format.gbnf
