"""Case 16: a client with a bad certificate, none, another mesh's, or somebody else's name. No application byte counts.

Each attack is run against the node as it is, and once more with its one defence taken away, where it must succeed.
"""

import contextlib
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import NodeIdentity, found_root, issue_leaf, root_certificate, root_from_seed
from meshnode.kernel.links import PeerMethod, make_contexts
from meshnode.kernel.links import dial as dial_module
from meshnode.kernel.links.greeting import greet
from meshnode.kernel.links.tls import StreamBroken, TlsStream
from protocol.effects import LinkOpened
from protocol.ids import Address, NodeId, node_id_of
from protocol.wire.frames import Channel, HelloOk, Refused, encode_frame, encode_link_message
from tests.kernel.links.world import Mesh, Node, Text, mesh, quick, raw_connect, raw_hello, settle


async def believed(node: Node, context: ssl.SSLContext, identity: NodeIdentity, **hello: Any) -> bool:
    """Send everything at once, as an attacker would: HELLO, a frame, a call. Whether any of it was believed."""
    hellos: list[object] = []
    original = node.links._listener._reception.receive

    async def note(*args: Any) -> bool:
        hellos.append(args[3])
        return await original(*args)

    node.links._listener._reception.receive = note  # type: ignore[method-assign,assignment] # counts the HELLOs that count
    refused = sum(node.links.refused.values())
    stream: TlsStream | None = None
    try:
        stream = await raw_connect(node.address, context)
        everything = encode_link_message(raw_hello(identity, **hello)) + encode_frame(Channel.MACHINES, b"believe me")
        await stream.send_all(everything)
    except StreamBroken:
        # Refused in the middle of it.
        pass
    await settle(lambda: node.frames() or sum(node.links.refused.values()) > refused)
    if stream is not None:
        stream.cut("done")
    node.links._listener._reception.receive = original  # type: ignore[method-assign] # as it was
    if node.frames():
        return True
    assert not hellos
    assert not node.events
    assert not node.links.facts()
    return False


def bare_client() -> ssl.SSLContext:
    """A TLS client that shows no certificate and checks none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def client_of_another_root(m: Mesh, identity: NodeIdentity) -> ssl.SSLContext:
    """A certificate for that key from another mesh's root, shown to this mesh's nodes."""
    root = found_root()
    context = make_contexts(identity, issue_leaf(root, identity.public_key), root_certificate(root)).client
    context.load_verify_locations(cadata=root_certificate(m.root))
    return context


@pytest.mark.parametrize("defended", [True, False])
async def test_a_client_without_a_certificate(tmp_path: Path, defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with mesh(tmp_path) as m:
        node, member = await m.add(), await m.add()
        if not defended:
            node.links._listener._context.verify_mode = ssl.CERT_OPTIONAL
            assert not await believed(node, bare_client(), member.identity)
            # The second wall: without a key proven, no name is believed. Only with that gone as well it is.
            claimed = (member.node_id, member.identity.public_key)
            monkeypatch.setattr(TlsStream, "peer_key", lambda _stream: claimed)
        assert await believed(node, bare_client(), member.identity) is not defended
        if defended:
            assert node.links.refused == {"tls": 1}


@pytest.mark.parametrize("defended", [True, False])
async def test_a_members_key_with_a_certificate_from_another_root(tmp_path: Path, defended: bool) -> None:
    """Only TLS stands here: the gate would admit this key."""
    async with mesh(tmp_path) as m:
        node, member = await m.add(), await m.add()
        context = client_of_another_root(m, member.identity)
        if not defended:
            strange_root = found_root()
            context = make_contexts(
                member.identity,
                issue_leaf(strange_root, member.identity.public_key),
                root_certificate(strange_root),
            ).client
            context.load_verify_locations(cadata=root_certificate(m.root))
            node.links._listener._context.load_verify_locations(cadata=root_certificate(strange_root))
        assert await believed(node, context, member.identity) is not defended


@pytest.mark.parametrize("defended", [True, False])
async def test_a_certificate_of_this_root_whose_key_is_on_no_roster(tmp_path: Path, defended: bool) -> None:
    """Only the gate stands here: TLS would accept this certificate."""
    async with mesh(tmp_path) as m:
        node, stranger = await m.add(), m.make_identity()
        if not defended:
            node.gate.admit = lambda node_id, public_key: None  # type: ignore[method-assign] # the defence taken away
        context = m.client_context(stranger)
        assert await believed(node, context, stranger) is not defended
        if defended:
            assert node.links.refused == {"not_a_member": 1}


@pytest.mark.parametrize("defended", [True, False])
async def test_a_member_that_says_it_is_another(
    tmp_path: Path, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mesh(tmp_path) as m:
        node, liar, victim = await m.add(), await m.add(), await m.add()
        context = m.client_context(liar.identity)
        if not defended:
            claimed = (victim.node_id, victim.identity.public_key)
            monkeypatch.setattr(TlsStream, "peer_key", lambda _stream: claimed)
        assert await believed(node, context, victim.identity) is not defended
        if not defended:
            assert [event.peer for event in node.events] == [victim.node_id] * len(node.events)


async def test_a_leaf_cannot_sign_another_leaf(tmp_path: Path) -> None:
    """A member that issues certificates with its own key, as if it were a root below the root."""
    async with mesh(tmp_path) as m:
        node, member = await m.add(), await m.add()
        stranger = m.make_identity()
        node.gate.members[stranger.node_id] = stranger.public_key
        forged = issue_leaf(root_from_seed(member.identity.seed), stranger.public_key)
        context = m.client_context(stranger, forged)
        chain = tmp_path / "chain.pem"
        chain.write_text(ssl.DER_cert_to_PEM_cert(forged) + ssl.DER_cert_to_PEM_cert(member.leaf))
        context.load_cert_chain(chain, stranger.key_path)
        assert not await believed(node, context, stranger)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_nothing_older_than_tls_1_3_is_spoken(tmp_path: Path, version: ssl.TLSVersion) -> None:
    async with mesh(tmp_path) as m:
        node, member = await m.add(), await m.add()
        context = m.client_context(member.identity)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = version
        assert await believed(node, context, member.identity) is (version is ssl.TLSVersion.TLSv1_3)


@pytest.mark.parametrize("defended", [True, False])
async def test_a_member_that_answers_at_anothers_address(
    tmp_path: Path, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member took over another's address: what was meant for the other must not be told to it."""
    async with mesh(tmp_path) as m:
        heard: list[str] = []

        async def listen(_peer: NodeId, params: Text) -> Text:
            heard.append(params.text)
            return params

        caller, liar = await m.add(), await m.add(methods={"tell": PeerMethod(Text, listen)})
        victim = await m.add()
        caller.book.known[victim.node_id] = [liar.address]
        if not defended:
            monkeypatch.setattr(dial_module, "_check_peer", lambda _stream, _expected, _gate: None)
            await caller.links.call(victim.node_id, "tell", Text("a secret"), Text, timeout_s=5)
            assert heard == ["a secret"]
            return
        with pytest.raises(MeshError) as caught:
            await caller.links.call(victim.node_id, "tell", Text("a secret"), Text, timeout_s=5)
        assert caught.value.code is ErrorCode.UNREACHABLE
        assert liar.node_id in caught.value.message
        assert heard == []


