"""The announcement's bytes: golden, round trip, and junk of every kind."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import MeshId, NodeId, mesh_id_of, node_id_of
from protocol.wire.announcement import (
    ANNOUNCEMENT_BYTES_MAX,
    Announcement,
    decode_announcement,
    encode_announcement,
)

NODE, MESH = node_id_of(bytes(32)), mesh_id_of(bytes(32))
GOLDEN = bytes.fromhex(
    "95 c404 6d657368 01c410 000102030405060708090a0b0c0d0e0fc414 000102030405060708090a0b0c0d0e0f10111213cd131d"
)


def test_the_golden_bytes() -> None:
    announcement = decode_announcement(GOLDEN)
    assert announcement == Announcement(
        MeshId("aaaqeayeaudaocajbifqydiob4"), NodeId("aaaqeayeaudaocajbifqydiob4ibceqt"), 4893
    )
    assert encode_announcement(announcement) == GOLDEN


def test_an_independent_decoder_reads_it() -> None:
    magic, version, mesh, node, port = msgpack.unpackb(encode_announcement(Announcement(MESH, NODE, 65_535)))
    assert (magic, version, len(mesh), len(node), port) == (b"mesh", 1, 16, 20, 65_535)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 65_535))
def test_round_trip_within_the_limit(key: bytes, port: int) -> None:
    announcement = Announcement(mesh_id_of(key), node_id_of(key), port)
    data = encode_announcement(announcement)
    assert len(data) <= ANNOUNCEMENT_BYTES_MAX
    assert decode_announcement(data) == announcement


@given(st.binary(max_size=200))
def test_junk_is_none_and_never_raises(data: bytes) -> None:
    assert decode_announcement(data) is None


@pytest.mark.parametrize(
    "fields",
    [
        [b"MESH", 1, bytes(16), bytes(20), 4893],
        [b"mesh", 0, bytes(16), bytes(20), 4893],
        [b"mesh", 1, bytes(15), bytes(20), 4893],
        [b"mesh", 1, bytes(16), bytes(21), 4893],
        [b"mesh", 1, bytes(16), bytes(20), 0],
        [b"mesh", 1, bytes(16), bytes(20), 65_536],
        [b"mesh", 1, bytes(16), bytes(20), "4893"],
        [b"mesh", 1, bytes(16), bytes(20)],
        [b"mesh", 1, bytes(16), bytes(20), 4893, bytes(60)],
        {"magic": b"mesh"},
    ],
)
def test_what_is_almost_an_announcement_is_none(fields: object) -> None:
    assert decode_announcement(msgpack.packb(fields)) is None


def test_a_later_version_may_append() -> None:
    assert decode_announcement(msgpack.packb([b"mesh", 2, bytes(16), bytes(20), 4893, "more"])) is not None
