"""No setters after construction, as far as the text shows them."""

from collections.abc import Callable, Iterator

import pytest

from tests.house.reach import PRIVATE_ALLOWED, constructor_reaches_out, foreign_private, root_sets
from tests.house.source import PACKAGES, Source, expect_none, sample, sources

Rule = Callable[[Source], Iterator[str]]


@pytest.mark.parametrize("rule", [foreign_private, constructor_reaches_out, root_sets], ids=lambda rule: rule.__name__)
def test_nobody_changes_another_object(rule: Rule) -> None:
    expect_none(finding for source in sources(*PACKAGES) for finding in rule(source))


def test_the_allow_list_is_not_stale() -> None:
    texts = {str(source.path): source.text for source in sources(*PACKAGES)}
    assert all(f"{target} = " in texts[path] for path, targets in PRIVATE_ALLOWED.items() for target in targets)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (foreign_private, "meshnode/kernel/x.py", "def f(part):\n    part._root = 1\n"),
        (foreign_private, "protocol/x.py", "class A:\n    def f(self):\n        self.part._x += 1\n"),
        (foreign_private, "meshnode/api/connection.py", "def f(other):\n    other._nursery = 1\n"),
        (
            constructor_reaches_out,
            "meshnode/kernel/x.py",
            "class A:\n    def __init__(self, s):\n        s.x = 1\n",
        ),
        (root_sets, "meshnode/node/runtime.py", "def f(moved, driver):\n    moved.driver = driver\n"),
        (root_sets, "meshnode/cluster/setup.py", "def f(network, found):\n    network.methods.update(found)\n"),
        (root_sets, "meshnode/node/runtime.py", "class A:\n    def f(self, s):\n        self._made.supervisor = s\n"),
    ],
)
def test_each_rule_objects(rule: Rule, path: str, text: str) -> None:
    assert list(rule(sample(path, text)))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (foreign_private, "meshnode/kernel/x.py", "class A:\n    def f(self):\n        self._x = 1\n"),
        (foreign_private, "meshnode/api/connection.py", "def f(tasks):\n    tasks._nursery = 1\n"),
        (constructor_reaches_out, "meshnode/kernel/x.py", "class A:\n    def __init__(self):\n        self.x = 1\n"),
        (root_sets, "meshnode/node/runtime.py", "def f(middle):\n    middle.append(1)\n"),
        (root_sets, "meshnode/kernel/x.py", "def f(peer):\n    peer.failures = 1\n"),
    ],
)
def test_each_rule_lets_good_code_pass(rule: Rule, path: str, text: str) -> None:
    assert list(rule(sample(path, text))) == []
