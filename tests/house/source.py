"""Python source as the wall tests see it: which files there are, how a file is parsed, and what it imports.

The rules themselves are in purity.py, shape.py and form.py. All of them take text and a path, so that a test can feed
them a bad source and see them object.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("meshnode", "protocol", "simulations")


@dataclass(frozen=True)
class Imported:
    """One imported name: `from a.b import c` is `a.b.c`, wherever in the file it stands."""

    name: str
    line: int

    @property
    def top(self) -> str:
        """The top-level package."""
        return self.name.partition(".")[0]

    @property
    def is_stdlib(self) -> bool:
        """Whether the standard library has it."""
        return self.top in sys.stdlib_module_names

    def within(self, package: str) -> bool:
        """Whether it is `package` itself or anything below it."""
        return self.name == package or self.name.startswith(package + ".")


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the project's root, and its text."""

    path: PurePosixPath
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text, filename=str(self.path))

    @cached_property
    def package(self) -> tuple[str, ...]:
        """The package that relative imports start from."""
        return self.path.parent.parts

    @cached_property
    def imports(self) -> tuple[Imported, ...]:
        """Every import of the file: inside functions, under TYPE_CHECKING, relative, by importlib with a literal."""
        return tuple(self._imports())

    def _imports(self) -> Iterator[Imported]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Imported(alias.name, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                start = self.package[: len(self.package) - node.level + 1] if node.level else ()
                module = ".".join([*start, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield Imported(f"{module}.{alias.name}", node.lineno)
            elif isinstance(node, ast.Call) and dotted(node.func) in ("__import__", "importlib.import_module"):
                for argument in node.args[:1]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield Imported(argument.value, node.lineno)

    def at(self, line: int, words: str) -> str:
        """A finding, in the form that editors can jump to."""
        return f"{self.path}:{line}: {words}"


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; the empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def sources(*folders: str) -> list[Source]:
    """Every Python file under the folders, in a stable order; a folder that is not there yet has none."""
    found = sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
    )
    return [
        Source(PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text(encoding="utf-8")) for path in found
    ]


def expect_none(findings: Iterable[str]) -> None:
    """Fails the test with one finding a line."""
    found = list(findings)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def sample(path: str, text: str) -> Source:
    """A source that is not on disk, for tests of the rules themselves."""
    return Source(PurePosixPath(path), text)
