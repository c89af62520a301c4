"""A collection's index: which keys are here, in which version, and a digest tree of two levels over them.

64 x 64 buckets by the first 12 bits of the key's hash. A bucket is three packed columns sorted by hash, about 30 bytes
per record; its digest is made when asked for and kept until the bucket changes. Values live in the store.
"""

import hashlib
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

from protocol.records.messages import BUCKETS, FANOUT_BUCKETS, FANOUT_TOPS, HASH_BYTES

ZERO: Final = bytes(HASH_BYTES)
"""The digest of nothing."""

_BUCKET_SHIFT: Final = 64 - (BUCKETS - 1).bit_length()
_MASK: Final = 2**64 - 1


def bucket_of(key_hash: int) -> int:
    """The bucket that a key's hash falls into."""
    return key_hash >> _BUCKET_SHIFT


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=HASH_BYTES).digest() if raw else ZERO


def _pack_pairs(hashes: Sequence[int], versions: Sequence[int]) -> bytes:
    flat = [0] * (2 * len(hashes))
    flat[::2] = hashes
    flat[1::2] = versions
    return struct.pack(f">{len(flat)}Q", *flat)


def unpack_pairs(raw: bytes) -> dict[int, int]:
    """Key hash to version; bytes beyond a multiple of 16 are ignored."""
    count = len(raw) // 16
    flat = struct.unpack(f">{2 * count}Q", raw[: 16 * count])
    return dict(zip(flat[::2], flat[1::2], strict=True))


class _Bucket:
    """Columns sorted by key hash, and their digest unless something changed since."""

    __slots__ = ("digest", "hashes", "hlcs", "versions")

    def __init__(self, hashes: Sequence[int], versions: Sequence[int], hlcs: Sequence[int]) -> None:
        self.hashes = array("Q", hashes)
        self.versions = array("Q", versions)
        self.hlcs = array("Q", hlcs)
        self.digest: bytes | None = None


