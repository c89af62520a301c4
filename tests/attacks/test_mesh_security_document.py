"""docs/security.md against the tests: what it names exists, every case has a row, no test of an attack is left out."""

import ast
import re
from pathlib import Path

from tests.house.source import ROOT, expect_none

TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`((?:tests/[\w/]+/)?test_\w+\.py)(?:::(\w+))?`", TEXT)
HERE = ROOT / "tests" / "attacks"


def place(name: str) -> Path:
    """The file that the document means."""
    return ROOT / name if "/" in name else HERE / name


def functions_of(path: Path) -> set[str]:
    """The test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and node.name.startswith("test_")}


def test_every_test_named_exists() -> None:
    missing_files = [name for name, _ in NAMED if not place(name).is_file()]
    expect_none(missing_files)
    expect_none(f"{name}::{test}" for name, test in NAMED if test and test not in functions_of(place(name)))
    assert len(NAMED) > 100


def test_no_test_of_an_attack_is_left_out() -> None:
    named = {(name, test) for name, test in NAMED}
    expect_none(
        f"{path.name}::{test}"
        for path in sorted(HERE.glob("test_*.py"))
        if path.name != Path(__file__).name
        for test in sorted(functions_of(path))
        if (path.name, test) not in named
    )


def test_every_case_has_a_row() -> None:
    rows = [line.split("|")[1].strip() for line in TEXT.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row.isdigit()] == [str(case) for case in (*range(1, 36), *range(37, 42), 45)]
    assert {"hypercorn 1", "hypercorn 2", "36, model files", "36, chat templates", "36, other files"} <= set(rows)


def test_a_row_says_how_it_was_seen_to_fail() -> None:
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if cells[0].isdigit():
            assert len(cells) == 5, line
            assert all(cells), line
