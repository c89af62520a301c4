"""How models write tool calls: told by the template's text, shown to those never taught, forced by grammar."""

import json
from collections.abc import Sequence
from typing import Any, Final

from meshnode.llm.model import Tool, ToolCall
from meshnode.llm.templates.model import Family
from meshnode.llm.templates.schema import Rules, literal

FAMILY_DEFAULT: Final[Family] = "hermes"

CALL_OPENS: Final = "<tool_call>"
CALL_CLOSES: Final = "</tool_call>"
MISTRAL_OPENS: Final = "[TOOL_CALLS]"
MISTRAL_ARGUMENTS: Final = "[ARGS]"
PYTHON_TAG: Final = "<|python_tag|>"
DEEPSEEK_OPENS: Final = "<｜tool▁calls▁begin｜>"
DEEPSEEK_CLOSES: Final = "<｜tool▁calls▁end｜>"
DEEPSEEK_CALL_OPENS: Final = "<｜tool▁call▁begin｜>"
DEEPSEEK_CALL_CLOSES: Final = "<｜tool▁call▁end｜>"
DEEPSEEK_SEPARATES: Final = "<｜tool▁sep｜>"
COHERE_OPENS: Final = "<|START_ACTION|>"
COHERE_CLOSES: Final = "<|END_ACTION|>"
COHERE_THOUGHT_OPENS: Final = "<|START_THINKING|>"
COHERE_THOUGHT_CLOSES: Final = "<|END_THINKING|>"
COHERE_MARKS: Final = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")  # around an answer
HARMONY_CHANNEL: Final = "<|channel|>"
HARMONY_START: Final = "<|start|>"
HARMONY_MESSAGE: Final = "<|message|>"
HARMONY_END: Final = "<|end|>"
HARMONY_FINAL: Final = f"{HARMONY_CHANNEL}final{HARMONY_MESSAGE}"
HARMONY_FUNCTIONS: Final = "functions."
ARGUMENT_KEYS: Final = ("arguments", "parameters")


def family_of(template: str) -> Family:
    """The family that a template belongs to, by the marks in its text. Without any: Hermes, which we then explain."""
    if HARMONY_CHANNEL in template:
        return "harmony"
    if COHERE_OPENS in template:
        return "cohere"
    if DEEPSEEK_CALL_OPENS in template:
        return "deepseek" if "```json" in template else "deepseek_args"
    if MISTRAL_OPENS in template:
        return "mistral_args" if MISTRAL_ARGUMENTS in template else "mistral"
    if CALL_OPENS in template:
        return "hermes"
    if PYTHON_TAG in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return "llama3"
    return FAMILY_DEFAULT


def described(tool: Tool) -> dict[str, Any]:
    """The tool as OpenAI's API and the templates name it."""
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def explained_family(family: Family) -> Family:
    """The way in which a template's model is told to write calls when the template tells nothing of tools: DeepSeek's
    templates do not, though they write calls."""
    return family if family in ("deepseek", "deepseek_args") else FAMILY_DEFAULT


