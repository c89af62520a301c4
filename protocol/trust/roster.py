"""The roster: who belongs to the mesh, from root-signed statements that may come in any order.

The same set of statements makes the same roster everywhere. It leaves spelling and signatures to
protocol.trust.statements and spreading them to the records.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

from protocol.ids import NodeId, ShortId, node_id_of, short_id
from protocol.trust.events import RosterChanged
from protocol.trust.statements import Admission, Eviction, TrustStatement, Verifier, open_statement, rank
from protocol.trust.view import Role
from protocol.wire.limits import ROSTER_MAX

Standing = Literal["member", "evicted", "stranger"]


class Roster:
    """Admitted and not evicted. Implements protocol.trust.view.RosterView.

    What counts per node is the statement of the highest rank: any eviction, else the newest admission. Where two
    admitted nodes share a short id, the one with the lower node id is the member: the rule knows no order of arrival.
    """

    def __init__(self, *, root_public_key: bytes, verifier: Verifier, statements: Iterable[bytes] = ()) -> None:
        self._root = root_public_key
        self._verifier = verifier
        self._statements: dict[NodeId, tuple[TrustStatement, bytes]] = {}
        self._admitted: dict[NodeId, Admission] = {}  # admitted and not evicted, colliding ones included
        self._claims: dict[bytes, set[NodeId]] = {}  # the admitted by short id; almost always one
        self._by_short: dict[bytes, NodeId] = {}  # the members
        self._held: dict[NodeId, Admission] = {}  # the members' admissions; every datagram asks for some
        self._shorts: dict[NodeId, ShortId] = {}
        self._members: tuple[NodeId, ...] | None = None
        self._positions: dict[NodeId, int] = {}
        self._digest = b""
        for statement in statements:
            self._take(statement)

    # ---- changing ---------------------------------------------------------------------------------------------------

    def apply(self, data: bytes) -> RosterChanged | None:
        """Take one statement. None: it is not the root's, says nothing new, or is outranked; nothing changed then.

        A statement that is kept but alters no membership (an eviction of a node never admitted) also gives None.
        """
        taken = self._take(data)
        if taken is None:
            return None
        node_id, holder_before = taken
        holder = self._by_short.get(self.short(node_id))
        if holder == holder_before:
            return RosterChanged(altered=(node_id,), digest=self.digest) if holder == node_id else None
        return RosterChanged(
            admitted=() if holder is None else (holder,),
            removed=() if holder_before is None else (holder_before,),
            digest=self.digest,
        )

    def _take(self, data: bytes) -> tuple[NodeId, NodeId | None] | None:
        """Keep the statement if it counts; the node it is about and who held its short id before."""
        statement = open_statement(data, self._root, self._verifier)
        if statement is None:
            return None
        node_id = statement.node_id
        held = self._statements.get(node_id)
        if held is not None and rank(statement, data) <= rank(*held):
            return None
        self._statements[node_id] = (statement, data)
        short = self.short(node_id)
        holder_before = self._by_short.get(short)
        claims = self._claims.setdefault(short, set())
        if isinstance(statement, Admission):
            self._admitted[node_id] = statement
            claims.add(node_id)
        else:
            self._admitted.pop(node_id, None)
            claims.discard(node_id)
        self._settle(short, claims)
        return node_id, holder_before

    def _settle(self, short: ShortId, claims: set[NodeId]) -> None:
        """Decide anew whose short id this is."""
        winner, before = min(claims, default=None), self._by_short.get(short)
        if winner is not None:
            self._held[winner] = self._admitted[winner]
        if winner == before:
            return
        if before is not None:
            del self._held[before]
        if winner is None:
            del self._by_short[short]
        else:
            self._by_short[short] = winner
        self._members = None

    # ---- RosterView -------------------------------------------------------------------------------------------------

    @property
    def digest(self) -> bytes:
        """8 bytes of BLAKE2b over the members' short ids in order."""
        self.members()
        return self._digest

    def members(self) -> Sequence[NodeId]:
        """All members in the order of their short ids; the same object until the roster changes."""
        if self._members is None:
            shorts = sorted(self._by_short)
            self._members = tuple(self._by_short[short] for short in shorts)
            self._positions = {node_id: position for position, node_id in enumerate(self._members)}
            self._digest = hashlib.blake2b(b"".join(shorts), digest_size=8).digest()
        return self._members

    def node(self, short: bytes) -> NodeId | None:
        """The member with this short id, or None."""
        return self._by_short.get(short)

    def short(self, node_id: NodeId) -> ShortId:
        """The short id of any node id. Raises ValueError if it is not one."""
        known = self._shorts.get(node_id)
        if known is not None:
            return known
        made = short_id(node_id)
        if node_id in self._statements:
            # Only what the root spoke of is remembered, or strangers could fill this table.
            self._shorts[node_id] = made
        return made

    def index(self, node_id: NodeId) -> int | None:
        """Position in members(), or None."""
        self.members()
        return self._positions.get(node_id)

    def public_key(self, node_id: NodeId) -> bytes | None:
        """Raw Ed25519 key of a member, or None."""
        member = self.admission(node_id)
        return None if member is None else member.public_key

    def role(self, node_id: NodeId) -> Role | None:
        """The member's role, or None."""
        member = self.admission(node_id)
        return None if member is None else member.role

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._held

    def __len__(self) -> int:
        return len(self._by_short)

    # ---- more than machines ask -------------------------------------------------------------------------------------

    def admission(self, node_id: NodeId) -> Admission | None:
        """The admission by which a node is a member, or None."""
        return self._held.get(node_id)

    def name(self, node_id: NodeId) -> str | None:
        """The member's name, or None. Names are labels: two members may have the same."""
        member = self.admission(node_id)
        return None if member is None else member.name

    def evicted(self, node_id: NodeId) -> Eviction | None:
        """The tombstone of a node, or None."""
        held = self._statements.get(node_id)
        return held[0] if held is not None and isinstance(held[0], Eviction) else None

    def evictions(self) -> list[Eviction]:
        """All tombstones."""
        return [statement for statement, _ in self._statements.values() if isinstance(statement, Eviction)]

    def standing(self, public_key: bytes) -> Standing:
        """How the holder of this key is to be treated; asked right after every TLS handshake, whatever the
        certificate around the key looks like."""
        node_id = node_id_of(public_key)
        if node_id in self:
            return "member"
        return "evicted" if self.evicted(node_id) is not None else "stranger"

    def refusal(self, public_key: bytes) -> str | None:
        """Why this key must not be admitted, in words for the one who tries to; None if it may be."""
        node_id = node_id_of(public_key)
        if self.evicted(node_id) is not None:
            return "this machine was evicted; to come back it needs a new identity (its old key stays shut out)"
        holder = self.node(short_id(node_id))
        if holder is not None and holder != node_id:
            return "its short id belongs to another member; make a new identity on the joining machine and try again"
        if holder is None and len(self._admitted) >= ROSTER_MAX:
            return f"the mesh is full ({ROSTER_MAX} machines)"
        return None

    def statement(self, node_id: NodeId) -> bytes | None:
        """The bytes of the statement that counts for a node, or None."""
        held = self._statements.get(node_id)
        return None if held is None else held[1]

    def statements(self) -> list[bytes]:
        """All statements that count, tombstones included, by node id: what a joiner is given."""
        return [self._statements[node_id][1] for node_id in sorted(self._statements)]
