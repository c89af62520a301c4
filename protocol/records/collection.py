"""What a subsystem declares of a collection: who may write, which of two versions counts, how long deletions last.

All hooks are pure functions of their arguments: every node must decide alike, whatever it has seen before and in
whatever order. A changed rule is a new collection with a new name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from protocol.ids import NodeId
from protocol.records.messages import COLLECTION_CHARS_MAX
from protocol.trust.view import Role
from protocol.wire.limits import RECORD_VALUE_BYTES_MAX

MayWrite = Callable[[NodeId, Role, bytes, bytes], bool]
"""(author, its role, key, value): may this author say this? The value is empty in a deletion. ValueError means no."""

Validate = Callable[[bytes, bytes], bool]
"""(key, value): is the value true by itself, whoever brings it?"""

Order = Callable[[bytes, bytes], int]
"""(value a, value b): positive if a counts, negative if b counts, 0 if time decides. A weak order: transitive."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._/-]*")

TOMBSTONE_LIFE_MIN_S: Final = 3_600.0
"""A deletion may be forgotten after this at the earliest: no push or hold lasts so long."""


def anyone(_author: NodeId, _role: Role, _key: bytes, _value: bytes) -> bool:
    """Every member may write every key."""
    return True


def only_admins(_author: NodeId, role: Role, _key: bytes, _value: bytes) -> bool:
    """Members may read; admins write."""
    return role == "admin"


def only_owner(author: NodeId, _role: Role, key: bytes, _value: bytes) -> bool:
    """A node writes the key that is its node id, and keys that begin with it and a slash."""
    name = author.encode("ascii")
    return key == name or key.startswith(name + b"/")


@dataclass(frozen=True, slots=True)
class Collection:
    """The rules of one collection. Raises ValueError when they contradict each other.

    `validate` given: values prove themselves (a statement by the mesh's root); then nobody signs, nothing is deleted,
    and `order` must say which of two values counts. `each_author`: every author keeps a version of its own under a key
    and none replaces another's; reads give all of them (`versions`), so that a subsystem can merge them.
    `tombstone_life_s` None: deletions are kept for good; else they may be forgotten after that time, and are once every
    member is known to have had them.
    """

    name: str
    may_write: MayWrite = anyone
    validate: Validate | None = None
    order: Order | None = None
    each_author: bool = False
    tombstone_life_s: float | None = None
    records_max: int = 100_000
    value_bytes_max: int = RECORD_VALUE_BYTES_MAX

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None or len(self.name) > COLLECTION_CHARS_MAX:
            raise ValueError(f"{self.name!r} is no collection name: lowercase letters, digits and ._/- only")
        if not 0 < self.value_bytes_max <= RECORD_VALUE_BYTES_MAX:
            raise ValueError(f"a value has at most {RECORD_VALUE_BYTES_MAX} bytes; put more into a file")
        if self.records_max < 1:
            raise ValueError("a collection that holds no record is of no use")
        if self.tombstone_life_s is not None and self.tombstone_life_s < TOMBSTONE_LIFE_MIN_S:
            raise ValueError(f"deletions live at least {TOMBSTONE_LIFE_MIN_S:.0f} s: a record in flight could return")
        if self.validate is not None and (self.order is None or self.each_author or self.tombstone_life_s is not None):
            raise ValueError("values that prove themselves need an order, have no authors and are never deleted")
