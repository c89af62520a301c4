"""Bulk streams: grants that work once, bytes that arrive whole, ends that are told apart, and cutting."""

import hashlib
from pathlib import Path

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkGrant, BulkStream
from protocol.wire.frames import encode_link_message
from tests.kernel.links.world import Mesh, Node, mesh, quick, raw_connect, raw_hello


async def opened(m: Mesh, a: Node, b: Node) -> tuple[BulkStream, BulkStream]:
    """A stream from a to b: a's end, b's end."""
    grant = b.links.grant_bulk(a.node_id, "test")
    ends: list[BulkStream] = []

    async def accept() -> None:
        ends.append(await grant.accept())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        mine = await a.links.open_bulk(b.node_id, grant.token, "test")
    return mine, ends[0]


async def fail_in_mid_transfer(stream: BulkStream) -> None:
    async with stream:
        await stream.send_all(b"half of it")
        raise RuntimeError("the disk failed in mid-transfer")


async def test_bytes_pass_whole_both_ways_at_once(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(), await m.add()
        mine, theirs = await opened(m, a, b)
        data = {0: bytes(range(256)) * 40_000, 1: bytes(reversed(range(256))) * 30_001}
        digests: dict[int, str] = {}

        async def send(stream: BulkStream, which: int) -> None:
            view, at = memoryview(data[which]), 0
            step = 1
            while at < len(view):
                await stream.send_all(view[at : at + step])
                at, step = at + step, step * 3
            await stream.send_eof()

        async def receive(stream: BulkStream, which: int) -> None:
            digest = hashlib.sha256()
            while piece := await stream.receive_some():
                digest.update(piece)
            digests[which] = digest.hexdigest()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, mine, 0)
                nursery.start_soon(receive, theirs, 0)
                nursery.start_soon(send, theirs, 1)
                nursery.start_soon(receive, mine, 1)
        assert digests == {which: hashlib.sha256(data[which]).hexdigest() for which in data}
        assert (a.links.bulk_streams, b.links.bulk_streams) == (1, 1)
        await mine.aclose()
        await theirs.aclose()
        assert (a.links.bulk_streams, b.links.bulk_streams) == (0, 0)
        # It was no control link.
        assert not a.events
        assert not b.events


async def test_a_proper_end_and_a_break_are_told_apart(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(), await m.add()
        mine, theirs = await opened(m, a, b)
        await mine.send_all(b"abc")
        await mine.aclose()
        assert await theirs.receive_some() == b"abc"
        assert await theirs.receive_some() == b""

        mine, theirs = await opened(m, a, b)
        with pytest.raises(RuntimeError, match="disk"):
            await fail_in_mid_transfer(mine)
        assert await theirs.receive_some() == b"half of it"
        with pytest.raises(MeshError) as caught:
            await theirs.receive_some()
        assert caught.value.code is ErrorCode.UNREACHABLE
        assert caught.value.retryable


async def test_a_grant_works_once_for_one_peer_one_purpose_and_a_short_time(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b, c = await m.add(), await m.add(), await m.add()

        async def refused(node: Node, token: bytes, purpose: str) -> None:
            with pytest.raises(MeshError) as caught:
                await node.links.open_bulk(b.node_id, token, purpose)
            assert caught.value.code is ErrorCode.FORBIDDEN

        def spent(grant: BulkGrant) -> bool:
            return grant.token not in b.links._grants._open

        grant = b.links.grant_bulk(a.node_id, "test")
        await refused(c, grant.token, "test")
        await refused(a, grant.token, "other")
        await refused(a, b"\0" * 16, "test")
        assert not spent(grant)
        stream = await a.links.open_bulk(b.node_id, grant.token, "test")
        assert spent(grant)
        await refused(a, grant.token, "test")
        async with await grant.accept() as theirs:
            await stream.send_all(b"x")
            assert await theirs.receive_some() == b"x"
        stream.cut("done")

        short = b.links.grant_bulk(a.node_id, "test", ttl_s=0.02)
        with pytest.raises(MeshError) as caught:
            await short.accept()
        assert caught.value.code is ErrorCode.TIMEOUT
        await refused(a, short.token, "test")


async def test_a_stream_that_nobody_accepts_any_more_is_cut(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(), await m.add()
        grant = b.links.grant_bulk(a.node_id, "test")
        stream = await a.links.open_bulk(b.node_id, grant.token, "test")
        grant.revoke()
        with pytest.raises(MeshError), trio.fail_after(5):
            await stream.receive_some()
        assert b.links.bulk_streams == 0


async def test_unused_grants_are_bounded(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(), await m.add(quick(grants_max=3))
        grants = [b.links.grant_bulk(a.node_id, "test", ttl_s=ttl) for ttl in (0.01, 5, 5)]
        with pytest.raises(MeshError) as caught:
            b.links.grant_bulk(a.node_id, "test")
        assert caught.value.code is ErrorCode.OVERLOADED
        await trio.sleep(0.02)
        b.links.grant_bulk(a.node_id, "test")
        grants[1].revoke()
        b.links.grant_bulk(a.node_id, "test")
        with pytest.raises(MeshError):
            b.links.grant_bulk(a.node_id, "test")


async def test_cutting_a_peer_cuts_its_streams_and_grants(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(), await m.add()
        mine, theirs = await opened(m, a, b)
        waiting = b.links.grant_bulk(a.node_id, "test")
        b.links.cut(a.node_id, "it was evicted")
        with pytest.raises(MeshError, match="it was evicted"):
            await theirs.receive_some()
        with pytest.raises(MeshError), trio.fail_after(5):
            await mine.receive_some()
        with pytest.raises(MeshError):
            await a.links.open_bulk(b.node_id, waiting.token, "test")
        assert b.links.bulk_streams == 0


async def test_a_reader_that_stops_breaks_the_stream_after_the_stall(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(quick(bulk_stall_s=0.2)), await m.add()
        mine, theirs = await opened(m, a, b)
        with pytest.raises(MeshError) as caught, trio.fail_after(10):
            await mine.send_all(bytes(64_000_000))
        assert "has not taken a byte" in caught.value.message
        theirs.cut("done")


async def test_data_before_the_answer_does_not_get_into_the_stream_of_another(tmp_path: Path) -> None:
    """A client that talks before HELLO_OK has those bytes refused with it, or finds them first in its own stream."""
    async with mesh(tmp_path) as m:
        a = await m.add()
        identity = m.make_identity()
        a.gate.members[identity.node_id] = identity.public_key
        grant = a.links.grant_bulk(identity.node_id, "test")
        stream = await raw_connect(a.address, m.client_context(identity))
        hello = raw_hello(identity, kind=1, grant=grant.token, purpose="test")
        await stream.send_all(encode_link_message(hello) + b"early bytes")
        theirs = await grant.accept()
        assert await theirs.receive_some() == b"early bytes"
        stream.cut("done")
        theirs.cut("done")
