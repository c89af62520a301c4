"""The settings of the mesh: what can be written, what is read of it, who may write."""

import math

import msgspec
import pytest

from protocol.trust.policy import (
    MEANINGS,
    POLICY_VALUE_BYTES_MAX,
    Policy,
    policy_collection,
    policy_record,
    read_policy,
)
from tests.protocol.trust.parts import node

DEFAULT = Policy()


def test_every_setting_has_a_meaning() -> None:
    assert tuple(MEANINGS) == tuple(Policy.__dataclass_fields__)


def test_the_defaults_let_members_invite_and_neither_evict_nor_delete() -> None:
    expected = Policy(
        members_may_invite=True,
        members_may_evict=False,
        members_may_delete_models=False,
        gossip_key_rotation_s=86_400.0,
    )
    assert expected == DEFAULT


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("members_may_invite", False), ("members_may_evict", True), ("members_may_delete_models", True),
        ("gossip_key_rotation_s", 60), ("gossip_key_rotation_s", 7200.5),
    ],
)  # fmt: skip
def test_what_is_written_is_read(key: str, value: float) -> None:
    at, raw = policy_record(key, value)
    assert len(raw) <= POLICY_VALUE_BYTES_MAX
    assert getattr(read_policy({at: raw}.get, DEFAULT), key) == value
    assert read_policy({}.get, DEFAULT) == DEFAULT


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("members_may_invite", 1), ("members_may_invite", "yes"), ("members_may_evict", 0.0), ("unknown", True),
        ("gossip_key_rotation_s", True), ("gossip_key_rotation_s", 59.9), ("gossip_key_rotation_s", math.inf),
        ("gossip_key_rotation_s", math.nan), ("gossip_key_rotation_s", 2_592_001),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_neither_written_nor_read(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        policy_record(key, value)
    assert read_policy({key.encode(): msgspec.msgpack.encode(value)}.get, DEFAULT) == DEFAULT


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\xff" * 64, b"\x91" * 64, b"\xa1\xff"])
def test_what_cannot_be_read_is_the_default(raw: bytes) -> None:
    assert read_policy(lambda _key: raw, DEFAULT) == DEFAULT


def test_only_admins_write_any_key() -> None:
    may_write = policy_collection().may_write
    for key in (b"members_may_invite", b"what a later version knows"):
        assert may_write(node("a"), "admin", key, b"\xc3")
        assert not may_write(node("a"), "member", key, b"\xc3")
