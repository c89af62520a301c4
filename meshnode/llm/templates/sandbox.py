"""Where a stranger's chat template runs: Jinja2's immutable sandbox, with what Hugging Face's templates expect.

The sandbox holds off the language's ways out (attributes, calls, mutation). Time and memory it cannot hold: that is the
worker process's matter. Source of the functions: transformers' `apply_chat_template`.
"""

import datetime
import json
from collections.abc import Callable
from typing import Any, Final, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from meshnode.llm.templates.model import PROMPT_CHARS_MAX, TEMPLATE_CHARS_MAX

# What a template may raise by its own fault. Any other exception ends the worker, which comes to the same refusal.
TEMPLATE_ERRORS: Final = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
)


class TemplateRefusedError(jinja2.TemplateError):
    """The template refused the conversation by `raise_exception`, in its own words."""


class PromptTooLongError(Exception):
    """The template wrote more than any prompt may have."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    # `**` makes numbers of any size from a few characters.
    intercepted_binops = frozenset({"**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Powers of small numbers only."""
        if (
            not (isinstance(left, int | float) and isinstance(right, int | float))
            or abs(left) > 1000
            or abs(right) > 64
        ):
            raise jinja2.exceptions.SecurityError("powers of large numbers are not allowed")
        return left**right


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant said, for training. Here it is only text."""

    tags = {"generation"}  # noqa: RUF012 - the name and the form are Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Its inside stands for itself."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateRefusedError(str(message)[:500])


def compiled(text: str) -> jinja2.Template:
    """The template, ready to be filled in. Raises one of TEMPLATE_ERRORS."""
    if len(text) > TEMPLATE_CHARS_MAX:
        raise ValueError(f"it has {len(text)} characters; at most {TEMPLATE_CHARS_MAX} are taken")
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    return made.from_string(text)


def clock_function(now: float) -> Callable[[str], str]:
    """`strftime_now` of the templates, at a moment given in unix seconds; the machine's own time zone."""
    moment = datetime.datetime.fromtimestamp(now)

    def strftime_now(form: str) -> str:
        return moment.strftime(form)

    return strftime_now


def filled(template: jinja2.Template, values: dict[str, Any]) -> str:
    """The text that the template makes of the values, within PROMPT_CHARS_MAX.

    Raises:
        PromptTooLongError: it writes more than that; or one of TEMPLATE_ERRORS.
    """
    parts, size = [], 0
    for part in template.generate(values):
        size += len(part)
        if size > PROMPT_CHARS_MAX:
            raise PromptTooLongError
        parts.append(part)
    return "".join(parts)
