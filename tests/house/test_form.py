"""Docstrings, sizes, names, broad handlers, reasons beside exceptions, and modules that do nothing when imported."""

from collections.abc import Callable, Iterator

import pytest

from tests.house.form import (
    BROAD_EXCEPT_ALLOWED,
    FILE_LINES_MAX,
    FUNCTION_LINES_MAX,
    broad_except,
    broad_handlers,
    empty_names,
    hidden_state,
    missing_docstring,
    silent_directives,
    too_long,
)
from tests.house.source import PACKAGES, Source, expect_none, sample, sources

Rule = Callable[[Source], Iterator[str]]

_EVERYWHERE = (*PACKAGES, "tests", "scripts")
_LONG_FUNCTION = "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX


@pytest.mark.parametrize(
    "rule", [missing_docstring, too_long, empty_names, silent_directives], ids=lambda rule: rule.__name__
)
def test_every_file_has_the_form(rule: Rule) -> None:
    expect_none(finding for source in sources(*_EVERYWHERE) for finding in rule(source))


@pytest.mark.parametrize("rule", [broad_except, hidden_state], ids=lambda rule: rule.__name__)
def test_the_packages_hide_nothing(rule: Rule) -> None:
    expect_none(finding for source in sources(*PACKAGES) for finding in rule(source))


def test_the_allow_list_of_broad_handlers_is_not_stale() -> None:
    found = {str(source.path): len(broad_handlers(source)) for source in sources(*PACKAGES)}
    assert {path: found.get(path, 0) for path in BROAD_EXCEPT_ALLOWED} == BROAD_EXCEPT_ALLOWED


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (missing_docstring, "meshnode/node.py", "x = 1\n"),
        (missing_docstring, "protocol/__init__.py", "# only a comment\n"),
        (too_long, "meshnode/node.py", "x = 1\n" * (FILE_LINES_MAX + 1)),
        (too_long, "meshnode/node.py", _LONG_FUNCTION),
        (too_long, "meshnode/node.py", f"class C:\n    async {_LONG_FUNCTION.replace('    x', '        x')}"),
        (empty_names, "meshnode/kernel/utils.py", ""),
        (empty_names, "meshnode/cluster/peer_manager.py", ""),
        (empty_names, "protocol/common/x.py", ""),
        (empty_names, "tests/helpers.py", ""),
        (broad_except, "meshnode/node.py", "try:\n    x = 1\nexcept:\n    pass\n"),
        (broad_except, "meshnode/node.py", "try:\n    x = 1\nexcept Exception:\n    pass\n"),
        (broad_except, "meshnode/node.py", "try:\n    x = 1\nexcept (OSError, BaseException) as error:\n    pass\n"),
        (broad_except, "meshnode/node.py", "try:\n    x = 1\nexcept* Exception:\n    pass\n"),
        (broad_except, "meshnode/node.py", "import builtins\ntry:\n    x = 1\nexcept builtins.Exception:\n    pass\n"),
        (broad_except, "meshnode/node.py", "import contextlib\nwith contextlib.suppress(Exception):\n    pass\n"),
        (silent_directives, "meshnode/node.py", "x = 1  # noqa\n"),
        (silent_directives, "meshnode/node.py", "x = 1  # noqa: E501\n"),
        (silent_directives, "meshnode/node.py", "x = 1  # type: ignore\n"),
        (silent_directives, "meshnode/node.py", "x = 1  # type: ignore # because it is so\n"),
        (silent_directives, "meshnode/node.py", "x = 1  # type: ignore[assignment]\n"),
        (hidden_state, "meshnode/node.py", "x = 1\ndef f():\n    global x\n    x = 2\n"),
        (hidden_state, "meshnode/node.py", "import logging\nlogging.basicConfig()\n"),
    ],
)
def test_each_rule_objects(rule: Rule, path: str, text: str) -> None:
    assert list(rule(sample(path, text)))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (missing_docstring, "meshnode/cluster/__init__.py", ""),
        (missing_docstring, "meshnode/node.py", '"""Builds everything."""\n'),
        (too_long, "meshnode/node.py", "x = 1\n" * FILE_LINES_MAX),
        (empty_names, "meshnode/cluster/invitation_bases.py", ""),
        (empty_names, "meshnode/kernel/database.py", ""),
        (broad_except, "meshnode/node.py", "try:\n    x = 1\nexcept (OSError, ValueError):\n    pass\n"),
        (silent_directives, "meshnode/node.py", "x = 1  # noqa: E501 - a URL that must stay whole\n"),
        (
            silent_directives,
            "meshnode/node.py",
            "# The stub of this library is wrong.\nx = 1  # type: ignore[arg-type]\n",
        ),
        (silent_directives, "meshnode/node.py", 'x = "# noqa"\n'),
        (hidden_state, "meshnode/node.py", "if __name__ == '__main__':\n    print(1)\n"),
    ],
)
def test_each_rule_lets_good_form_pass(rule: Rule, path: str, text: str) -> None:
    assert list(rule(sample(path, text))) == []


def test_the_allow_list_grants_no_more_than_it_says() -> None:
    handler = "try:\n    x = 1\nexcept Exception:\n    pass\n"
    boundary = sample("meshnode/api/server.py", handler * 2)
    assert list(broad_except(boundary, {"meshnode/api/server.py": 2})) == []
    assert len(list(broad_except(boundary, {"meshnode/api/server.py": 1}))) == 1
    assert len(list(broad_except(boundary, {"meshnode/api/other.py": 2}))) == 2
