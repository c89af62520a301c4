"""protocol/ stays pure, and the worlds do not look into each other."""

import pytest

from tests.house.purity import PROTOCOL_MAY_NOT_IMPORT, forbidden_neighbours, impure_calls, impure_imports
from tests.house.source import expect_none, sample, sources

_PROTOCOL = "protocol/membership/machine.py"


def test_protocol_imports_nothing_impure() -> None:
    expect_none(finding for source in sources("protocol") for finding in impure_imports(source))


def test_protocol_calls_nothing_impure() -> None:
    expect_none(finding for source in sources("protocol") for finding in impure_calls(source))


def test_worlds_do_not_know_each_other() -> None:
    expect_none(finding for source in sources("meshnode", "simulations") for finding in forbidden_neighbours(source))


_WAYS_TO_IMPORT = (
    "import {}\n",
    "import {}.inner as renamed\n",
    "from {} import thing\n",
    "from {}.inner import thing\n",
    "def f():\n    import {}\n",
    "class C:\n    def f(self):\n        from {} import thing\n",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {}\n",
    "try:\n    import {}\nexcept ImportError:\n    pass\n",
    "__import__('{}')\n",
)


@pytest.mark.parametrize("module", sorted(PROTOCOL_MAY_NOT_IMPORT))
def test_the_import_rule_objects(module: str) -> None:
    missed = [way for way in _WAYS_TO_IMPORT if not list(impure_imports(sample(_PROTOCOL, way.format(module))))]
    assert missed == []


@pytest.mark.parametrize("text", ["import numpy\n", "from nacl.utils import random\n", "import nacl.utils\n"])
def test_the_import_rule_objects_to_libraries(text: str) -> None:
    assert list(impure_imports(sample(_PROTOCOL, text)))


@pytest.mark.parametrize(
    "text",
    [
        "from collections.abc import Callable\nimport hashlib\nimport heapq\n",
        "import msgspec\nfrom nacl.signing import VerifyKey\n",
        "from protocol.wire import limits\nfrom . import machine\nfrom ..ids import NodeId\n",
    ],
)
def test_the_import_rule_lets_pure_code_pass(text: str) -> None:
    assert list(impure_imports(sample(_PROTOCOL, text))) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from . import limits\n", "protocol.wire.limits"),
        ("from .limits import FRAME_BYTES_MAX\n", "protocol.wire.limits.FRAME_BYTES_MAX"),
        ("from ..ids import NodeId\n", "protocol.ids.NodeId"),
        ("from ...meshnode import node\n", "meshnode.node"),
    ],
)
def test_relative_imports_are_resolved(text: str, name: str) -> None:
    assert [imported.name for imported in sample("protocol/wire/frame.py", text).imports] == [name]


@pytest.mark.parametrize(
    "text",
    [
        "def f(d):\n    return d.datetime.now()\n",
        "def f(d):\n    return d.utcnow()\n",
        "def f(clock):\n    return clock().now()\n",
        "def f():\n    return open('x')\n",
        "def f(x):\n    return hash(x) % 7\n",
        "def f(k):\n    return k.SigningKey.generate()\n",
        "print('loud')\n",
        "eval('1')\n",
    ],
)
def test_the_call_rule_objects(text: str) -> None:
    assert list(impure_calls(sample(_PROTOCOL, text)))


def test_the_call_rule_lets_pure_code_pass() -> None:
    text = "def f(now: float, rng, event):\n    rng.random()\n    event.known(now)\n    return sorted([now])\n"
    assert list(impure_calls(sample(_PROTOCOL, text))) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("meshnode/node.py", "from simulations.world import World\n"),
        ("meshnode/kernel/clock.py", "def f():\n    import tests.support\n"),
        ("simulations/world.py", "import meshnode.kernel.clock\n"),
        ("simulations/world.py", "from meshnode import node\n"),
        ("simulations/network.py", "import trio\n"),
    ],
)
def test_the_neighbour_rule_objects(path: str, text: str) -> None:
    assert list(forbidden_neighbours(sample(path, text)))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("meshnode/node.py", "import trio\nfrom protocol.node import Node\n"),
        ("simulations/world.py", "import heapq\nimport random\nfrom protocol.node import Node\n"),
    ],
)
def test_the_neighbour_rule_lets_the_right_things_pass(path: str, text: str) -> None:
    assert list(forbidden_neighbours(sample(path, text))) == []
