"""Case 7, and hostile frames: too large a frame is refused before it is kept; nothing sent by a member stops a node."""

import contextlib
import itertools
import os
import random
import tracemalloc
from pathlib import Path

import msgspec
import pytest
import trio
import trio.lowlevel

from meshnode.kernel.links import PeerMethod
from meshnode.kernel.links import connection as connection_module
from meshnode.kernel.links.tls import StreamBroken
from protocol.effects import LinkLost
from protocol.ids import NodeId
from protocol.rpc.messages import Cancel, Failure, Reply, Request, encode_rpc
from protocol.wire.frames import (
    HELLO_FRAME_BYTES_MAX,
    Channel,
    Farewell,
    IdleAgree,
    IdleDecline,
    IdleOffer,
    Ping,
    Pong,
    encode_frame,
    encode_link_message,
)
from tests.kernel.links.world import Text, mesh, quick, raw_connect, raw_hello, raw_member, settle

MIB = 1024 * 1024


async def echo(_peer: NodeId, params: Text) -> Text:
    return params


@pytest.mark.parametrize("defended", [True, False])
async def test_an_oversized_frame_is_refused_before_it_is_kept(
    tmp_path: Path, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not defended:
        monkeypatch.setattr(connection_module, "FRAME_BYTES_MAX", 2**32)
    async with mesh(tmp_path) as m:
        node = await m.add()
        _, stream = await raw_member(m, node)
        await settle(lambda: node.kinds() == ["opened"])
        piece = bytes(MIB)
        tracemalloc.start()
        try:
            sent = 0
            try:
                await stream.send_all((2**31).to_bytes(4, "big"))
                for _ in range(48):
                    await stream.send_all(piece)
                    sent += len(piece)
                    await trio.lowlevel.checkpoint()
            except StreamBroken:
                pass
            if defended:
                await node.until(LinkLost)
            else:
                await settle(lambda: tracemalloc.get_traced_memory()[1] > 40 * MIB)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        if defended:
            lost = await node.until(LinkLost)
            assert isinstance(lost, LinkLost)
            assert "2147483648 bytes was announced" in lost.reason
            # Both ends live in this process; what is left is their socket-sized pieces.
            assert peak < 4 * MIB
        else:
            assert node.kinds() == ["opened"]


async def test_before_hello_even_less_is_kept(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        node, member = await m.add(), m.make_identity()
        node.gate.members[member.node_id] = member.public_key
        stream = await raw_connect(node.address, m.client_context(member))
        await stream.send_all((HELLO_FRAME_BYTES_MAX + 1).to_bytes(4, "big"))
        await settle(lambda: node.links.refused == {"protocol": 1})
        stream.cut("done")
        assert not node.events


async def test_a_peer_that_asks_without_reading_the_answers_fills_nothing(tmp_path: Path) -> None:
    """Pings, offers and calls in a flood: what is owed to a peer that never reads is bounded."""
    async with mesh(tmp_path) as m:
        node = await m.add(
            quick(write_stall_s=0.5, queue_bytes_max=MIB),
            methods={"echo": PeerMethod(Text, echo)},
        )
        _, stream = await raw_member(m, node)
        await settle(lambda: node.kinds() == ["opened"])
        flood = encode_link_message(Ping(1)) + encode_link_message(IdleOffer())
        body = b"\x93\xa0\x00\xc5\xff\xff" + bytes(65535)
        tracemalloc.start()
        try:
            with contextlib.suppress(StreamBroken), trio.fail_after(20):
                for number in itertools.count(1):
                    request = encode_frame(Channel.RPC, encode_rpc(Request(number, "echo", 60_000, _text(body))))
                    await stream.send_all(flood * 20 + request)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        await node.until(LinkLost)
        await settle(lambda: node.links.open_invocations == 0)
        # 128 open calls of 64 KiB each, in and out, and the queue of 1 MiB.
        assert peak < 40 * MIB


def _text(data: bytes) -> bytes:
    return msgspec.msgpack.encode(Text(data=data))


def hostile(rng: random.Random) -> bytes:
    """One seeded piece of nonsense, most of it almost right."""
    templates = [
        encode_link_message(Ping(rng.randrange(2**40))),
        encode_link_message(Pong(3)),
        encode_link_message(IdleOffer()),
        encode_link_message(IdleAgree()),
        encode_link_message(IdleDecline()),
        encode_link_message(Farewell("bye\r\n\x1b[31m")),
        encode_frame(Channel.RPC, encode_rpc(Request(rng.randrange(1, 50), "echo", 1000, _text(b"x")))),
        encode_frame(Channel.RPC, encode_rpc(Request(rng.randrange(1, 50), "no.such", 0, b"\xc1"))),
        encode_frame(Channel.RPC, encode_rpc(Reply(rng.randrange(1, 5), b""))),
        encode_frame(Channel.RPC, encode_rpc(Failure(rng.randrange(1, 5), "\0", "\x1b", True, b"{"))),
        encode_frame(Channel.RPC, encode_rpc(Cancel(rng.randrange(1, 50)))),
        encode_frame(Channel.RPC, b"\x95\x01\x01" + b"\x91" * 3000),
        encode_frame(Channel.LINK, b"\xdd\xff\xff\xff\xff"),
        encode_frame(Channel.MACHINES, rng.randbytes(rng.randrange(60))),
        b"\x00\x00\x00\x01\x07",
        rng.randbytes(rng.randrange(1, 60)),
    ]
    data = bytearray(rng.choice(templates))
    for _ in range(rng.choice((0, 0, 1, 3))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


async def test_two_thousand_hostile_frames_neither_stop_the_node_nor_leak(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        node, friend = await m.add(methods={"echo": PeerMethod(Text, echo)}), await m.add()
        identity = m.make_identity()
        node.gate.members[identity.node_id] = identity.public_key
        context = m.client_context(identity)
        await friend.links.call(node.node_id, "echo", Text("before"), Text, timeout_s=5)
        tasks, descriptors = _tasks(), _descriptors()
        rng = random.Random(2_000)
        sent = 0
        for attempt in range(400):
            stream = await raw_connect(node.address, context)
            try:
                hello = bytearray(encode_link_message(raw_hello(identity, attempt=attempt, boot=5)))
                if rng.random() < 0.2:
                    hello[rng.randrange(len(hello))] = rng.randrange(256)
                await stream.send_all(hello + b"".join(hostile(rng) for _ in range(5)))
                sent += 5
                if rng.random() < 0.5:
                    await stream.receive_some(4096)
            except StreamBroken:
                pass
            finally:
                stream.cut("done")
        assert sent >= 1_900
        answer = await friend.links.call(node.node_id, "echo", Text("after"), Text, timeout_s=5)
        assert answer.text == "after"
        await settle(lambda: _tasks() <= tasks and _descriptors() <= descriptors, within_s=15)
        assert node.links.open_invocations == 0
        assert len(node.links.facts()) == 1
        assert not [record for record in node.log.records if record[0] == "exception"]


def _tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def _descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
