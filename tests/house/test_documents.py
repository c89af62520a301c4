"""The link check of scripts/check, and the sum of scripts/test's passes."""

import re
from collections import Counter
from pathlib import Path

import pytest

from scripts.check_links import anchors_of, broken_links, documents
from scripts.sum_test_passes import closing_line, count
from tests.house.source import ROOT, expect_none


def test_links_lead_somewhere() -> None:
    expect_none(line for document in documents(ROOT) for line in broken_links(document, ROOT))


@pytest.mark.parametrize(
    "link",
    [
        "[gone](missing.md)",
        "[gone](other.md#no-such-heading)",
        "[gone](#nowhere)",
        "[out](../../../../etc/passwd)",
        "![picture](missing.png)",
        "[![badge](missing.svg)](other.md)",
        "[by name]: missing.md",
    ],
)
def test_a_broken_link_is_found(tmp_path: Path, link: str) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"# Top\n\n{link}\n")
    (tmp_path / "other.md").write_text("# Heading\n")
    assert len(list(broken_links(document, tmp_path))) == 1


@pytest.mark.parametrize(
    "link",
    [
        "[there](other.md)",
        "[there](other.md#a-heading-with-code)",
        "[there](other.md#twice-1)",
        "[here](#top)",
        "[folder](docs/)",
        "[site](https://example.org/missing.md)",
        "[mail](mailto:nobody@example.org)",
        "`[code](missing.md)`",
        "```\n[code](missing.md)\n```",
    ],
)
def test_a_good_link_passes(tmp_path: Path, link: str) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"# Top\n\n{link}\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "other.md").write_text("# A heading, with `code`\n\n## Twice\n\n## Twice\n")
    assert list(broken_links(document, tmp_path)) == []


def test_anchors_inside_code_blocks_are_none() -> None:
    assert anchors_of("# Real\n\n```sh\n# comment\n```\n") == {"real"}


@pytest.mark.parametrize(
    ("folder", "row"),
    [
        ("protocol/sharding", "sharding/"),
        ("protocol/trust", "trust/"),
        ("meshnode/node", "node/"),
        ("meshnode/llm/service", "service/"),
    ],
)
def test_the_map_of_the_code_names_every_module_where_it_lists_them(folder: str, row: str) -> None:
    """And none that is gone."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| `{row}` (.*)$", text, re.MULTILINE)
    named = set(re.findall(r"`([a-z_]+)`", line))
    assert named == {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


def test_the_closing_line_sums_both_passes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.xml", tmp_path / "b.xml"
    suite = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"/></testsuites>'
    first.write_text(suite.format(10, 1, 0, 2))
    second.write_text(suite.format(5, 0, 1, 0))
    line = closing_line(count(first) + count(second), 12.3)
    assert line.strip("= ") == "1 failed, 11 passed, 2 skipped, 1 error in 12.30s"


def test_a_pass_that_never_began_is_an_error(tmp_path: Path) -> None:
    assert closing_line(count(tmp_path / "absent.xml"), 1.0).strip("= ") == "1 error in 1.00s"


def test_no_tests_at_all_is_said() -> None:
    assert closing_line(Counter(), 1.0).strip("= ") == "no tests ran in 1.00s"
