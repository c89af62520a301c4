"""Declarations that contradict themselves, and the ready-made rules of who may write."""

from typing import Any

import pytest

from protocol.records.collection import Collection, anyone, only_admins, only_owner
from tests.protocol.records.world import Identity, World

NODE = Identity(1).node_id


@pytest.mark.parametrize(
    "rules",
    [
        {"name": ""},
        {"name": "Things"},
        {"name": "a" * 65},
        {"name": "a\0b"},
        {"name": "a", "value_bytes_max": 0},
        {"name": "a", "value_bytes_max": 65_537},
        {"name": "a", "records_max": 0},
        {"name": "a", "tombstone_life_s": 60.0},
        {"name": "a", "validate": lambda key, value: True},
        {"name": "a", "validate": lambda key, value: True, "order": lambda a, b: 0, "each_author": True},
        {"name": "a", "validate": lambda key, value: True, "order": lambda a, b: 0, "tombstone_life_s": 1e6},
    ],
)
def test_rules_that_cannot_be(rules: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".{20}"):
        Collection(**rules)


def test_two_collections_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="name of its own"):
        World([Collection("a"), Collection("a")], count=1)


@pytest.mark.parametrize(
    ("rule", "role", "key", "may"),
    [
        (anyone, "member", b"x", True),
        (only_admins, "member", b"x", False),
        (only_admins, "admin", b"x", True),
        (only_owner, "member", NODE.encode(), True),
        (only_owner, "member", NODE.encode() + b"/disk/1", True),
        (only_owner, "member", NODE.encode() + b"x", False),
        (only_owner, "admin", Identity(2).node_id.encode(), False),
        (only_owner, "member", b"", False),
    ],
)
def test_who_may_write(rule: Any, role: Any, key: bytes, may: bool) -> None:
    assert rule(NODE, role, key, b"") is may
