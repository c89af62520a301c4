"""A record's bytes: what is one, what is none, and the vectors another implementation can be held against."""

import json
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import mesh_id_of
from protocol.records.messages import RECORD_BYTES_MAX, RecordMessage
from protocol.records.record import (
    UNSIGNED,
    is_signed,
    key_hasher,
    open_record,
    plain_record,
    sign_record,
    unpack_hashes,
    version_of,
)
from protocol.records.store import RowId, row_id, row_key
from protocol.wire.limits import RECORD_KEY_BYTES_MAX, RECORD_VALUE_BYTES_MAX
from tests.protocol.records.world import MESH, Identity, public_key_of, suite_of

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "records.json"
ALICE = Identity(1)


def made(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"collection": "things", "key": b"k", "value": b"v", "hlc": 5 << 16, "deleted": False}
    return sign_record(ALICE.suite, ALICE.public_key, **{**fields, **changes}).blob


def spelled(*fields: object) -> bytes:
    return bytes(64) + msgpack.packb(list(fields), use_bin_type=True)


def test_a_record_comes_back_as_it_was_made() -> None:
    record = open_record(made(value=b"x" * 300))
    assert record is not None
    assert (record.collection, record.key, record.value) == ("things", b"k", b"x" * 300)
    assert (record.author, record.public_key) == (ALICE.node_id, ALICE.public_key)
    assert record.wall == 0.005
    assert is_signed(record, Identity(2).suite)


def test_the_largest_record_is_one() -> None:
    blob = made(
        collection="c" * 64, key=b"k" * RECORD_KEY_BYTES_MAX, value=b"v" * RECORD_VALUE_BYTES_MAX, hlc=2**63 - 1
    )
    assert len(blob) <= RECORD_BYTES_MAX
    assert open_record(blob) is not None


@pytest.mark.parametrize("at", [0, 63, 64, 70, -1])
def test_a_flipped_bit_is_no_longer_signed(at: int) -> None:
    blob = bytearray(made())
    blob[at] ^= 1
    record = open_record(bytes(blob))
    assert record is None or not is_signed(record, ALICE.suite)


def test_a_signature_does_not_hold_in_another_mesh() -> None:
    record = open_record(made())
    assert record is not None
    assert not is_signed(record, suite_of(ALICE.seed, mesh_id_of(public_key_of(b"o" * 32))))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        bytes(64),
        bytes(65),
        spelled("things", b"k", b"v", 0, b"", False)[:-1],
        spelled("things", b"k", b"v", 0, b"", False) + b"\x00",
        spelled("things", b"k", b"v", 0, b"", False, 1),
        spelled("", b"k", b"v", 0, b"", False),
        spelled("c" * 65, b"k", b"v", 0, b"", False),
        spelled("things", b"", b"v", 0, b"", False),
        spelled("things", b"k" * 513, b"v", 0, b"", False),
        spelled("things", b"k", b"v" * 65537, 0, b"", False),
        spelled("things", b"k", b"v", -1, b"", False),
        spelled("things", b"k", b"v", 2**63, b"", False),
        spelled("things", b"k", b"v", 0, b"x" * 31, False),
        spelled("things", b"k", b"v", 0, b"x" * 33, False),
        spelled("things", b"k", b"v", 0, b"", True),
        spelled("things", b"k", b"v", 1.5, b"", False),
        spelled("things", b"k", b"v", 0, b"", 1),
        spelled(b"things", b"k", b"v", 0, b"", False),
        spelled({}, b"k", b"v", 0, b"", False),
        bytes(64) + b"\xdd\xff\xff\xff\xff",
        bytes(64) + b"\x91" * 5000,
        # 5 spelled in two bytes: the same record under another name, which a value that proves itself must not have.
        bytes(64) + b"\x96\xa6things\xc4\x01k\xc4\x01v\xcc\x05\xc4\x00\xc2",
    ],
)
def test_what_is_no_record(blob: bytes) -> None:
    assert open_record(blob) is None