class Shelf:
    """The index of one collection. Keys in `ahead` are here for readers but not for other nodes (a clock was wrong)."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._tops: list[bytes | None] = [ZERO] * FANOUT_TOPS
        self._root: bytes | None = ZERO
        self._ahead: set[int] = set()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    # ---- entries ----------------------------------------------------------------------------------------------------

    def load(self, hashes: Sequence[int], versions: Sequence[int], hlcs: Sequence[int]) -> None:
        """Fill an empty shelf from columns sorted by key hash."""
        low = 0
        while low < len(hashes):
            number = bucket_of(hashes[low])
            high = bisect_left(hashes, (number + 1) << _BUCKET_SHIFT, low)
            self._buckets[number] = _Bucket(hashes[low:high], versions[low:high], hlcs[low:high])
            self._tops[number // FANOUT_BUCKETS] = None
            low = high
        self._count = len(hashes)
        self._root = None

    def get(self, key_hash: int) -> tuple[int, int] | None:
        """(version, hlc), or None."""
        bucket = self._buckets.get(key_hash >> _BUCKET_SHIFT)
        if bucket is None:
            return None
        at = bisect_left(bucket.hashes, key_hash)
        if at == len(bucket.hashes) or bucket.hashes[at] != key_hash:
            return None
        return bucket.versions[at], bucket.hlcs[at]

    def put(self, key_hash: int, version: int, hlc: int) -> None:
        """Add or replace an entry."""
        number = key_hash >> _BUCKET_SHIFT
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = _Bucket((), (), ())
        at = bisect_left(bucket.hashes, key_hash)
        if at < len(bucket.hashes) and bucket.hashes[at] == key_hash:
            bucket.versions[at], bucket.hlcs[at] = version, hlc
        else:
            bucket.hashes.insert(at, key_hash)
            bucket.versions.insert(at, version)
            bucket.hlcs.insert(at, hlc)
            self._count += 1
        self._ahead.discard(key_hash)
        self._changed(number)

    def remove(self, key_hash: int) -> None:
        """Forget an entry; harmless when there is none."""
        number = key_hash >> _BUCKET_SHIFT
        bucket = self._buckets.get(number)
        if bucket is None or self.get(key_hash) is None:
            return
        at = bisect_left(bucket.hashes, key_hash)
        for column in (bucket.hashes, bucket.versions, bucket.hlcs):
            del column[at]
        self._count -= 1
        if not bucket.hashes:
            del self._buckets[number]
        self._ahead.discard(key_hash)
        self._changed(number)

    def entries(self) -> Iterator[tuple[int, int]]:
        """(key hash, hlc) of every entry."""
        for bucket in self._buckets.values():
            yield from zip(bucket.hashes, bucket.hlcs, strict=True)

    def _changed(self, number: int) -> None:
        bucket = self._buckets.get(number)
        if bucket is not None:
            bucket.digest = None
        self._tops[number // FANOUT_BUCKETS] = None
        self._root = None

    # ---- what a wrong clock wrote -----------------------------------------------------------------------------------

    @property
    def ahead(self) -> frozenset[int]:
        """Keys whose version is from a time that has not come."""
        return frozenset(self._ahead)

    @property
    def has_ahead(self) -> bool:
        """Whether there are such keys."""
        return bool(self._ahead)

    def is_ahead(self, key_hash: int) -> bool:
        """Whether the version here is from a time that has not come."""
        return key_hash in self._ahead

    def set_ahead(self, keys: set[int]) -> None:
        """Say anew which keys those are; they leave the digests, the others come back into them."""
        for key_hash in keys ^ self._ahead:
            self._changed(key_hash >> _BUCKET_SHIFT)
        self._ahead = keys

    # ---- digests ----------------------------------------------------------------------------------------------------

    def root(self) -> bytes:
        """One hash over everything."""
        if self._root is None:
            tops = self.tops()
            self._root = _digest(tops) if tops.strip(b"\0") else ZERO
        return self._root

    def tops(self) -> bytes:
        """The 64 first-level hashes."""
        for top, known in enumerate(self._tops):
            if known is None:
                level = self.level(top)
                self._tops[top] = _digest(level) if level.strip(b"\0") else ZERO
        return b"".join(top for top in self._tops if top is not None)

    def level(self, top: int) -> bytes:
        """The 64 second-level hashes under one of the first level."""
        first = top * FANOUT_BUCKETS
        return b"".join([self._bucket_digest(number) for number in range(first, first + FANOUT_BUCKETS)])

    def _bucket_digest(self, number: int) -> bytes:
        bucket = self._buckets.get(number)
        if bucket is None:
            return ZERO
        if bucket.digest is None:
            bucket.digest = _digest(self.pairs(number))
        return bucket.digest

    def size(self, number: int) -> int:
        """How many entries a bucket has."""
        bucket = self._buckets.get(number)
        return 0 if bucket is None else len(bucket.hashes)

    def pairs(self, number: int) -> bytes:
        """16 bytes per entry of a bucket: key hash and version, in the order of the hashes."""
        bucket = self._buckets.get(number)
        if bucket is None:
            return b""
        if not self._ahead:
            return _pack_pairs(bucket.hashes, bucket.versions)
        kept = [at for at, key_hash in enumerate(bucket.hashes) if key_hash not in self._ahead]
        return _pack_pairs([bucket.hashes[at] for at in kept], [bucket.versions[at] for at in kept])

    def parts(self, number: int, salt: int, count: int) -> list[bytes]:
        """A bucket's pairs split into `count` (a power of two) parts by a multiplier that nobody could foresee.

        Whoever crafts keys for one bucket cannot craft them for one part of it. (Multiply-shift hashing: Dietzfelbinger
        et al., "A Reliable Randomized Algorithm for the Closest-Pair Problem", J. Algorithms 1997.)
        """
        shift = 65 - count.bit_length()
        multiplier = salt << 1 | 1
        split: list[list[bytes]] = [[] for _ in range(count)]
        raw = self.pairs(number)
        for at in range(0, len(raw), 16):
            key_hash = int.from_bytes(raw[at : at + 8], "big")
            split[((key_hash * multiplier) & _MASK) >> shift].append(raw[at : at + 16])
        return [b"".join(part) for part in split]


def part_hashes(parts: Sequence[bytes]) -> bytes:
    """8 bytes per part."""
    return b"".join([_digest(part) for part in parts])
