"""What a chat template can say, found out by trying: its text alone does not tell (the way of llama.cpp's minja)."""

from typing import Any, Final, NamedTuple

import jinja2

from meshnode.llm.templates.sandbox import TEMPLATE_ERRORS, PromptTooLongError, filled

_SYSTEM, _TOOL, _RESULT, _KEY = "probe-system", "probe_tool", "probe-result", "probe_key"
_USER: Final = {"role": "user", "content": "probe-user"}
_PROBE: Final = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "probe",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}


class Capabilities(NamedTuple):
    """Whether system messages, offered tools, made calls and tools' results appear in what the template writes.
    `arguments_as_text`: it wants the arguments of a call as JSON text and not as an object."""

    system: bool
    tools: bool
    calls: bool
    results: bool
    arguments_as_text: bool


def probed(template: jinja2.Template, values: dict[str, Any]) -> Capabilities:
    """Fills the template in six times at most; `values` are the tokens and functions that all templates get."""

    def said(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        try:
            return filled(template, {**values, "messages": messages, "tools": tools, "add_generation_prompt": True})
        except (*TEMPLATE_ERRORS, PromptTooLongError):
            return ""

    def called(arguments: Any) -> list[dict[str, Any]]:
        function = {"name": _TOOL, "arguments": arguments}
        call = {"id": "probe1234", "type": "function", "function": function}
        return [
            _USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": _RESULT, "tool_call_id": "probe1234", "name": _TOOL},
        ]

    system = _SYSTEM in said([{"role": "system", "content": _SYSTEM}, _USER])
    tools = _TOOL in said([_USER], [_PROBE])
    as_object, as_text = said(called({_KEY: "v"}), [_PROBE] if tools else None), ""
    arguments_as_text = f'{{"{_KEY}": "v"}}' not in as_object
    if arguments_as_text:
        as_text = said(called(f'{{"{_KEY}": "v"}}'), [_PROBE] if tools else None)
        arguments_as_text = f'{{"{_KEY}": "v"}}' in as_text
    made = as_text if arguments_as_text else as_object
    # The tool's name may come from the offer; the arguments' value cannot.
    calls = _TOOL in made and (f'"{_KEY}"' in made.rpartition(_RESULT)[0] if not tools else _calls_appear(made))
    return Capabilities(system, tools, calls, _RESULT in made, arguments_as_text)


def _calls_appear(made: str) -> bool:
    after = made.rpartition("probe-user")[2]
    return _KEY in after and _TOOL in after
