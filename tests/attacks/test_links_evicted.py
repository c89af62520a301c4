"""Case 15: an evicted node with an open stream, a resumed session, or a certificate encoded anew.

Each attack is run against the node as it is, and once more with its one defence taken away, where it must succeed.
"""

import ssl
from pathlib import Path

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import certificate_public_key, issue_leaf
from meshnode.kernel.links import LinkFacts, PeerMethod
from meshnode.kernel.links.greeting import greet
from meshnode.kernel.links.tls import TlsStream
from protocol.effects import FrameReceived, LinkLost
from protocol.ids import NodeId
from protocol.wire.frames import Channel, HelloOk, Refused, encode_frame
from tests.kernel.links.world import Mesh, Node, Roster, Text, mesh, raw_connect, raw_hello, settle

ever_since_eviction_s = 5


async def echo(_peer: NodeId, params: Text) -> Text:
    return params


def evict(victim: Node, *others: Node, cut: bool = True) -> None:
    """What applying a tombstone does at each member."""
    for node in others:
        node.gate.evicted.add(victim.identity.public_key)
        if cut:
            node.links.cut(victim.node_id, "it was evicted")


@pytest.mark.parametrize("defended", [True, False])
async def test_an_evicted_nodes_open_connections_are_cut(tmp_path: Path, defended: bool) -> None:
    async with mesh(tmp_path) as m:
        evil, good = await m.add(), await m.add()
        evil.links.send(good.node_id, b"while a member")
        await good.until(FrameReceived)
        grant = good.links.grant_bulk(evil.node_id, "test")
        stream = await evil.links.open_bulk(good.node_id, grant.token, "test")
        theirs = await grant.accept()
        began = trio.current_time()
        evict(evil, good, cut=defended)
        if defended:
            assert not good.links.facts()
            assert good.links.bulk_streams == 0
            lost = await good.until(LinkLost)
            assert isinstance(lost, LinkLost)
            assert lost.reason == "it was evicted"
            with pytest.raises(MeshError):
                await theirs.receive_some()
            with pytest.raises(MeshError), trio.fail_after(ever_since_eviction_s):
                await stream.receive_some()
            assert trio.current_time() - began < ever_since_eviction_s
            evil.links.send(good.node_id, b"after the eviction")
            # Its own side: one link lost, one dial refused.
            await evil.until(LinkLost, count=2)
            assert good.frames() == [b"while a member"]
        else:
            evil.links.send(good.node_id, b"after the eviction")
            await good.until(FrameReceived, count=2)
            await stream.send_all(b"still flowing")
            assert await theirs.receive_some() == b"still flowing"
        stream.cut("done")
        theirs.cut("done")


