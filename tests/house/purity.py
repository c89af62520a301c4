"""The walls between the three worlds: what protocol/, meshnode/ and simulations/ may not know.

protocol/ is the strict one: everything that comes from outside (time, chance, bytes) reaches it as an argument, which
is what lets the simulator replay a failure from its seed.
"""

import ast
from collections.abc import Iterator
from typing import Final

from tests.house.source import Source, dotted

# fmt: off: one name a line would be a page of names.
PROTOCOL_MAY_NOT_IMPORT: Final = frozenset(
    {
        "asyncio",
        "builtins",
        "concurrent",
        "contextvars",
        "ctypes",
        "datetime",
        "fcntl",
        "getpass",
        "glob",
        "http",
        "importlib",
        "io",
        "locale",
        "logging",
        "mmap",
        "multiprocessing",
        "os",
        "pathlib",
        "platform",
        "queue",
        "random",
        "sched",
        "secrets",
        "select",
        "selectors",
        "shutil",
        "signal",
        "socket",
        "socketserver",
        "sqlite3",
        "ssl",
        "subprocess",
        "sys",
        "tempfile",
        "threading",
        "time",
        "urllib",
        "uuid",
        "zoneinfo",
        "apsw",
        "trio",
        "meshnode",
        "simulations",
        "tests",
        "scripts",
    }
)
# fmt: on

# Libraries that compute and do nothing else. A new one is added here only when the same holds for it.
PROTOCOL_THIRD_PARTY: Final = frozenset({"msgpack", "msgspec", "nacl"})

# These read a clock, draw chance or touch the world although no forbidden import need be in sight.
# hash() of text differs from process to process, and id() from run to run, so that neither may steer a decision.
PROTOCOL_MAY_NOT_CALL: Final = frozenset(
    {"__import__", "breakpoint", "eval", "exec", "hash", "id", "input", "open", "print", "nacl.utils.random"}
)
CLOCK_METHODS: Final = frozenset({"now", "today", "utcnow"})
CHANCE_METHODS: Final = frozenset({"generate", "urandom", "token_bytes", "random_bytes"})

MAY_NOT_KNOW: Final = {
    "meshnode": frozenset({"simulations", "tests", "scripts"}),
    "simulations": frozenset({"meshnode", "tests", "scripts", "trio", "socket", "asyncio", "threading"}),
}


def impure_imports(source: Source) -> Iterator[str]:
    """Imports in protocol/ of anything that is not pure computation."""
    for imported in source.imports:
        if imported.top in PROTOCOL_MAY_NOT_IMPORT:
            yield source.at(imported.line, f"protocol/ may not import {imported.name}; take it as an argument")
        elif imported.within("nacl.utils") or imported.within("nacl.public.PrivateKey.generate"):
            yield source.at(imported.line, f"{imported.name} draws chance of its own; take the bytes as an argument")
        elif imported.top != "protocol" and not imported.is_stdlib and imported.top not in PROTOCOL_THIRD_PARTY:
            yield source.at(imported.line, f"protocol/ may not use the library {imported.top}")


def impure_calls(source: Source) -> Iterator[str]:
    """Calls in protocol/ that read a clock, draw chance or reach out."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in PROTOCOL_MAY_NOT_CALL or method in CHANCE_METHODS:
            yield source.at(node.lineno, f"protocol/ may not call {name or method}()")
        elif method in CLOCK_METHODS and not node.args and not node.keywords:
            yield source.at(node.lineno, f"{name or method}() reads a clock; take `now` as an argument")


def forbidden_neighbours(source: Source) -> Iterator[str]:
    """Imports across the walls between meshnode/ and simulations/."""
    world = source.path.parts[0]
    for imported in source.imports:
        if imported.top in MAY_NOT_KNOW.get(world, ()):
            yield source.at(imported.line, f"{world}/ may not import {imported.name}")
