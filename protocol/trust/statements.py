"""What the mesh's root says about its machines: admissions and evictions, with their bytes.

Spells, signs and checks single statements, and says which of two on the same machine counts. It leaves what follows
from all of them to protocol.trust.roster, and carrying them about to the records: they travel as the collection
"trust", keyed by node id, whose hooks are `TrustRules`.

The bytes: a MessagePack array, tag first (1 admission, 2 eviction, 3 withdrawal), then 64 bytes of Ed25519 signature
by the root key over TRUST_DOMAIN, the mesh id and that array.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, Protocol, cast

import msgspec

from protocol.ids import NODE_ID_BYTES, PUBLIC_KEY_BYTES, NodeId, node_id_bytes, node_id_from_bytes, node_id_of
from protocol.trust.view import Role
from protocol.wire.crypto import TRUST_DOMAIN
from protocol.wire.limits import NAME_BYTES_MAX, SIGNATURE_BYTES

TRUST_COLLECTION: Final = "trust"
TRUST_STATEMENT_BYTES_MAX: Final = 1024
REASON_CHARS_MAX: Final = 160
NAME_CHARS_MAX: Final = 63
INVITATION_BYTES_MAX: Final = 16

ROLE_CODES: Final[Mapping[Role, int]] = MappingProxyType({"member": 1, "admin": 2})
"""How a role is spelled in signed bytes, here and in the join transcript."""

_Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Node = Annotated[bytes, msgspec.Meta(min_length=NODE_ID_BYTES, max_length=NODE_ID_BYTES)]

# C0, DEL, C1, line and paragraph separators, and the characters that reorder or hide text: a name is shown in
# terminals, logs and pages, and none of these could be shown as what it is.
_NOT_IN_TEXT: Final = frozenset(
    {*range(0x20), *range(0x7F, 0xA0), 0x061C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070)}
    | {0xFEFF, *range(0xFFF9, 0xFFFC), *range(0xD800, 0xE000)}
)
_ZERO_WIDTH_JOINER: Final = "\u200d"


class Admission(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """This key belongs to a member. A newer one on the same key changes its name or role (promotion).

    The node id is not spelled out: it follows from the key, and what is said twice can disagree.
    """

    public_key: Annotated[bytes, msgspec.Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_BYTES_MAX)]
    role_code: Annotated[int, msgspec.Meta(ge=1, le=2)]
    admitted_at: _Milliseconds  # unix milliseconds by the admitting node's clock; orders admissions of one key only
    by_bytes: _Node
    # The id of the invitation that was redeemed, so that any node can see that none counted twice; empty for a founder.
    invitation: Annotated[bytes, msgspec.Meta(max_length=INVITATION_BYTES_MAX)] = b""
    # When the admission was made that this one took the place of, itself or by way of others; 0: there was none.
    first_admitted_at: _Milliseconds = 0

    @property
    def joined_at(self) -> int:
        """Since when the machine is a member, whatever was changed about it since: unix milliseconds."""
        return self.first_admitted_at or self.admitted_at

    @property
    def node_id(self) -> NodeId:
        """Whom the statement is about."""
        return node_id_of(self.public_key)

    @property
    def role(self) -> Role:
        """admin holds the root key, member does not."""
        return "admin" if self.role_code == ROLE_CODES["admin"] else "member"

    @property
    def by(self) -> NodeId:
        """The node that invited this one (the founder: itself)."""
        return node_id_from_bytes(self.by_bytes)


class Eviction(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """This machine is out, for good: no admission of the same key counts any more, not even a newer one."""

    node_bytes: _Node
    evicted_at: _Milliseconds
    by_bytes: _Node
    reason: Annotated[str, msgspec.Meta(max_length=REASON_CHARS_MAX)] = ""

    @property
    def node_id(self) -> NodeId:
        """Whom the statement is about."""
        return node_id_from_bytes(self.node_bytes)

    @property
    def by(self) -> NodeId:
        """The admin that evicted it (leaving for good: the node itself may be named)."""
        return node_id_from_bytes(self.by_bytes)


class Withdrawal(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """This key was admitted and never came: it is no member, and a newer admission makes it one."""

    node_bytes: _Node
    withdrawn_at: _Milliseconds  # later than the admission it withdraws
    by_bytes: _Node

    @property
    def node_id(self) -> NodeId:
        """Whom the statement is about."""
        return node_id_from_bytes(self.node_bytes)


TrustStatement = Admission | Eviction | Withdrawal


class RootSigner(Protocol):
    """Whoever holds the root key: Ed25519 over domain, mesh id and body."""

    def sign(self, domain: bytes, body: bytes) -> bytes: ...


class Verifier(Protocol):
    """The one method of protocol.wire.crypto.Suite that trust needs."""

    def verify(self, public_key: bytes, domain: bytes, body: bytes, signature: bytes) -> bool: ...


_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[TrustStatement] = msgspec.msgpack.Decoder(TrustStatement)


def admission(
    *,
    public_key: bytes,
    name: str,
    role: Role,
    admitted_at: int,
    by: NodeId,
    invitation: bytes = b"",
    first_admitted_at: int = 0,
) -> Admission:
    """An admission, checked. `admitted_at` is unix milliseconds. Raises ValueError if a field is out of bounds."""
    made = Admission(public_key, name, ROLE_CODES[role], admitted_at, node_id_bytes(by), invitation, first_admitted_at)
    return cast(Admission, _checked(made))


def eviction(*, node_id: NodeId, evicted_at: int, by: NodeId, reason: str = "") -> Eviction:
    """An eviction, checked. Raises ValueError if a field is out of bounds."""
    made = Eviction(node_id_bytes(node_id), evicted_at, node_id_bytes(by), reason)
    return cast(Eviction, _checked(made))


def withdrawal(*, node_id: NodeId, withdrawn_at: int, by: NodeId) -> Withdrawal:
    """A withdrawal, checked. Raises ValueError if a field is out of bounds."""
    made = Withdrawal(node_id_bytes(node_id), withdrawn_at, node_id_bytes(by))
    return cast(Withdrawal, _checked(made))


def seal(statement: TrustStatement, root: RootSigner) -> bytes:
    """The statement's bytes under the root's signature."""
    body = _encode(statement)
    return body + root.sign(TRUST_DOMAIN, body)


def decode(data: bytes) -> TrustStatement | None:
    """The statement these bytes spell, **unverified**; None if they spell none. Never raises."""
    if not SIGNATURE_BYTES < len(data) <= TRUST_STATEMENT_BYTES_MAX:
        return None
    try:
        statement = _decoder.decode(data[:-SIGNATURE_BYTES])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return statement if _complaint(statement) is None else None


def open_statement(data: bytes, root_public_key: bytes, verifier: Verifier) -> TrustStatement | None:
    """The statement, if the root signed it; else None. Never raises."""
    statement = decode(data)
    if statement is None:
        return None
    body, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
    return statement if verifier.verify(root_public_key, TRUST_DOMAIN, body, signature) else None


def rank(statement: TrustStatement, data: bytes) -> tuple[bool, int, bytes]:
    """Of two statements on one machine, the one with the higher rank counts, in whatever order they came.

    An eviction beats all others. Otherwise the newer beats the older, and equal times settle by the bytes
    themselves, so that all nodes settle alike.
    """
    if isinstance(statement, Eviction):
        return (True, statement.evicted_at, data)
    return (False, dated(statement), data)


def dated(statement: TrustStatement) -> int:
    """Unix milliseconds by the clock of who made it."""
    match statement:
        case Admission():
            return statement.admitted_at
        case Eviction():
            return statement.evicted_at
        case Withdrawal():
            return statement.withdrawn_at


class TrustRules:
    """The hooks of the collection "trust": who may write what, and which of two values counts."""

    def __init__(self, root_public_key: bytes, verifier: Verifier) -> None:
        self._root = root_public_key
        self._verifier = verifier

    def validate(self, key: bytes, value: bytes) -> bool:
        """Whether the value is a statement by the root about the node that the key (its id in ASCII) names."""
        statement = open_statement(value, self._root, self._verifier)
        return statement is not None and statement.node_id.encode("ascii") == key

    def order(self, a: bytes, b: bytes) -> int:
        """Negative if b counts, positive if a counts, 0 if they are the same bytes. Both were validated.

        The order is the statements' own, never the records' clock: an eviction must win over an admission by a node
        whose clock is in the year 2040.
        """
        if a == b:
            return 0
        first, second = decode(a), decode(b)
        if first is None or second is None:
            # Neither validate nor any caller lets this happen; if it did, the readable one counts.
            return (first is not None) - (second is not None) or (1 if a > b else -1)
        return 1 if rank(first, a) > rank(second, b) else -1


def record_key(node_id: NodeId) -> bytes:
    """The key under which the statements on a node are kept in the collection "trust"."""
    return node_id.encode("ascii")


def succeeding_time(previous: TrustStatement | None, wall_ms: int) -> int:
    """When to date a statement on a known key so that it counts, even if the old one was dated by a clock ahead."""
    return wall_ms if previous is None else max(wall_ms, dated(previous) + 1)


def is_plain_text(text: str) -> bool:
    """Whether the text can be shown as it is: nothing that controls, hides or reorders, no blanks at its ends."""
    return text == text.strip() and not any(_not_in_text(character) for character in text)


def plain_name(raw: str) -> str:
    """A name that an admission may carry, made from whatever a machine calls itself; "node" if nothing is left.

    Spaces and emoji stay. Control and invisible characters go, runs of blanks become one, the rest is cut to
    NAME_CHARS_MAX characters and NAME_BYTES_MAX bytes of UTF-8.
    """
    kept = "".join(" " if character.isspace() else character for character in raw if _kept(character))
    name = " ".join(kept.split())[:NAME_CHARS_MAX]
    encoded = name.encode("utf-8")[:NAME_BYTES_MAX]
    return encoded.decode("utf-8", "ignore").strip() or "node"


def _kept(character: str) -> bool:
    return character.isspace() or not _not_in_text(character)


def _not_in_text(character: str) -> bool:
    # The joiner holds emoji of several parts together; alone it shows nothing, and it cannot reorder anything.
    return ord(character) in _NOT_IN_TEXT and character != _ZERO_WIDTH_JOINER


def _checked(statement: TrustStatement) -> TrustStatement:
    """Structs are checked when decoded, not when made: decode what was made. Raises ValueError."""
    try:
        checked = _decoder.decode(_encode(statement))
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise ValueError(f"no such trust statement can be made: {error}") from None
    complaint = _complaint(checked)
    if complaint is not None:
        raise ValueError(complaint)
    return checked


def _complaint(statement: TrustStatement) -> str | None:
    """What the types alone do not say, or None."""
    if isinstance(statement, Withdrawal):
        return None
    text = statement.name if isinstance(statement, Admission) else statement.reason
    if not is_plain_text(text):
        return "a name or reason holds control characters, or blanks at its ends"
    if len(text.encode()) > NAME_BYTES_MAX and isinstance(statement, Admission):
        return f"a name has at most {NAME_BYTES_MAX} bytes"
    return None