async def test_an_evicted_node_is_told_so_when_it_comes_back(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        evil, good = await m.add(), await m.add(methods={"echo": PeerMethod(Text, echo)})
        evict(evil, good)
        with pytest.raises(MeshError) as caught:
            await evil.links.call(good.node_id, "echo", Text(), Text, timeout_s=5)
        assert caught.value.code is ErrorCode.EVICTED
        assert "evicted" in caught.value.message
        assert not good.events


async def test_it_is_shown_the_roots_word_about_it_and_nobody_else_is(tmp_path: Path) -> None:
    """One frame, to a key that TLS has proven, and only what is about that key."""
    async with mesh(tmp_path) as m:
        evil, good = await m.add(), await m.add(methods={"echo": PeerMethod(Text, echo)})
        good.gate.tombstones[evil.node_id] = b"the root's word"
        evict(evil, good)
        # A call by a service is refused; the machines hear of it all the same.
        with pytest.raises(MeshError):
            await evil.links.call(good.node_id, "echo", Text(), Text, timeout_s=5)
        lost = await evil.until(LinkLost)
        assert isinstance(lost, LinkLost)
        assert (lost.peer, lost.code, lost.tombstone) == (good.node_id, "evicted", b"the root's word")
        stranger = m.make_identity()
        stream = await raw_connect(good.address, m.client_context(stranger))
        try:
            # It names the evicted one, and still gets nothing: the key is the question.
            answer = await greet(stream, raw_hello(evil.identity))
        finally:
            stream.cut("done")
        assert isinstance(answer, Refused)
        assert (answer.code, answer.tombstone) == ("not_a_member", b"")


async def test_nobody_dials_an_evicted_node(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        evil, good = await m.add(methods={"echo": PeerMethod(Text, echo)}), await m.add()
        evict(evil, good)
        with pytest.raises(MeshError) as caught:
            await good.links.call(evil.node_id, "echo", Text(), Text, timeout_s=5)
        assert caught.value.code is ErrorCode.UNREACHABLE
        assert "evicted" in caught.value.message
        assert not evil.events


async def _knock(m: Mesh, evil: Node, good: Node, leaf: bytes) -> bool:
    """Connect with that leaf and send a frame; whether it was believed."""
    before = len(good.frames())
    stream = await raw_connect(good.address, m.client_context(evil.identity, leaf))
    try:
        answer = await greet(stream, raw_hello(evil.identity, boot=99))
        if isinstance(answer, Refused):
            assert answer.code == "evicted"
            return False
        assert isinstance(answer, HelloOk)
        await stream.send_all(encode_frame(Channel.MACHINES, b"after the eviction"))
        await good.until(FrameReceived, count=before + 1)
        return True
    finally:
        stream.cut("done")


class CertificateRoster(Roster):
    """The mistake: tombstones that remember certificates, seen through a list of those that stand."""

    def __init__(self, evicted_leaf: bytes) -> None:
        super().__init__()
        self.evicted_leaf = evicted_leaf
        self.shown = b""

    def admit(self, node_id: NodeId, public_key: bytes) -> MeshError | None:
        if self.shown == self.evicted_leaf:
            return MeshError(ErrorCode.EVICTED, "That certificate was evicted.")
        return None


@pytest.mark.parametrize("defended", [True, False])
async def test_a_certificate_encoded_anew_is_denied_by_its_key(
    tmp_path: Path, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mesh(tmp_path) as m:
        evil, good = await m.add(), await m.add()
        evict(evil, good)
        again = issue_leaf(m.root, evil.identity.public_key)
        assert again != evil.leaf
        assert certificate_public_key(again) == evil.identity.public_key
        if not defended:
            mistaken = CertificateRoster(evil.leaf)
            original = TlsStream.peer_key

            def look_at_bytes(stream: TlsStream) -> tuple[NodeId, bytes]:
                mistaken.shown = stream._tls.getpeercert(binary_form=True) or b""
                return original(stream)

            monkeypatch.setattr(TlsStream, "peer_key", look_at_bytes)
            good.gate.admit = mistaken.admit  # type: ignore[method-assign] # the defence taken away
        assert await _knock(m, evil, good, evil.leaf) is False
        assert await _knock(m, evil, good, again) is not defended
        assert bool(good.events) is not defended


@pytest.mark.parametrize("defended", [True, False])
async def test_a_session_from_before_the_eviction_cannot_be_resumed(tmp_path: Path, defended: bool) -> None:
    async with mesh(tmp_path) as m:
        evil, good = await m.add(), await m.add()
        if not defended:
            server = good.links._listener._context
            server.num_tickets = 2
            server.options &= ~ssl.OP_NO_TICKET
        context = m.client_context(evil.identity)
        if not defended:
            context.options &= ~ssl.OP_NO_TICKET
        first = await raw_connect(good.address, context)
        assert isinstance(await greet(first, raw_hello(evil.identity)), HelloOk)
        session = first._tls.session
        assert session is not None
        assert session.has_ticket is not defended
        evict(evil, good, cut=True)
        sock = trio.socket.socket()
        await sock.connect(tuple(good.address))
        second = TlsStream(sock, context, server_side=False)
        second._tls.session = session
        await second.handshake()
        # Even a resumed session meets the gate, which is asked by key every time: the second wall.
        assert second._tls.session_reused is not defended
        answer = await greet(second, raw_hello(evil.identity, boot=2))
        assert isinstance(answer, Refused)
        first.cut("done")
        second.cut("done")


@pytest.mark.parametrize("defended", [True, False])
async def test_an_eviction_between_handshake_and_hello_counts(tmp_path: Path, defended: bool) -> None:
    """The evicted node waits inside the handshake: cutting finds no connection of its, so the gate is asked again."""
    async with mesh(tmp_path) as m:
        evil, good = await m.add(), await m.add()
        asked = 0
        original = good.gate.admit

        def admit(node_id: NodeId, public_key: bytes) -> MeshError | None:
            nonlocal asked
            asked += 1
            if asked > 1 and not defended:
                return None
            return original(node_id, public_key)

        good.gate.admit = admit  # type: ignore[method-assign] # the seam of this test
        stream = await raw_connect(good.address, m.client_context(evil.identity))
        await settle(lambda: asked == 1)
        evict(evil, good)
        answer = await greet(stream, raw_hello(evil.identity))
        assert isinstance(answer, Refused if defended else HelloOk)
        facts: list[LinkFacts] = good.links.facts()
        assert len(facts) == (0 if defended else 1)
        stream.cut("done")


async def test_a_member_evicted_while_it_answers_a_dial_gets_no_link(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        evil, good = await m.add(), await m.add()
        original = good.links._dialler.introduce

        async def introduce_late(node_id, reached, hello):  # type: ignore[no-untyped-def] # the seam of this test
            evict(evil, good)
            return await original(node_id, reached, hello)

        good.links._dialler.introduce = introduce_late  # type: ignore[method-assign] # the seam of this test
        with pytest.raises(MeshError):
            await good.links.call(evil.node_id, "x", Text(), Text, timeout_s=5)
        assert not good.links.facts()
