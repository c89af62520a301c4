"""Nobody changes another object: what a part needs is given to its constructor or to its `run`.

docs/decisions/0009-no-setters.md says why, and what is done where parts need each other.
"""

import ast
from collections.abc import Iterator
from typing import Final

from tests.house.source import Source

# Path, and the assignments that stand there: to a library's object that offers no other way; and to the tables of
# machines of a simulated mesh too large to join, which no agent is ever given (a test compares them with a joined one).
PRIVATE_ALLOWED: Final = {
    "meshnode/api/connection.py": {"tasks._nursery"},
    "simulations/settled.py": {
        "view._up",
        "node.heartbeats._order",
        "node.keyring._up",
        "node.records._up",
        "node.datagrams._boots",
        "candidates._first",
        "contest._up",
        "contest.following._up",
    },
}

_MUTATORS: Final = frozenset({"add", "append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"})


def _assigned(node: ast.AST) -> Iterator[ast.Attribute]:
    """The attributes that a statement assigns."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield part


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def foreign_private(source: Source) -> Iterator[str]:
    """An assignment to a private attribute of another object."""
    allowed = PRIVATE_ALLOWED.get(str(source.path), set())
    for target in _assigned(source.tree):
        is_private = target.attr.startswith("_") and not target.attr.startswith("__")
        if is_private and not _is_own(target) and ast.unparse(target) not in allowed:
            yield source.at(target.lineno, f"{ast.unparse(target)} is another object's own; give it a method")


def constructor_reaches_out(source: Source) -> Iterator[str]:
    """A constructor that changes what it was given."""
    for function in ast.walk(source.tree):
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            given = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)} - {"self"}
            for target in _assigned(function):
                if isinstance(target.value, ast.Name) and target.value.id in given:
                    yield source.at(target.lineno, f"a constructor assigns {ast.unparse(target)}")


def root_sets(source: Source) -> Iterator[str]:
    """In a composition root: an attribute of a part assigned, or a part's collection filled, after construction."""
    path = str(source.path)
    if not path.startswith("meshnode/node/") and not path.endswith("/setup.py") and "/setup/" not in path:
        return
    for target in _assigned(source.tree):
        if not _is_own(target):
            yield source.at(target.lineno, f"{ast.unparse(target)} is set after construction")
    for call in ast.walk(source.tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _MUTATORS:
            filled = call.func.value
            if isinstance(filled, ast.Attribute) and not _is_own(filled):
                yield source.at(call.lineno, f"{ast.unparse(filled)} is filled after construction")