def test_the_shortest_spelling_of_the_last_case_is_one() -> None:
    assert open_record(bytes(64) + b"\x96\xa6things\xc4\x01k\xc4\x01v\x05\xc4\x00\xc2") is not None


@given(st.binary(max_size=400))
def test_noise_is_no_record_and_raises_nothing(noise: bytes) -> None:
    for blob in (noise, made()[:64] + noise):
        record = open_record(blob)
        assert record is None or record.blob == blob


@given(st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_damaged_records_are_opened_or_refused_but_never_signed(at: int, noise: bytes) -> None:
    good = made(value=b"v" * 100)
    blob = good[:at] + noise + good[at + len(noise) :]
    record = open_record(blob)
    assert blob == good or record is None or not is_signed(record, ALICE.suite)


@given(st.binary(max_size=300))
def test_noise_is_no_message_and_raises_nothing_unforeseen(noise: bytes) -> None:
    decoder = msgspec.msgpack.Decoder(RecordMessage)
    for raw in (noise, bytes([0x94, *noise[:1]]) + noise):
        try:
            message = decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        assert decoder.decode(msgspec.msgpack.encode(message)) == message


@given(st.integers(0, 2**64 - 1), st.text("abc/-.", min_size=1, max_size=20))
def test_a_row_is_named_by_its_key(key_hash: int, name: str) -> None:
    assert row_id(row_key(RowId(name, key_hash))) == (name, key_hash)


def test_hashes_come_whole() -> None:
    assert unpack_hashes(bytes(8) + b"\xff" * 8 + b"rest") == [0, 2**64 - 1]


def test_keys_hash_apart_by_collection_author_and_mesh() -> None:
    here, there = key_hasher(MESH), key_hasher(mesh_id_of(public_key_of(b"o" * 32)))
    hashes = [here("a", b"bc", b""), here("ab", b"c", b""), here("a", b"c", b"b" * 32), there("a", b"bc", b"")]
    assert len(set(hashes)) == 4


def vectors() -> dict[str, Any]:
    """The vectors of tests/golden/records.json; run this file as a script to write them anew."""
    shapes: list[dict[str, Any]] = [
        {"collection": "settings", "key": b"color", "value": b"blue", "hlc": 1_800_000_000_000 << 16, "deleted": False},
        {"collection": "files/1", "key": "größe".encode(), "value": bytes(range(256)), "hlc": 7, "deleted": False},
        {"collection": "things", "key": b"\x00\xff", "value": b"", "hlc": 2**63 - 1, "deleted": True},
    ]
    key_hash = key_hasher(MESH)
    cases = []
    for shape in shapes:
        record = sign_record(ALICE.suite, ALICE.public_key, **shape)
        cases.append(_case(record.blob, key_hash(record.collection, record.key, b"")))
    plain = plain_record(collection="trust", key=b"node", value=b"a statement that proves itself")
    cases.append(_case(plain.blob, key_hash("trust", b"node", b"")))
    return {"mesh_id": MESH, "author_seed": ALICE.seed.hex(), "author": ALICE.node_id, "records": cases}


def _case(blob: bytes, key_hash: int) -> dict[str, Any]:
    record = open_record(blob)
    assert record is not None
    return {
        "collection": record.collection,
        "key": record.key.hex(),
        "value": record.value.hex(),
        "hlc": record.hlc,
        "deleted": record.deleted,
        "public_key": record.public_key.hex(),
        "record": blob.hex(),
        "version": f"{version_of(blob):016x}",
        "key_hash": f"{key_hash:016x}",
    }


def test_golden_vectors() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert vectors() == golden
    for case in golden["records"]:
        blob = bytes.fromhex(case["record"])
        # An independent decoder reads the same fields.
        fields = msgpack.unpackb(blob[64:], raw=False)
        assert fields[0] == case["collection"]
        assert [field.hex() for field in (fields[1], fields[2], fields[4])] == [
            case["key"],
            case["value"],
            case["public_key"],
        ]
        assert fields[3] == case["hlc"]
        assert blob[:64] == UNSIGNED or is_signed(open_record(blob), ALICE.suite)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(vectors(), indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
