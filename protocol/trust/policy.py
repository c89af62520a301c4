"""What the mesh as a whole has decided: who may invite, evict and delete models, how often the gossip key changes.

Records of the collection "mesh/policy", one for each key; admins write them, and every member reads its own copy. A key
that nobody wrote, or whose value this version cannot read, has its default. What follows from them is decided in
protocol.trust.authority and protocol.trust.keyring.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Final

import msgspec

from protocol.records.collection import Collection, only_admins

POLICY_COLLECTION: Final = "mesh/policy"
POLICY_VALUE_BYTES_MAX: Final = 64
POLICY_RECORDS_MAX: Final = 64  # later versions may know more keys

ROTATION_MIN_S: Final = 60.0
ROTATION_MAX_S: Final = 30 * 86_400.0


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings of the mesh. Times in seconds."""

    members_may_invite: bool = True
    members_may_evict: bool = False
    members_may_delete_models: bool = False
    gossip_key_rotation_s: float = 86_400.0


MEANINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "members_may_invite": "Members that are no admins may invite other members; an admin still signs.",
        "members_may_evict": "Members that are no admins may evict other members, no admins; an admin still signs.",
        "members_may_delete_models": "Members that are no admins may delete models from others' nodes, and unload "
        "those that they hold no part of.",
        "gossip_key_rotation_s": "How often the key of the gossip is replaced, in seconds, from 60 to 2592000.",
    }
)
"""Every key, and what it does."""

_encode: Final = msgspec.msgpack.Encoder().encode


def policy_collection() -> Collection:
    """Which values make sense is asked when they are read: a later version's must pass through this one."""
    return Collection(
        POLICY_COLLECTION,
        may_write=only_admins,
        records_max=POLICY_RECORDS_MAX,
        value_bytes_max=POLICY_VALUE_BYTES_MAX,
    )


def policy_record(key: str, value: object) -> tuple[bytes, bytes]:
    """Key and value of the record that sets this. Raises ValueError, in words for a person, if it cannot be set so."""
    if key not in MEANINGS:
        raise ValueError(f"{key!r} is no setting of the mesh; there are {', '.join(MEANINGS)}")
    if not _fits(key, value):
        expected = "true or false" if _is_switch(key) else f"a number from {ROTATION_MIN_S:.0f} to {ROTATION_MAX_S:.0f}"
        raise ValueError(f"{key} takes {expected}")
    return key.encode("ascii"), _encode(value)


def read_policy(read: Callable[[bytes], bytes | None], default: Policy) -> Policy:
    """The policy by what `read` gives for each key: the record's value, or None. Never raises on what is in it."""
    found: dict[str, bool | float] = {}
    for key in MEANINGS:
        raw = read(key.encode("ascii"))
        if raw is None:
            continue
        try:
            value = msgspec.msgpack.decode(raw, type=bool | float | int)
        except (msgspec.MsgspecError, RecursionError):
            continue
        if _fits(key, value):
            found[key] = value if _is_switch(key) else float(value)
    return replace(default, **found)  # type: ignore[arg-type]  # _fits has looked at each


def _is_switch(key: str) -> bool:
    return any(field.name == key and isinstance(field.default, bool) for field in fields(Policy))


def _fits(key: str, value: object) -> bool:
    if _is_switch(key):
        return isinstance(value, bool)
    # Not a number is in no range.
    return isinstance(value, int | float) and not isinstance(value, bool) and ROTATION_MIN_S <= value <= ROTATION_MAX_S
