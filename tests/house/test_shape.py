"""The agent's layers, the tiers of its subsystems, and the one shape that every subsystem has."""

import itertools
import tomllib

import pytest

from tests.house.shape import LAYERS, TIERS, role_breaches, surface_breaches, upward_imports
from tests.house.source import ROOT, expect_none, sample, sources


def test_imports_go_down_only() -> None:
    expect_none(finding for source in sources("meshnode") for finding in upward_imports(source))


def test_every_subsystem_has_the_one_shape() -> None:
    expect_none(finding for source in sources("meshnode") for finding in role_breaches(source))


def test_every_surface_only_translates() -> None:
    expect_none(finding for source in sources("meshnode") for finding in surface_breaches(source))


def test_import_linter_knows_the_same_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    read = [frozenset(name.strip(" ()") for name in line.split("|")) for line in reversed(layers)]
    assert tuple(read) == LAYERS


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("meshnode/kernel/bus.py", "from meshnode.api.guard import Guard\n"),
        ("meshnode/kernel/bus.py", "from meshnode import settings\n"),
        ("meshnode/settings.py", "import meshnode.node\n"),
        ("meshnode/api/server.py", "from meshnode.cluster.model import Node\n"),
        ("meshnode/cluster/service.py", "from meshnode.storage.model import Chunk\n"),
        ("meshnode/cluster/service.py", "from meshnode.health.model import Report\n"),
        ("meshnode/storage/service.py", "def f():\n    from meshnode.tasks.model import Task\n"),
        ("meshnode/node.py", "from meshnode.cli.main import main\n"),
        ("meshnode/unheard_of/service.py", "import trio\n"),
        ("meshnode/node.py", "import meshnode.unheard_of.setup\n"),
        ("meshnode/__init__.py", "from meshnode.kernel import bus\n"),
    ],
)
def test_the_layer_rule_objects(path: str, text: str) -> None:
    assert list(upward_imports(sample(path, text)))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("meshnode/node.py", "from meshnode.cluster.setup import build\nfrom meshnode.api.server import Server\n"),
        (
            "meshnode/tasks/service.py",
            "from meshnode.storage.model import Chunk\nfrom meshnode.kernel.bus import Bus\n",
        ),
        ("meshnode/cli/main.py", "from meshnode import __version__, node\n"),
        ("meshnode/api/server.py", "from meshnode.api.guard import Guard\n"),
    ],
)
def test_the_layer_rule_lets_downward_imports_pass(path: str, text: str) -> None:
    assert list(upward_imports(sample(path, text))) == []


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        (lower, higher)
        for below, above in itertools.pairwise(TIERS)
        for lower in sorted(below)
        for higher in sorted(above)
    ],
)
def test_every_tier_is_held(lower: str, higher: str) -> None:
    up = sample(f"meshnode/{lower}/service.py", f"from meshnode.{higher}.model import Thing\n")
    down = sample(f"meshnode/{higher}/service.py", f"from meshnode.{lower}.model import Thing\n")
    assert list(upward_imports(up))
    assert list(upward_imports(down)) == []


@pytest.mark.parametrize(
    ("role", "text"),
    [
        ("model", "import trio\n"),
        ("model", "from meshnode.cluster.service import Service\n"),
        ("model", "from meshnode.cluster import core\n"),
        ("model", "from protocol.membership import machine\n"),
        ("core", "import time\n"),
        ("core", "def f():\n    from random import choice\n"),
        ("core", "import numpy\n"),
        ("core", "from meshnode.cluster import store\n"),
        ("core", "from meshnode.kernel.clock import Clock\n"),
        ("store", "from meshnode.cluster.service import Service\n"),
        ("store", "import trio\n"),
        ("store", "from meshnode.kernel.links import Links\n"),
        ("service", "from meshnode.cluster import routes\n"),
        ("service", "from meshnode.cluster.peers import Peers\n"),
        ("service", "from meshnode.api.server import Server\n"),
        ("service", "import apsw\n"),
        ("service", "from meshnode.storage.service import StorageService\n"),
        ("service", "from meshnode import cluster\n"),
        ("peers", "from meshnode.cluster.store import Store\n"),
        ("peers", "from meshnode.api import routing\n"),
        ("routes", "from meshnode.cluster.store import Store\n"),
        ("routes", "from meshnode.cluster import core\n"),
        ("routes", "import apsw\n"),
        ("routes", "from protocol.wire import codec\n"),
        ("setup", "from meshnode.node import Node\n"),
        ("setup", "from meshnode.storage.service import StorageService\n"),
        ("__init__", "from meshnode.cluster.service import Service\n"),
        ("helpers", "import json\n"),
        ("discovery", "import json\n"),
        ("service/members", "from meshnode.cluster.routes import routes\n"),
    ],
)
def test_the_role_rule_objects(role: str, text: str) -> None:
    assert list(role_breaches(sample(f"meshnode/cluster/{role}.py", text)))


@pytest.mark.parametrize(
    ("role", "text"),
    [
        ("model", "import msgspec\nfrom protocol.ids import NodeId\nfrom meshnode.kernel.errors import MeshError\n"),
        ("core", "from protocol.placement import choose\nfrom meshnode.cluster.model import Node\n"),
        ("store", "import apsw\nfrom meshnode.kernel.database import Database\nfrom meshnode.cluster import model\n"),
        ("service", "import trio\nfrom meshnode.cluster.store import Store\nfrom meshnode.kernel.bus import Bus\n"),
        (
            "service/members",
            "from meshnode.cluster.service import invitations\nfrom meshnode.health.model import Report\n",
        ),
        ("peers", "from meshnode.cluster.service import Service\nfrom protocol.rpc import deadlines\n"),
        ("routes", "from meshnode.api.routing import get\nfrom meshnode.cluster.model import Node\n"),
        (
            "setup",
            "from meshnode.cluster import peers, routes, service, store\nfrom meshnode.settings import Settings\n",
        ),
        ("__init__", '"""Who is there."""\n'),
    ],
)
def test_the_role_rule_lets_the_table_pass(role: str, text: str) -> None:
    assert list(role_breaches(sample(f"meshnode/cluster/{role}.py", text))) == []


@pytest.mark.parametrize(
    ("role", "text"),
    [
        ("routes", "from meshnode.cluster.store import Store\n"),
        ("routes", "from meshnode.kernel.database import Database\n"),
        ("routes", "from meshnode.surfaces.other import routes\n"),
        ("translate", "from meshnode.api.routing import get\n"),
        ("database", "import json\n"),
    ],
)
def test_the_surface_rule_objects(role: str, text: str) -> None:
    assert list(surface_breaches(sample(f"meshnode/surfaces/openai/{role}.py", text)))


@pytest.mark.parametrize(
    ("role", "text"),
    [
        ("routes", "from meshnode.llm.service import LlmService\nfrom meshnode.api.routing import post\n"),
        ("translate", "from meshnode.llm.model import Token\nfrom meshnode.surfaces.openai.schema import Chunk\n"),
        ("errors", "from meshnode.kernel.errors import ErrorCode\n"),
    ],
)
def test_the_surface_rule_lets_translation_pass(role: str, text: str) -> None:
    assert list(surface_breaches(sample(f"meshnode/surfaces/openai/{role}.py", text))) == []
