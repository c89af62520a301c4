"""Signed statements: what a node says of itself or of another, in a form that anyone may pass on and nobody can alter.

A statement is its MessagePack body followed by 64 bytes of Ed25519 signature. Statements travel several times; each
distinct one is verified once, and remembered in a bounded cache.
"""

import hashlib
from collections import Counter
from collections.abc import MutableMapping
from typing import NamedTuple

import msgspec

from protocol.ids import NodeId
from protocol.trust.view import RosterView
from protocol.wire import limits
from protocol.wire.crypto import STATEMENT_DOMAIN, Suite
from protocol.wire.messages import Alive, StatementBody

CACHE_STATEMENTS_MAX = 4096
FORGED_MAX = 8  # a member that passed on so many forged statements in FORGED_WINDOW_S is believed nothing for as long
FORGED_WINDOW_S = 60.0
FORGERS_MAX = 4096
PACE_PER_S = 200  # new statements that one peer may have verified by packets; correct ones bring some 90 at most
PACE_BURST = 400

_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[StatementBody] = msgspec.msgpack.Decoder(StatementBody)


class Stated(NamedTuple):
    """A verified statement: its bytes, to pass on; its body; and who signed it."""

    blob: bytes
    body: StatementBody
    signer: NodeId
    token: int  # for Alive: 8 bytes of hash over (signer, boot, incarnation), the unit of view digests; else 0


def view_token(alive: Alive) -> int:
    """What one up member adds (by XOR) to the digest of a view. Never 0."""
    material = alive.signer + alive.boot.to_bytes(4, "big") + alive.incarnation.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(material, digest_size=8).digest(), "big") or 1


class Forgers:
    """Who passed on what nobody signed. No correct member does: it verifies before it passes on.

    A signature costs some 60 us to refuse, so one who makes others refuse them by the thousand must be stopped early.
    """

    def __init__(self) -> None:
        self._counts: dict[NodeId, tuple[float, int]] = {}  # since when, and how many
        self._fresh: list[NodeId] = []

    def count(self, peer: NodeId, now: float) -> None:
        """One more by this peer; `now` is monotonic seconds."""
        since, count = self._counts.pop(peer, (now, 0))
        if now >= since + FORGED_WINDOW_S:
            since, count = now, 0
        if len(self._counts) >= FORGERS_MAX:
            del self._counts[next(iter(self._counts))]
        # The limit reached begins the time anew: from now on nothing is believed for the whole of it.
        self._counts[peer] = (now if count + 1 == FORGED_MAX else since, count + 1)
        if count + 1 == FORGED_MAX:
            self._fresh.append(peer)

    def is_barred(self, peer: NodeId, now: float) -> bool:
        """Whether statements that this peer brings are not even looked at."""
        since, count = self._counts.get(peer, (now, 0))
        return count >= FORGED_MAX and now < since + FORGED_WINDOW_S

    def take(self) -> list[NodeId]:
        """Those that reached the limit since the last call; their links are to be cut."""
        fresh, self._fresh = self._fresh, []
        return fresh


class Paces:
    """How many new statements each peer may still bring: what it signs itself is valid, and costs as much as forged."""

    def __init__(self, *, per_s: int = PACE_PER_S, burst: int = PACE_BURST) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._left: dict[NodeId, tuple[float, float]] = {}  # when, and how many

    def admits(self, peer: NodeId, now: float) -> bool:
        """Whether one more is looked at; counts it if so. `now` is monotonic seconds."""
        since, left = self._left.pop(peer, (now, self._burst))
        if len(self._left) >= FORGERS_MAX:
            del self._left[next(iter(self._left))]
        left = min(self._burst, left + (now - since) * self._per_s)
        self._left[peer] = (now, max(0.0, left - 1))
        return left >= 1


class StatementCodec:
    """Signs this node's statements and verifies everybody's. The cache may be shared by nodes that run in one world."""

    def __init__(
        self,
        suite: Suite,
        roster: RosterView,
        cache: MutableMapping[bytes, Stated] | None = None,
        cache_statements_max: int = CACHE_STATEMENTS_MAX,
    ) -> None:
        self._suite = suite
        self._roster = roster
        self._cache_max = cache_statements_max
        self._cache: MutableMapping[bytes, Stated] = {} if cache is None else cache
        self.drops: Counter[str] = Counter()
        self.forgers = Forgers()
        self._paces = Paces()

    def sign(self, me: NodeId, body: StatementBody) -> Stated:
        """Encode and sign a statement of this node. Raises ValueError if it is too large to travel."""
        encoded = _encode(body)
        blob = encoded + self._suite.sign(STATEMENT_DOMAIN, encoded)
        if len(blob) > limits.STATEMENT_BYTES_MAX:
            raise ValueError(f"a statement of {len(blob)} bytes does not fit a datagram")
        return self._remember(Stated(blob, body, me, view_token(body) if isinstance(body, Alive) else 0))

    def open(
        self, blob: bytes, via: NodeId | None = None, now: float = 0.0, *, is_paced: bool = False
    ) -> Stated | None:
        """The statement, if its signer is a member and really signed it; else None, counted. Never raises.

        `via` is the peer that brought it, `now` monotonic seconds: who brings forged ones is soon not listened to.
        Nor is who brings too many at once, unless `is_paced`: the caller sees to that itself.
        """
        known = self._cache.get(blob)
        if known is not None:
            # The roster may have changed since: an evicted node's word stops counting at once.
            if known.signer in self._roster:
                return known
            self._drop("not_member")
            return None
        if via is not None and self.forgers.is_barred(via, now):
            self._drop("barred")
            return None
        if via is not None and not is_paced and not self._paces.admits(via, now):
            self._drop("hasty")
            return None
        if not limits.SIGNATURE_BYTES < len(blob) <= limits.STATEMENT_BYTES_MAX:
            self._drop("size")
            return None
        encoded, signature = blob[: -limits.SIGNATURE_BYTES], blob[-limits.SIGNATURE_BYTES :]
        try:
            body = _decoder.decode(encoded)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            self._drop("malformed")
            return None
        signer = self._roster.node(body.signer)
        public_key = self._roster.public_key(signer) if signer is not None else None
        if signer is None or public_key is None:
            self._drop("not_member")
            return None
        if not self._suite.verify(public_key, STATEMENT_DOMAIN, encoded, signature):
            self._drop("forged")
            if via is not None:
                self.forgers.count(via, now)
            return None
        return self._remember(Stated(blob, body, signer, view_token(body) if isinstance(body, Alive) else 0))

    def opened(self, blob: bytes) -> Stated | None:
        """The statement if it was opened before and is still remembered. It may be of a node that was evicted since."""
        return self._cache.get(blob)

    def _remember(self, stated: Stated) -> Stated:
        # Everybody's newest statement finds room beside what is said of the moment, however large the mesh is.
        if len(self._cache) >= max(self._cache_max, 2 * len(self._roster)):
            # Dicts keep insertion order: the oldest goes. A shared mapping brings its own bound.
            del self._cache[next(iter(self._cache))]
        self._cache[stated.blob] = stated
        return stated

    def _drop(self, reason: str) -> None:
        self.drops[reason] += 1