def tool_section(tools: Sequence[Tool], family: Family) -> str:
    """What a model is told about tools when its template cannot. `family`: see explained_family."""
    lines = "\n".join(json.dumps(described(tool), ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to help with the user's request. "
        f"Their signatures are within <tools></tools>:\n<tools>\n{lines}\n</tools>\n\n"
        f"{_how(family)}"
    )


def _how(family: Family) -> str:
    if family in ("deepseek", "deepseek_args"):
        return f"To call functions, write:\n{_deepseek(family, [('<function name>', '<arguments as a JSON object>')])}"
    return (
        f"For each function call, return a JSON object with its name and arguments within {CALL_OPENS}{CALL_CLOSES}:\n"
        f'{CALL_OPENS}\n{{"name": <function name>, "arguments": <arguments as a JSON object>}}\n{CALL_CLOSES}'
    )


def written(calls: Sequence[ToolCall], family: Family) -> str:
    """Calls of an earlier turn as the model would have written them, for templates that know none."""
    if family in ("deepseek", "deepseek_args"):
        return _deepseek(family, [(call.name, call.arguments or "{}") for call in calls])
    made = []
    for call in calls:
        name, arguments = json.dumps(call.name, ensure_ascii=False), call.arguments or "{}"
        made.append(f'{CALL_OPENS}\n{{"name": {name}, "arguments": {arguments}}}\n{CALL_CLOSES}')
    return "\n".join(made)


def _deepseek(family: Family, calls: Sequence[tuple[str, str]]) -> str:
    made = (_deepseek_head(family, name) + arguments + _deepseek_end(family) for name, arguments in calls)
    return DEEPSEEK_OPENS + "\n".join(made) + DEEPSEEK_CLOSES


def _deepseek_head(family: Family, name: str) -> str:
    if family == "deepseek_args":
        return f"{DEEPSEEK_CALL_OPENS}{name}{DEEPSEEK_SEPARATES}"
    return f"{DEEPSEEK_CALL_OPENS}function{DEEPSEEK_SEPARATES}{name}\n```json\n"


def _deepseek_end(family: Family) -> str:
    return DEEPSEEK_CALL_CLOSES if family == "deepseek_args" else f"\n```{DEEPSEEK_CALL_CLOSES}"


def calls_rule(rules: Rules, family: Family, tools: Sequence[Tool], *, parallel: bool) -> str:
    """Adds the rules for one call (several when `parallel`) of these tools, and returns a body for them."""
    one = rules.fresh("call", " | ".join(_call(rules, family, tool) for tool in tools))
    match family:
        case "hermes":
            call = rules.fresh("call", f'"{CALL_OPENS}\\n" {one} "\\n{CALL_CLOSES}"')
            return f'{call} ("\\n" {call})*' if parallel else call
        case "llama3":
            return f'{one} ("; " {one})*' if parallel else one
        case "mistral":
            return (
                f'"{MISTRAL_OPENS}" " "? "[" {one} (", " {one})* "]"'
                if parallel
                else f'"{MISTRAL_OPENS}" " "? "[" {one} "]"'
            )
        case "mistral_args":
            return f'("{MISTRAL_OPENS}" {one})+' if parallel else f'"{MISTRAL_OPENS}" {one}'
        case "deepseek" | "deepseek_args":
            more = f' ("\\n"? {one})*' if parallel else ""
            return f"{literal(DEEPSEEK_OPENS)} {one}{more} {literal(DEEPSEEK_CLOSES)}"
        case "cohere":
            more = f' (",\\n    " {one})*' if parallel else ""
            return f'{literal(COHERE_OPENS)} "[\\n    " {one}{more} "\\n]" {literal(COHERE_CLOSES)}'
        case "harmony":
            return one  # the call ends the turn: several come one after the other, with their results between


def _call(rules: Rules, family: Family, tool: Tool) -> str:
    schema = tool.parameters or {"type": "object", "properties": {}}
    arguments = rules.fresh("arguments", rules.body(schema, strict=tool.strict))
    if family == "mistral_args":
        return f"{literal(tool.name + MISTRAL_ARGUMENTS)} {arguments}"
    if family in ("deepseek", "deepseek_args"):
        return f"{literal(_deepseek_head(family, tool.name))} {arguments} {literal(_deepseek_end(family))}"
    if family == "harmony":
        header = f"{HARMONY_CHANNEL}commentary to={HARMONY_FUNCTIONS}{tool.name} <|constrain|>json{HARMONY_MESSAGE}"
        return f"{literal(header)} {arguments}"
    if family == "cohere":
        name = json.dumps(tool.name, ensure_ascii=False)
        head, named = literal('{"tool_call_id": "'), literal(f'", "tool_name": {name}, "parameters": ')
        return f'{head} [0-9]{{1,3}} {named} {arguments} "}}"'
    key = "parameters" if family == "llama3" else "arguments"
    head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
    return f'{literal(head)} {arguments} "}}"'
