"""A roster without signatures: what the election asks of one, with admissions and evictions that come in any order."""

from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import blake2b

from protocol.ids import NodeId, ShortId, node_id_from_bytes, short_id
from protocol.trust.view import Role


@cache
def short_of(node: NodeId) -> ShortId:
    """Histories ask for it a million times; base32 is slow."""
    return short_id(node)


def node_ids(count: int, salt: str = "") -> list[NodeId]:
    """Ids that are the same in every run."""
    return [node_id_from_bytes(blake2b(f"{salt}{index}".encode(), digest_size=20).digest()) for index in range(count)]


class SetRoster:
    """Implements protocol.trust.view.RosterView over two sets that only grow."""

    def __init__(self, admitted: Iterable[NodeId], evicted: Iterable[NodeId] = ()) -> None:
        self.admitted = set(admitted)
        self.evicted = set(evicted)
        self._settle()

    def _settle(self) -> None:
        self._members = tuple(sorted(self.admitted - self.evicted, key=short_of))
        self._by_short = {bytes(short_of(node)): node for node in self._members}
        self._set = set(self._members)
        self._digest = blake2b(b"".join(self._by_short), digest_size=8).digest()

    def merge(self, other: "SetRoster") -> bool:
        """Learn what the other knows; whether that changed the members."""
        if other.admitted <= self.admitted and other.evicted <= self.evicted:
            return False
        before = self._digest
        self.admitted |= other.admitted
        self.evicted |= other.evicted
        self._settle()
        return self._digest != before

    def copy(self) -> "SetRoster":
        return SetRoster(self.admitted, self.evicted)

    @property
    def digest(self) -> bytes:
        return self._digest

    def members(self) -> Sequence[NodeId]:
        return self._members

    def node(self, short: bytes) -> NodeId | None:
        return self._by_short.get(bytes(short))

    def short(self, node_id: NodeId) -> ShortId:
        return short_of(node_id)

    def index(self, node_id: NodeId) -> int | None:
        return self._members.index(node_id) if node_id in self._set else None

    def public_key(self, node_id: NodeId) -> bytes | None:
        return bytes(32) if node_id in self._set else None

    def role(self, node_id: NodeId) -> Role | None:
        return "member" if node_id in self._set else None

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._set

    def __len__(self) -> int:
        return len(self._members)