async def test_a_client_believes_nothing_before_hello_ok(tmp_path: Path) -> None:
    """Under TLS 1.3 a client's handshake succeeds although the server refuses it; a liar may even send frames."""
    async with mesh(tmp_path) as m:
        caller = await m.add()
        liar = m.make_identity()
        caller.gate.members[liar.node_id] = liar.public_key
        server = make_contexts(liar, issue_leaf(m.root, liar.public_key), root_certificate(m.root)).server

        async def answer(transport: trio.SocketStream) -> None:
            stream = TlsStream(transport.socket, server, server_side=True)
            try:
                await stream.handshake()
                await stream.send_all(encode_frame(Channel.MACHINES, b"believe me"))
                await stream.receive_some(1000)
                await trio.sleep_forever()
            except StreamBroken:
                pass
            finally:
                stream.cut("done")

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        m.nursery.start_soon(trio.serve_listeners, answer, listeners)
        caller.book.known[liar.node_id] = [Address("127.0.0.1", listeners[0].socket.getsockname()[1])]
        with pytest.raises(MeshError) as caught:
            await caller.links.call(liar.node_id, "x", Text(), Text, timeout_s=5)
        assert caught.value.code is ErrorCode.UNREACHABLE
        assert "before HELLO" in caught.value.message
        assert not any(isinstance(event, LinkOpened) for event in caller.events)
        assert caller.frames() == []


async def test_connections_that_never_speak_are_bounded_and_closed(tmp_path: Path) -> None:
    """Half-open peers hold a place for `handshake_s` at most, and one host cannot take all of them."""
    async with mesh(tmp_path) as m:
        node = await m.add(quick(handshake_s=0.5, handshakes_per_host_max=8))
        member = m.make_identity()
        node.gate.members[member.node_id] = member.public_key
        mute = []
        for _ in range(40):
            sock = trio.socket.socket()
            await sock.connect(tuple(node.address))
            mute.append(sock)
        with trio.fail_after(5):
            for sock in mute:
                with contextlib.suppress(ConnectionResetError):
                    assert await sock.recv(1) == b""
                sock.close()
        assert node.links.refused["limit"] == 32
        assert node.links.refused["timeout"] == 8
        stream = await raw_connect(node.address, m.client_context(member))
        assert isinstance(await greet(stream, raw_hello(member)), HelloOk)
        stream.cut("done")


async def test_a_member_that_stops_before_hello_is_closed_too(tmp_path: Path) -> None:
    async with mesh(tmp_path) as m:
        node, member = await m.add(quick(handshake_s=0.3)), m.make_identity()
        node.gate.members[member.node_id] = member.public_key
        stream = await raw_connect(node.address, m.client_context(member))
        with pytest.raises(StreamBroken), trio.fail_after(5):
            await stream.receive_some(1)
        stream.cut("done")
        assert node.links.refused == {"timeout": 1}


async def test_a_reused_name_inherits_nothing(tmp_path: Path) -> None:
    """Case 17, as far as links go: whatever a certificate calls its holder, the key decides who it is."""
    async with mesh(tmp_path) as m:
        node, member, stranger = await m.add(), await m.add(), m.make_identity()
        template = x509.load_der_x509_certificate(issue_leaf(m.root, stranger.public_key))
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member.node_id)]))
            .issuer_name(template.issuer)
            .public_key(template.public_key())
            .serial_number(7)
            .not_valid_before(template.not_valid_before_utc)
            .not_valid_after(template.not_valid_after_utc)
        )
        for extension in template.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        leaf = builder.sign(Ed25519PrivateKey.from_private_bytes(m.root.seed), None).public_bytes(Encoding.DER)
        stream = await raw_connect(node.address, m.client_context(stranger, leaf))
        answer = await greet(stream, raw_hello(member.identity))
        assert isinstance(answer, Refused)
        assert answer.code == "not_a_member"
        assert node_id_of(stranger.public_key) != member.node_id
        stream.cut("done")
