"""Calls between real nodes over loopback: answers, errors, deadlines, cancellation, limits, and the end of links."""

from pathlib import Path

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import PeerMethod
from protocol.effects import LinkLost, LinkOpened
from protocol.ids import NodeId
from protocol.rpc.machine import RpcParams
from protocol.rpc.messages import RPC_BODY_BYTES_MAX
from tests.kernel.links.world import Node, Text, mesh, quick, raw_member, settle


async def echo(_peer: NodeId, params: Text) -> Text:
    return params


ECHO = {"echo": PeerMethod(Text, echo)}


async def test_a_call_opens_the_link_and_brings_the_answer(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(), await m.add(methods=ECHO)
        answer = await a.links.call(b.node_id, "echo", Text("hello", 3), Text, timeout_s=5)
        assert answer == Text("hello", 3)
        assert isinstance(await a.until(LinkOpened, b), LinkOpened)
        await b.until(LinkOpened, a)
        assert len(a.links.facts()) == len(b.links.facts()) == 1
        assert a.links.facts()[0].dialled
        assert not b.links.facts()[0].dialled
        assert a.book.remembered == [(b.node_id, b.address)]


async def test_a_thousand_calls_at_once_are_all_answered(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a, b = await m.add(methods=ECHO), await m.add(methods=ECHO)
        answers: set[tuple[NodeId, int]] = set()

        async def one(caller: Node, other: Node, number: int) -> None:
            got = await caller.links.call(other.node_id, "echo", Text(number=number), Text, timeout_s=30)
            answers.add((caller.node_id, got.number))

        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(one, a, b, number)
                nursery.start_soon(one, b, a, number)
        assert len(answers) == 2000
        assert len(a.links.facts()) == len(b.links.facts()) == 1


async def test_the_biggest_body_passes_and_one_byte_more_is_refused_at_once(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        got: list[int] = []

        async def size(_peer: NodeId, params: bytes) -> bytes:
            got.append(len(params))
            return params

        a, b = await m.add(), await m.add(methods={"size": PeerMethod(bytes, size)})
        body = bytes(RPC_BODY_BYTES_MAX - 5)
        assert await a.links.call(b.node_id, "size", body, bytes, timeout_s=10) == body
        with pytest.raises(MeshError) as caught:
            await a.links.call(b.node_id, "size", body + b"x", bytes, timeout_s=10)
        assert caught.value.code is ErrorCode.TOO_LARGE
        assert got == [len(body)]

        async def too_long(_peer: NodeId, params: int) -> bytes:
            return bytes(params)

        b.methods["long"] = PeerMethod(int, too_long)
        with pytest.raises(MeshError) as caught:
            await a.links.call(b.node_id, "long", RPC_BODY_BYTES_MAX, bytes, timeout_s=10)
        assert caught.value.code is ErrorCode.TOO_LARGE
        assert (await a.links.call(b.node_id, "size", b"still up", bytes, timeout_s=10)) == b"still up"


async def test_cancelling_the_caller_cancels_the_handler(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        began, ended = trio.Event(), trio.Event()

        async def hang(_peer: NodeId, _params: Text) -> None:
            began.set()
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        a, b = await m.add(), await m.add(methods={"hang": PeerMethod(Text, hang)} | ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: a.links.call(b.node_id, "hang", Text(), Text, timeout_s=60))
            with trio.fail_after(5):
                await began.wait()
            nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await ended.wait()
        await settle(lambda: b.links.open_invocations == 0)
        assert (await a.links.call(b.node_id, "echo", Text("x"), Text, timeout_s=5)).text == "x"


async def test_a_deadline_ends_the_call_here_and_the_handler_there(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        ended = trio.Event()

        async def hang(_peer: NodeId, _params: Text) -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        a, b = await m.add(), await m.add(methods={"hang": PeerMethod(Text, hang)})
        with pytest.raises(MeshError) as caught:
            await a.links.call(b.node_id, "hang", Text(), Text, timeout_s=0.2)
        assert caught.value.code is ErrorCode.TIMEOUT
        assert caught.value.retryable
        assert caught.value.detail["node_id"] == b.node_id
        with trio.fail_after(5):
            await ended.wait()
        await settle(lambda: b.links.open_invocations == 0)


async def test_errors_travel_with_code_message_and_detail(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:

        async def refuse(_peer: NodeId, params: Text) -> Text:
            if params.text == "bug":
                raise KeyError("secret-canary")
            raise MeshError(ErrorCode.DISK_FULL, "No room. Free some.", retryable=True, detail={"free": 3})

        a, b = await m.add(), await m.add(methods={"refuse": PeerMethod(Text, refuse)})
        with pytest.raises(MeshError) as caught:
            await a.links.call(b.node_id, "refuse", Text(), Text, timeout_s=5)
        assert (caught.value.code, caught.value.message, caught.value.retryable) == (
            ErrorCode.DISK_FULL,
            "No room. Free some.",
            True,
        )
        assert caught.value.detail == {"free": 3, "node_id": b.node_id, "method": "refuse"}
        with pytest.raises(MeshError) as caught:
            await a.links.call(b.node_id, "refuse", Text("bug"), Text, timeout_s=5)
        assert caught.value.code is ErrorCode.INTERNAL
        assert "canary" not in str(caught.value)
        assert any(level == "exception" for level, _, _ in b.log.records)
        with pytest.raises(MeshError) as caught:
            await a.links.call(b.node_id, "nothing.such", Text(), Text, timeout_s=5)
        assert caught.value.code is ErrorCode.UNKNOWN_METHOD
        assert "nothing.such" in caught.value.message
        with pytest.raises(MeshError) as caught:
            await a.links.call(b.node_id, "refuse", ["not", "a", "Text"], Text, timeout_s=5)
        assert caught.value.code is ErrorCode.BAD_REQUEST


async def test_a_peer_that_dies_in_mid_call_ends_the_call_at_once(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        began = trio.Event()

        async def hang(_peer: NodeId, _params: Text) -> None:
            began.set()
            await trio.sleep_forever()

        a, b = await m.add(), await m.add(methods={"hang": PeerMethod(Text, hang)})
        caught: list[MeshError] = []

        async def call() -> None:
            with pytest.raises(MeshError) as error:
                await a.links.call(b.node_id, "hang", Text(), Text, timeout_s=60)
            caught.append(error.value)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await began.wait()
                await b.stop()
        assert caught[0].code is ErrorCode.UNREACHABLE
        assert caught[0].retryable
        assert "may or may not" in caught[0].message
        lost = await a.until(LinkLost, b)
        assert isinstance(lost, LinkLost)
        assert "goodbye" in lost.reason
        # And now that nobody listens, the error names the address and says why.
        with pytest.raises(MeshError) as error:
            await a.links.call(b.node_id, "hang", Text(), Text, timeout_s=5)
        assert error.value.code is ErrorCode.UNREACHABLE
        assert str(a.book.known[b.node_id][0]) in error.value.message
        assert "connection refused" in error.value.message


async def test_a_peer_whose_sockets_vanish_in_mid_call_ends_the_call_at_once(tmp_path: Path) -> None:
    """What the kernel does for a process that was killed: no goodbye, only the end of the connection."""
    async with mesh(tmp_path) as m:
        a = await m.add()
        identity, stream = await raw_member(m, a)
        caught: list[MeshError] = []

        async def call() -> None:
            with pytest.raises(MeshError) as error:
                await a.links.call(identity.node_id, "hang", Text(), Text, timeout_s=60)
            caught.append(error.value)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                # The request is on its way.
                assert await stream.receive_some(1000)
                stream.cut("killed")
        assert caught[0].code is ErrorCode.UNREACHABLE
        assert "may or may not" in caught[0].message
        await a.until(LinkLost)


async def test_more_calls_than_the_limit_wait_their_turn(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        settings = quick(rpc=RpcParams(pending_max=4, serving_max=4))
        running, most, release = 0, 0, trio.Event()

        async def work(_peer: NodeId, params: Text) -> Text:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if running == 4:
                release.set()
            await release.wait()
            running -= 1
            return params

        a, b = await m.add(settings), await m.add(settings, methods={"work": PeerMethod(Text, work)})
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(lambda: a.links.call(b.node_id, "work", Text(), Text, timeout_s=10))
        assert most == 4


async def test_a_node_does_not_call_itself_and_unknown_nodes_are_named(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        a = await m.add()
        with pytest.raises(MeshError) as caught:
            await a.links.call(a.node_id, "echo", Text(), Text, timeout_s=5)
        assert caught.value.code is ErrorCode.BAD_REQUEST
        stranger = m.make_identity().node_id
        with pytest.raises(MeshError) as caught:
            await a.links.call(stranger, "echo", Text(), Text, timeout_s=5)
        assert caught.value.code is ErrorCode.UNREACHABLE
        assert stranger in caught.value.message
        assert caught.value.detail["tried"] == []


async def test_calls_fail_when_the_links_stop_or_do_not_run(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:

        async def hang(_peer: NodeId, _params: Text) -> None:
            await trio.sleep_forever()

        a, b = await m.add(), await m.add(methods={"hang": PeerMethod(Text, hang)})
        caught: list[MeshError] = []

        async def call() -> None:
            with pytest.raises(MeshError) as error:
                await a.links.call(b.node_id, "hang", Text(), Text, timeout_s=60)
            caught.append(error.value)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await settle(lambda: b.links.open_invocations == 1)
                await a.stop()
        assert caught[0].code is ErrorCode.UNREACHABLE
        with pytest.raises(MeshError) as error:
            await a.links.call(b.node_id, "hang", Text(), Text, timeout_s=5)
        assert error.value.code is ErrorCode.UNAVAILABLE
