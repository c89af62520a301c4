"""The form of every file: docstrings, size, names, reasons beside exceptions to the rules, nothing hidden in imports.

What ruff and mypy already hold is not repeated here.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from typing import Final

from tests.house.source import Source, dotted

FILE_LINES_MAX: Final = 450
FUNCTION_LINES_MAX: Final = 90
REASON_CHARS_MIN: Final = 8

EMPTY_WORDS: Final = frozenset({"base", "common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"})

# The three boundaries where whatever happens must be turned into an answer, a count or a restart: HTTP, the handler of
# a peer's requests, the supervisor. Path, and how many broad handlers stand there.
BROAD_EXCEPT_ALLOWED: Final[dict[str, int]] = {
    # HTTP: one request, one connection, one stream.
    "meshnode/api/application.py": 1,
    "meshnode/api/connection.py": 1,
    "meshnode/api/sse.py": 1,
    "meshnode/cluster/service/onboarding/listener.py": 1,
    # Peer handler: a call, a stream.
    "meshnode/kernel/links/calls.py": 1,
    "meshnode/kernel/calls.py": 1,
    # Supervisor: a service's run, and its drain.
    "meshnode/kernel/supervisor.py": 2,
    # Supervisor of a task: nobody is above it, nor above its child before that is the command.
    "meshnode/tasks/execution/keeper.py": 1,
    "meshnode/tasks/execution/becoming.py": 1,
}

_DIRECTIVE = re.compile(
    r"#\s*(?P<kind>noqa|type:\s*ignore)(?P<codes>:\s*[A-Z]+[0-9]+(?:,\s*[A-Z]+[0-9]+)*|\[[^\]]*\])?"
)


def missing_docstring(source: Source) -> Iterator[str]:
    """A module that says nothing about its job. An empty `__init__.py` has none to speak of."""
    if source.text.strip() and ast.get_docstring(source.tree) is None:
        yield source.at(1, "no module docstring: say its job, and what it leaves to others")


def too_long(source: Source) -> Iterator[str]:
    """Files longer than a walk, functions longer than a screen."""
    lines = source.text.count("\n")
    if lines > FILE_LINES_MAX:
        yield source.at(lines, f"{lines} lines; at most {FILE_LINES_MAX}. Split it by verb")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                yield source.at(node.lineno, f"{node.name} has {length} lines; at most {FUNCTION_LINES_MAX}")


def empty_names(source: Source) -> Iterator[str]:
    """Module and folder names that say nothing about what is inside."""
    for part in source.path.parts:
        words = part.removesuffix(".py").split("_")
        if EMPTY_WORDS.intersection(words[-1:]):
            yield source.at(1, f"the name {part} says nothing; name it after what it does")


def _is_broad(node: ast.expr | None) -> bool:
    if node is None:
        return True
    if isinstance(node, ast.Tuple):
        return any(_is_broad(element) for element in node.elts)
    return dotted(node).rpartition(".")[2] in ("Exception", "BaseException")


def broad_handlers(source: Source) -> list[int]:
    """Lines of `except:`, `except Exception`, `except* Exception` and `suppress(Exception)`."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            if _is_broad(node.type):
                found.append(node.lineno)
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] == "suppress":
            found.extend(node.lineno for argument in node.args if _is_broad(argument))
    return sorted(found)


def broad_except(source: Source, allowed: dict[str, int] | None = None) -> Iterator[str]:
    """Broad handlers beyond those that the allow list grants to this file."""
    grant = (BROAD_EXCEPT_ALLOWED if allowed is None else allowed).get(str(source.path), 0)
    for line in broad_handlers(source)[grant:]:
        yield source.at(line, "broad except outside the three boundaries (HTTP, peer handler, supervisor)")


def silent_directives(source: Source) -> Iterator[str]:
    """`noqa` and `type: ignore` without a code, or without a reason on the line or right above it."""
    lines = source.text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type != tokenize.COMMENT:
            continue
        directives = list(_DIRECTIVE.finditer(token.string))
        if not directives:
            continue
        number = token.start[0]
        if not all(directive["codes"] for directive in directives):
            yield source.at(number, "name the rule that is set aside: `noqa: X123` or `type: ignore[name]`")
        reason = _DIRECTIVE.sub("", token.string).strip(" #:-")
        above = lines[number - 2].strip() if number > 1 else ""
        if len(reason) < REASON_CHARS_MIN and not above.startswith("#"):
            yield source.at(number, "a rule is set aside without a reason beside it")


def hidden_state(source: Source) -> Iterator[str]:
    """`global` statements, and calls made for their effect while a module is imported."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield source.at(node.lineno, f"global {', '.join(node.names)}: pass it as a constructor argument")
    for statement in source.tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            yield source.at(statement.lineno, "a call at import time; importing a module must do nothing")
