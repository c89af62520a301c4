"""The records' link messages: the push of fresh records, and the anti-entropy walk down the digest tree.

Requests come from the node that opened a repair, answers from its partner, which keeps nothing between two of them.
What the messages mean is in docs/decisions/0004-records.md; the limits here bound what a decoder will build.
"""

from typing import Annotated, Final

import msgspec

from protocol.wire import limits

HASH_BYTES: Final = 8
FANOUT_TOPS: Final = 64
FANOUT_BUCKETS: Final = 64
BUCKETS: Final = FANOUT_TOPS * FANOUT_BUCKETS
LEVEL_BYTES: Final = FANOUT_BUCKETS * HASH_BYTES
LEAF_BYTES: Final = 2 * HASH_BYTES
COLLECTIONS_MAX: Final = 64
COLLECTION_CHARS_MAX: Final = 64
RECORD_BYTES_MAX: Final = limits.RECORD_VALUE_BYTES_MAX + 1024
RECORDS_PER_MESSAGE_MAX: Final = 512
WANTED_PER_MESSAGE_MAX: Final = 1024
LEAVES_PER_MESSAGE_MAX: Final = 4096
PARTS_MIN: Final = 64
PARTS_MAX: Final = 4096

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=COLLECTION_CHARS_MAX)]
Hash = Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Level = Annotated[bytes, msgspec.Meta(min_length=LEVEL_BYTES, max_length=LEVEL_BYTES)]
Session = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
BucketNumber = Annotated[int, msgspec.Meta(ge=0, le=BUCKETS - 1)]
TopNumber = Annotated[int, msgspec.Meta(ge=0, le=FANOUT_TOPS - 1)]
BucketList = Annotated[list[BucketNumber], msgspec.Meta(max_length=BUCKETS)]
Pairs = Annotated[bytes, msgspec.Meta(max_length=LEAVES_PER_MESSAGE_MAX * LEAF_BYTES)]
Blob = Annotated[bytes, msgspec.Meta(min_length=limits.SIGNATURE_BYTES + 1, max_length=RECORD_BYTES_MAX)]
Blobs = Annotated[list[Blob], msgspec.Meta(max_length=RECORDS_PER_MESSAGE_MAX)]
_PerCollection = msgspec.Meta(max_length=COLLECTIONS_MAX)


class RecordPush(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=32):
    """Records just written or just learnt, passed on once by whoever finds them new. Not answered."""

    records: Blobs


class RecordRoot(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=33):
    """Opens a repair: one hash over each collection that the sender knows."""

    session: Session
    roots: Annotated[dict[Name, Hash], _PerCollection]


class RecordBuckets(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=34):
    """The sender's second-level hashes under the first-level numbers that differ. Answered by RecordLeaves."""

    session: Session
    levels: Annotated[
        dict[Name, Annotated[dict[TopNumber, Level], msgspec.Meta(max_length=FANOUT_TOPS)]], _PerCollection
    ]


class RecordLeaves(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=35):
    """(key hash, version) pairs of buckets that differ; `left` were not listed for size, `large` need RecordSplit."""

    session: Session
    leaves: Annotated[
        dict[Name, Annotated[dict[BucketNumber, Pairs], msgspec.Meta(max_length=BUCKETS)]], _PerCollection
    ]
    left: Annotated[dict[Name, BucketList], _PerCollection]
    large: Annotated[dict[Name, Annotated[dict[BucketNumber, int], msgspec.Meta(max_length=BUCKETS)]], _PerCollection]


class RecordTransfer(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=36):
    """Records that the partner lacks, and the hashes of the keys wanted from it. Answered by RecordGrant."""

    session: Session
    records: Blobs
    wanted: Annotated[
        dict[Name, Annotated[bytes, msgspec.Meta(max_length=WANTED_PER_MESSAGE_MAX * HASH_BYTES)]], _PerCollection
    ]


class RecordTops(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=37):
    """Answers RecordRoot: first-level hashes of the collections that both know and that differ; none: they agree.

    `unknown` names the collections that this node does not keep.
    """

    session: Session
    tops: Annotated[dict[Name, Level], _PerCollection]
    unknown: Annotated[list[Name], _PerCollection]


class RecordLeafRequest(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=38):
    """Please list these buckets. Answered by RecordLeaves."""

    session: Session
    buckets: Annotated[dict[Name, BucketList], _PerCollection]


class RecordSplit(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=39):
    """One overfull bucket, split into parts by a multiplier drawn for this question; 8 bytes of hash per part."""

    session: Session
    collection: Name
    bucket: BucketNumber
    salt: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    hashes: Annotated[bytes, msgspec.Meta(min_length=PARTS_MIN * HASH_BYTES, max_length=PARTS_MAX * HASH_BYTES)]


class RecordParts(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=40):
    """Answers RecordSplit: the parts that differ and their pairs; `complete` False: there are more, ask again later."""

    session: Session
    parts: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=PARTS_MAX - 1)]], msgspec.Meta(max_length=PARTS_MAX)]
    pairs: Annotated[bytes, msgspec.Meta(max_length=2 * LEAVES_PER_MESSAGE_MAX * LEAF_BYTES)]
    complete: bool


class RecordGrant(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=41):
    """Answers RecordTransfer: records for the first `covered` hashes wanted; `refused` of those sent were not taken."""

    session: Session
    records: Blobs
    covered: Annotated[int, msgspec.Meta(ge=0, le=COLLECTIONS_MAX * WANTED_PER_MESSAGE_MAX)]
    refused: Annotated[int, msgspec.Meta(ge=0, le=RECORDS_PER_MESSAGE_MAX)]


class RecordBusy(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=42):
    """You asked for more than your share; ask the same again after `wait_ms`."""

    session: Session
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)]


RecordRequest = RecordRoot | RecordBuckets | RecordLeafRequest | RecordSplit | RecordTransfer
RecordAnswer = RecordTops | RecordLeaves | RecordParts | RecordGrant | RecordBusy
RecordMessage = RecordPush | RecordRequest | RecordAnswer
