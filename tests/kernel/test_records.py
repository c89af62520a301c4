"""Writing records: durable when it returns, and an error that says why when it is refused."""

from pathlib import Path

import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.records.collection import Collection, only_owner
from tests.support.record_mesh import record_mesh

THINGS = [Collection("things"), Collection("own", may_write=only_owner)]


async def test_a_record_is_taken_out_of_a_call_while_no_gossip_comes_through(tmp_path: Path) -> None:
    async with record_mesh(tmp_path, 2, THINGS) as mesh:
        first, second = mesh.members
        mesh.apart = True
        await first.writer.put("things", b"k", b"v")
        written = first.hub.records.get("things", b"k")
        assert written is not None
        assert second.hub.records.get("things", b"k") is None
        await second.writer.take(first.node_id, written.blob)
        taken = second.hub.records.get("things", b"k")
        assert taken is not None
        assert taken.blob == written.blob
        await second.writer.take(first.node_id, written.blob)  # the same again is no error


async def test_what_is_not_taken_says_why(tmp_path: Path) -> None:
    async with record_mesh(tmp_path, 2, THINGS) as mesh:
        first, second = mesh.members
        mesh.apart = True
        await first.writer.put("own", first.node_id.encode(), b"v")
        written = first.hub.records.get("own", first.node_id.encode())
        assert written is not None
        with pytest.raises(MeshError) as refused:
            await second.writer.take(first.node_id, written.blob[:-1] + b"!")
        assert (refused.value.code, refused.value.detail["reason"]) == (ErrorCode.CONFLICT, "malformed")
        broken = bytes([written.blob[0] ^ 1]) + written.blob[1:]
        with pytest.raises(MeshError) as refused:
            await second.writer.take(first.node_id, broken)
        assert refused.value.detail["reason"] == "bad_signature"
        assert second.hub.records.get("own", first.node_id.encode()) is None
