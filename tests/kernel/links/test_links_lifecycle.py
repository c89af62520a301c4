"""How links open, survive, are replaced and end: between real nodes over loopback."""

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import IDLE, PeerMethod
from meshnode.kernel.links.tls import StreamBroken
from protocol.effects import FrameReceived, LinkLost, LinkOpened
from protocol.ids import Address, NodeId
from protocol.wire.frames import FRAME_PAYLOAD_BYTES_MAX, Ping, Versions, encode_link_message
from tests.kernel.links.world import LOOPBACK, Node, Text, introduce, mesh, quick, raw_member, settle


async def test_frames_arrive_whole_and_in_order_between_opened_and_lost(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(boot=7), await m.add(boot=9)
        sent = [bytes([i % 256]) * (i * 37 % 3000) for i in range(500)] + [bytes(FRAME_PAYLOAD_BYTES_MAX), b"last"]
        for payload in sent:
            a.links.send(b.node_id, payload)
        await b.until(FrameReceived, a, len(sent))
        assert b.frames() == sent
        await a.stop()
        await b.until(LinkLost, a)
        assert b.kinds() == ["opened"] + ["frame"] * len(sent) + ["lost"]
        assert b.events[0] == LinkOpened(a.node_id, 7)
        assert a.events[0] == LinkOpened(b.node_id, 9)
        with pytest.raises(ValueError, match="at most"):
            b.links.send(a.node_id, bytes(FRAME_PAYLOAD_BYTES_MAX + 1))


async def test_what_is_queued_when_the_agent_stops_is_still_sent(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(), await m.add()
        a.links.send(b.node_id, b"first")
        await b.until(FrameReceived, a)
        for number in range(100):
            a.links.send(b.node_id, b"%d" % number)
        await a.stop()
        await b.until(LinkLost, a)
        assert b.frames() == [b"first"] + [b"%d" % number for number in range(100)]


async def talk_at_once(one: Node, other: Node, jitter_s: float) -> None:
    async def call(number: int) -> None:
        await one.links.call(other.node_id, "work", Text(number=number), Text, timeout_s=10)

    await trio.sleep(jitter_s)
    one.links.send(other.node_id, b"frame")
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(call, number)


async def test_both_sides_dialling_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    """200 fresh pairs: both call at once with random jitter; one link survives, every call is done exactly once."""
    rng = random.Random(20)
    connections = 0
    async with mesh(tmp_path) as m:
        identities = (m.make_identity(), m.make_identity())
        for boot in range(1, 201):
            done: list[tuple[NodeId, int]] = []

            async def work(peer: NodeId, params: Text, done: list[tuple[NodeId, int]] = done) -> Text:
                done.append((peer, params.number))
                return params

            methods = {"work": PeerMethod(Text, work)}
            a = await m.add(identity=identities[0], methods=methods, boot=boot, known=False)
            b = await m.add(identity=identities[1], methods=methods, boot=boot, known=False)
            introduce(a, b)

            with trio.fail_after(15):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(talk_at_once, a, b, rng.choice((0, rng.uniform(0, 0.004))))
                    nursery.start_soon(talk_at_once, b, a, rng.choice((0, rng.uniform(0, 0.004))))
            assert sorted(done) == sorted([(x.node_id, n) for x in (a, b) for n in range(3)])
            await a.until(FrameReceived)
            await b.until(FrameReceived)
            assert a.kinds() == b.kinds() == ["opened", "frame"], boot
            assert a.links.facts()[0].dialled != b.links.facts()[0].dialled
            connections += a.links.facts()[0].dialled
            await a.stop()
            await b.stop()
    # Both directions won now and then, so the race was one.
    assert 0 < connections < 200


async def test_the_link_dialled_by_the_lower_id_survives_when_both_wait_for_an_answer(tmp_path: Path) -> None:
    """The exact crossing, forced: each side has sent HELLO before either reads the other's."""
    async with mesh(tmp_path) as m:
        a, b = await m.add(), await m.add()
        low, high = sorted((a, b), key=lambda node: node.node_id)
        both_greeting, dialler = trio.Event(), {n.node_id: n.links._dialler for n in (a, b)}
        waiting = 0
        for node in (a, b):
            original = dialler[node.node_id].introduce

            # Untyped: it stands in for whatever the method's type is.
            async def introduce_late(node_id, reached, hello, original=original):  # type: ignore[no-untyped-def]
                nonlocal waiting
                waiting += 1
                if waiting == 2:
                    both_greeting.set()
                await both_greeting.wait()
                return await original(node_id, reached, hello)

            dialler[node.node_id].introduce = introduce_late  # type: ignore[method-assign] # the seam of this test
        low.links.send(high.node_id, b"from low")
        high.links.send(low.node_id, b"from high")
        await low.until(FrameReceived)
        await high.until(FrameReceived)
        assert low.kinds() == high.kinds() == ["opened", "frame"]
        assert low.links.facts()[0].dialled


async def test_a_peer_that_restarted_replaces_its_old_link(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        identity = m.make_identity()
        a, old = await m.add(), await m.add(identity=identity, boot=5)
        a.links.send(old.node_id, b"1")
        await old.until(FrameReceived)
        # The old process hangs: its sockets stay open and say nothing.
        new = await m.add(identity=identity, boot=6, known=False)
        introduce(a, new)
        new.links.send(a.node_id, b"2")
        await a.until(FrameReceived, new)
        assert a.kinds() == ["opened", "lost", "opened", "frame"]
        assert [e.boot for e in a.events if isinstance(e, LinkOpened)] == [5, 6]
        assert len(a.links.facts()) == 1
        # Whoever still holds the older boot is not let back in over the newer one.
        old.links.send(a.node_id, b"3")
        await old.until(LinkLost, a, 2)
        assert [e.data for e in a.events if isinstance(e, FrameReceived)] == [b"2"]


async def test_an_idle_link_is_hung_up_by_agreement_and_no_frame_is_lost(tmp_path: Path) -> None:
    settings = quick(link_idle_s=0.05, ping_interval_s=0.01)
    async with mesh(tmp_path) as m:
        a, b = await m.add(settings), await m.add(settings)
        rng = random.Random(5)
        sent = {a.node_id: 0, b.node_id: 0}

        async def talk(one: Node, other: Node) -> None:
            # Pauses around the idle time: many frames meet a link that is just being hung up.
            for number in range(60):
                one.links.send(other.node_id, b"%d" % number)
                sent[one.node_id] += 1
                await trio.sleep(rng.uniform(0.0, 0.12))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, a, b)
            nursery.start_soon(talk, b, a)
        for one, other in ((a, b), (b, a)):
            await other.until(FrameReceived, one, sent[one.node_id])
            assert other.frames() == [b"%d" % number for number in range(60)]
        await settle(lambda: not a.links.facts() and not b.links.facts())
        lost = [e for e in a.events if isinstance(e, LinkLost)]
        assert len(lost) >= 3
        assert {e.reason for e in lost} == {IDLE}


async def test_a_link_in_use_by_a_call_is_not_idle(tmp_path: Path) -> None:
    settings = quick(link_idle_s=0.03, ping_interval_s=0.01)
    async with mesh(tmp_path) as m:

        async def slow(_peer: NodeId, params: Text) -> Text:
            await trio.sleep(0.3)
            return params

        a, b = await m.add(settings), await m.add(settings, methods={"slow": PeerMethod(Text, slow)})
        await a.links.call(b.node_id, "slow", Text(), Text, timeout_s=5)
        assert a.kinds() == ["opened"]


async def test_a_peer_that_goes_silent_is_noticed(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a = await m.add(quick(ping_interval_s=0.05, missed_pings_max=2))
        _, stream = await raw_member(m, a)
        lost = await a.until(LinkLost)
        assert isinstance(lost, LinkLost)
        assert "silent" in lost.reason
        assert a.kinds() == ["opened", "lost"]
        stream.cut("done")


async def test_an_offer_to_hang_up_that_is_never_answered_ends_the_link(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a = await m.add(quick(ping_interval_s=0.02, missed_pings_max=2, link_idle_s=0.05))
        _, stream = await raw_member(m, a)

        async def answer_pings_only() -> None:
            with contextlib.suppress(StreamBroken):
                while True:
                    await stream.send_all(encode_link_message(Ping(1)))
                    await trio.sleep(0.01)

        m.nursery.start_soon(answer_pings_only)
        await a.until(LinkLost)
        assert not a.links.facts()


async def test_probing_keeps_a_quiet_link_up(tmp_path: Path) -> None:
    settings = quick(ping_interval_s=0.02, missed_pings_max=1)
    async with mesh(tmp_path) as m:
        a, b = await m.add(settings), await m.add(settings)
        a.links.send(b.node_id, b"x")
        await b.until(FrameReceived)
        await trio.sleep(0.4)
        assert a.kinds() == ["opened"]
        assert b.kinds() == ["opened", "frame"]


async def test_a_driver_that_is_behind_makes_the_peer_wait_and_loses_nothing(tmp_path: Path) -> None:
    settings = quick(ping_interval_s=0.05, missed_pings_max=1, queue_bytes_max=64 * 1024 * 1024)
    async with mesh(tmp_path) as m:
        a, b = await m.add(settings), await m.add(settings, collect=False, events_max=0)
        for number in range(40):
            a.links.send(b.node_id, bytes([number]) * 500_000)
        await trio.sleep(0.5)
        m.nursery.start_soon(b.collect)
        await b.until(FrameReceived, a, 40)
        assert b.frames() == [bytes([number]) * 500_000 for number in range(40)]
        assert a.kinds() == ["opened"]


async def test_a_slow_reader_costs_the_link_when_the_machines_queue_overflows(tmp_path: Path) -> None:
    settings = quick(queue_bytes_max=1_000_000)
    async with mesh(tmp_path) as m:
        a, b = await m.add(settings), await m.add(settings, collect=False, events_max=0)
        for _ in range(200):
            a.links.send(b.node_id, bytes(300_000))
            await trio.sleep(0.001)
            if any(isinstance(e, LinkLost) for e in a.events):
                break
        lost = await a.until(LinkLost, b)
        assert isinstance(lost, LinkLost)
        assert "1000000 bytes wait" in lost.reason
        outbox = a.links._pool._peer(b.node_id).outbox
        assert outbox.queued_bytes <= 1_000_000


async def test_callers_wait_for_a_slow_reader_instead(tmp_path: Path) -> None:
    settings = quick(queue_bytes_max=1_000_000)
    async with mesh(tmp_path) as m:

        async def size(_peer: NodeId, params: bytes) -> int:
            return len(params)

        a, b = await m.add(settings), await m.add(settings, methods={"size": PeerMethod(bytes, size)})
        most = 0
        outbox = a.links._pool._peer(b.node_id).outbox

        async def one() -> None:
            nonlocal most
            assert await a.links.call(b.node_id, "size", bytes(400_000), int, timeout_s=20) == 400_000
            most = max(most, outbox.queued_bytes)

        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(one)
        assert most <= 1_000_000


async def test_a_peer_of_an_incompatible_version_is_named_and_not_dialled_again_and_again(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a = await m.add(quick(versions=Versions(1, 1)))
        b = await m.add(quick(versions=Versions(2, 3)))
        with pytest.raises(MeshError) as caught:
            await a.links.call(b.node_id, "x", Text(), Text, timeout_s=5)
        assert caught.value.code is ErrorCode.INCOMPATIBLE_VERSION
        assert not caught.value.retryable
        assert "2 to 3" in caught.value.message
        assert "version 1" in caught.value.message or "other 1" in caught.value.message
        assert (caught.value.detail["version_min"], caught.value.detail["version_max"]) == (2, 3)
        attempts = a.links._pool.attempt
        for _ in range(20):
            a.links.send(b.node_id, b"again")
        await a.until(LinkLost, b, 20)
        assert a.links._pool.attempt == attempts
        assert not a.links.facts()
        assert not any(isinstance(e, LinkOpened) for e in a.events + b.events)


@pytest.mark.parametrize(("max_", "code"), [(3, "incompatible_version"), (1, "not_a_member")])
async def test_who_is_a_stranger_to_a_peer_learns_if_versions_are_why(tmp_path: Path, max_: int, code: str) -> None:
    """Who was admitted while that peer spoke another version is one to it for as long as it does."""
    async with mesh(tmp_path) as m:
        a, b = await m.add(quick(versions=Versions(1, 1))), await m.add(quick(versions=Versions(max_, max_)))
        del b.gate.members[a.node_id]
        a.links.send(b.node_id, b"hello")
        lost = await a.until(LinkLost, b)
        assert isinstance(lost, LinkLost)
        assert (lost.code, "speaks protocol version 1, the other 3" in lost.reason) == (code, max_ == 3)


async def test_addresses_are_raced_past_a_black_hole(tmp_path: Path) -> None:
    """One address swallows everything, one refuses, one is somebody else; the fourth works, and first the next time."""
    async with mesh(tmp_path) as m:
        a, b, c = await m.add(quick(stagger_s=0.05)), await m.add(), await m.add()
        with trio.socket.socket() as hole:
            # A listener whose queue is full answers no SYN: a black hole on loopback.
            await hole.bind((LOOPBACK, 0))
            hole.listen(0)
            fill = [trio.socket.socket() for _ in range(4)]
            black = Address(LOOPBACK, hole.getsockname()[1])
            async with trio.open_nursery() as nursery:
                for sock in fill:
                    nursery.start_soon(_try_to_connect, sock, black)
                await trio.sleep(0.05)
                closed = Address(LOOPBACK, 1)
                a.book.known[b.node_id] = [black, closed, c.address, b.address]
                began = trio.current_time()
                a.links.send(b.node_id, b"x")
                await b.until(FrameReceived, a)
                took = trio.current_time() - began
                nursery.cancel_scope.cancel()
            for sock in fill:
                sock.close()
        assert took < 2
        assert a.book.remembered == [(b.node_id, b.address)]
        a.links.cut(b.node_id, "to dial again")
        addresses = a.book.known[b.node_id]
        tried: list[Address] = []
        original = a.links._dialler._connect

        async def note(address: Address, expected: NodeId):  # type: ignore[no-untyped-def] # the seam of this test
            tried.append(address)
            return await original(address, expected)

        a.links._dialler._connect = note  # type: ignore[method-assign] # the seam of this test
        a.links.send(b.node_id, b"y")
        await b.until(FrameReceived, a, 2)
        assert tried[0] == b.address
        assert addresses[0] == black


async def _try_to_connect(sock: trio.socket.SocketType, address: Address) -> None:
    await sock.connect(tuple(address))


async def test_the_error_names_every_address_and_why_it_failed(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a = await m.add(quick(handshake_s=0.4, stagger_s=0.02))
        b, c = await m.add(known=False), await m.add()
        async with trio.open_nursery() as nursery:
            mute = await trio.open_tcp_listeners(0, host=LOOPBACK)
            nursery.start_soon(trio.serve_listeners, _say_nothing, mute)
            talker = await trio.open_tcp_listeners(0, host=LOOPBACK)
            nursery.start_soon(trio.serve_listeners, _speak_http, talker)
            half_open = Address(LOOPBACK, mute[0].socket.getsockname()[1])
            web = Address(LOOPBACK, talker[0].socket.getsockname()[1])
            closed = Address(LOOPBACK, 1)
            name = Address("not-an-ip.invalid", 4893)
            a.book.known[b.node_id] = [half_open, web, closed, c.address, name]
            a.gate.members[b.node_id] = b.identity.public_key
            with pytest.raises(MeshError) as caught:
                await a.links.call(b.node_id, "x", Text(), Text, timeout_s=5)
            nursery.cancel_scope.cancel()
        assert caught.value.code is ErrorCode.UNREACHABLE
        tried: Any = caught.value.detail["tried"]
        why = {item["address"]: item["why"] for item in tried}
        assert list(why) == [str(x) for x in (half_open, web, closed, c.address, name)]
        assert why[str(half_open)] == "it accepts connections but does not speak TLS within 0.4 s"
        assert "TLS 1.3 failed" in why[str(web)]
        assert "connection refused" in why[str(closed)]
        assert c.node_id in why[str(c.address)]
        assert "not an IP address" in why[str(name)]
        for address in why:
            assert address in caught.value.message


async def _say_nothing(_stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def _speak_http(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await trio.sleep_forever()


async def test_a_node_that_can_be_dialled_but_cannot_dial_is_still_linked(tmp_path: Path) -> None:
    """The lower id's dials go nowhere: they must not keep refusing the higher id's, which work."""
    async with mesh(tmp_path) as m:
        a, b = await m.add(quick(handshake_s=0.5)), await m.add(quick(handshake_s=0.5))
        low, high = sorted((a, b), key=lambda node: node.node_id)
        async with trio.open_nursery() as nursery:
            mute = await trio.open_tcp_listeners(0, host=LOOPBACK)
            nursery.start_soon(trio.serve_listeners, _say_nothing, mute)
            low.book.known[high.node_id] = [Address(LOOPBACK, mute[0].socket.getsockname()[1])]
            low.links.send(high.node_id, b"from low")
            await trio.sleep(0.1)
            high.links.send(low.node_id, b"from high")
            await low.until(FrameReceived)
            await high.until(FrameReceived)
            nursery.cancel_scope.cancel()
        assert low.kinds() == high.kinds() == ["opened", "frame"]


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a = await m.add()
        with pytest.raises(MeshError) as caught:
            await m.add(quick(port=a.address.port))
        assert caught.value.code is ErrorCode.PORT_IN_USE
        assert str(a.address.port) in caught.value.message
        with pytest.raises(MeshError) as caught:
            await m.add(quick(host="192.0.2.1"))
        assert caught.value.code is ErrorCode.BAD_SETTING


async def test_ipv6_alone_is_enough(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        try:
            a, b = await m.add(quick(host="::1")), await m.add(quick(host="::1"))
        except MeshError:
            pytest.skip("this machine has no IPv6 loopback")
        assert a.links.port is not None
        assert b.links.port is not None
        a.book.known[b.node_id] = [Address("::1", b.links.port)]
        a.links.send(b.node_id, b"x")
        await b.until(FrameReceived, a)


async def test_stopping_takes_no_longer_than_the_deadline_with_a_peer_that_never_reads(tmp_path: Path) -> None:
    settings = quick(close_s=0.3, queue_bytes_max=64 * 1024 * 1024)
    async with mesh(tmp_path) as m:
        a, b = await m.add(settings), await m.add(settings, collect=False, events_max=0)
        for _ in range(60):
            a.links.send(b.node_id, bytes(1_000_000))
        await a.until(LinkOpened, b)
        await trio.sleep(0.2)
        began = trio.current_time()
        await a.stop()
        assert trio.current_time() - began < 1
