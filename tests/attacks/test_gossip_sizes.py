"""Cases 6 to 8: MessagePack bombs, oversized datagrams and frames, and answers larger than their questions.

Each attack runs against the real codecs and the real hub, and once more with its defence taken away.
"""

import gzip
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from typing import get_args

import msgpack
import pytest

from protocol.effects import FrameReceived, SendDatagram
from protocol.election.messages import Beacon, Follow, Version
from protocol.ids import Address, pack_address
from protocol.membership import machine as membership_machine
from protocol.membership.state import State
from protocol.rpc.messages import decode_rpc
from protocol.wire import limits
from protocol.wire.announcement import decode_announcement
from protocol.wire.crypto import SodiumSuite
from protocol.wire.datagram import Opened
from protocol.wire.frames import FrameDecoder, FrameTooLarge, RemoteProtocolError, decode_link_message
from protocol.wire.messages import (
    Accusation,
    Ack,
    Alive,
    DatagramMessage,
    Gossip,
    Nack,
    Ping,
    PingRequest,
    Relayed,
    Spread,
)
from tests.protocol.trust.parts import public_key, seed
from tests.protocol.wire import by_hand
from tests.protocol.wire.hubs import GOSSIP_KEY, Hubs, settled, statement

MEMORY_MAX = 10 * 1000 * 1000

# ---- case 6 ----


def bombs(bytes_max: int) -> Iterable[tuple[str, bytes]]:
    """Short texts that claim to be huge, and long ones that would become so."""
    room = bytes_max - 16
    for tag in (1, 2, 3, 6, 16, 17, 32, 33, 34, 35, 36, 49):
        head = b"\x93" + bytes([tag])
        yield f"claimed array of 4 billion as field of message {tag}", head + b"\xdd\xff\xff\xff\xff"
        yield f"claimed map of 4 billion as field of message {tag}", head + b"\xdf\xff\xff\xff\xff"
        yield f"claimed 4 GB of bytes in message {tag}", head + b"\xc6\xff\xff\xff\xff"
        yield f"claimed 4 GB of text in message {tag}", head + b"\xdb\xff\xff\xff\xff"
        yield (
            f"empty maps for a field of message {tag}",
            head + b"\xdd" + room.to_bytes(4, "big") + b"\x80" * (room - 7),
        )
        yield f"depth in message {tag}", head + b"\x91" * (room - 2)
        yield f"depth behind message {tag}", b"\x98" + bytes([tag]) + b"\x91" * (room - 2)
    yield "claimed array of 4 billion", b"\xdd\xff\xff\xff\xff"
    yield "claimed array of 4 billion, and as much of it as fits", b"\xdd\xff\xff\xff\xff" + b"\x90" * room
    yield "maps in maps", b"\x81\x01" * (room // 2)
    yield "an array of empty maps", b"\xdd" + room.to_bytes(4, "big") + b"\x80" * room
    yield "a map of 65 KB", b"\xde\xff\xff" + b"".join(i.to_bytes(2, "big") for i in range(min(room // 2, 65_535)))


def peak_of(decode: Callable[[bytes], object], data: bytes) -> int:
    """Bytes of memory that were in use at once, beyond what was before. Refusals are expected."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        decode(data)
        return tracemalloc.get_traced_memory()[1] - before
    except (RemoteProtocolError, msgpack.exceptions.UnpackException, ValueError, RecursionError, MemoryError):
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_case_06_no_bomb_in_a_frame_takes_memory() -> None:
    """Through the hub, as a member's frame, and through the decoders of the other channels."""
    mesh = settled("a", "b")
    hub, liar = mesh["b"].live, mesh["a"].node_id

    def to_hub(data: bytes) -> object:
        return hub.handle(FrameReceived(liar, data), mesh.now, mesh.wall(mesh["b"]))

    for name, bomb in bombs(limits.FRAME_BYTES_MAX):
        for decode in (to_hub, decode_rpc, decode_link_message):
            assert peak_of(decode, bomb) < MEMORY_MAX, name
    assert hub.drops["malformed"] > 50


def test_case_06_nor_one_in_a_datagram_a_statement_or_an_announcement() -> None:
    mesh = settled("a", "b")
    hub = mesh["b"].live
    for name, bomb in bombs(limits.DATAGRAM_BODY_BYTES_MAX):
        sealed = sealed_body(mesh, bomb[: limits.DATAGRAM_BODY_BYTES_MAX])
        before = dict(hub.datagrams.drops)
        assert peak_of(lambda data: mesh.deliver(mesh["b"], data, mesh["a"].address), sealed) < MEMORY_MAX, name
        assert hub.datagrams.drops["malformed"] == before.get("malformed", 0) + 1, name
        assert peak_of(hub.codec.open, bomb[:900] + bytes(64)) < MEMORY_MAX, name
        assert peak_of(decode_announcement, bomb[:100]) < MEMORY_MAX, name


def sealed_body(mesh: Hubs, body: bytes) -> bytes:
    """A datagram with this body, from a member that does not use our encoder."""
    datagrams = mesh["a"].live.datagrams
    datagrams._sequence += 1
    mesh_id = by_hand.mesh_bytes(mesh.root.public_key)
    ids = [by_hand.node_bytes(public_key(label)) for label in ("a", "b")]
    shared = by_hand.Identity(seed("a")).shared_with(public_key("b"))
    pair = by_hand.pair_key(GOSSIP_KEY.key, shared, ids[0], ids[1], mesh["b"].boot)
    return by_hand.seal(
        pair, by_hand.header(mesh_id, GOSSIP_KEY.key_id, ids[0], mesh["a"].boot, datagrams._sequence), body
    )


def test_case_06_without_types_the_same_frame_does_take_memory() -> None:
    """A decoder that builds whatever it reads, as msgpack does by default."""
    bomb = dict(bombs(limits.FRAME_BYTES_MAX // 4))["an array of empty maps"]
    assert peak_of(msgpack.unpackb, bomb) > MEMORY_MAX


# ---- case 7 ----


@pytest.mark.parametrize("size", [limits.DATAGRAM_BYTES_MAX + 1, 1500, 9000, 65_507])
@pytest.mark.parametrize("defended", [True, False])
def test_case_07_an_oversized_datagram_meets_no_cryptography(
    size: int, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = settled("a", "b")
    opened: list[int] = []
    monkeypatch.setattr(SodiumSuite, "open", lambda self, key, nonce, aad, text: opened.append(len(text)))
    if not defended:
        monkeypatch.setattr(limits, "DATAGRAM_BYTES_MAX", 1_000_000)
    good = mesh.seal("a", "b", Ping(1, bytes(8)))
    assert mesh.deliver(mesh["b"], good + bytes(size - len(good)), mesh["a"].address) == []
    assert (len(opened) == 0) is defended
    assert (mesh["b"].live.datagrams.drops["size"] == 1) is defended


@pytest.mark.parametrize("defended", [True, False])
def test_case_07_an_oversized_frame_is_refused_by_its_header(defended: bool) -> None:
    """A frame that claims 200 MB, sent as far as anybody would read: nothing of it is kept."""
    decoder = FrameDecoder(frame_bytes_max=limits.FRAME_BYTES_MAX if defended else 2**32)
    refused = False
    decoder.feed((200_000_000).to_bytes(4, "big"))
    try:
        for _ in range(256):
            assert decoder.next_frame() is None
            decoder.feed(bytes(65_536))
    except FrameTooLarge:
        refused = True
    assert refused is defended
    assert (decoder.buffered_bytes == 0) is defended


def test_case_07_nothing_on_the_wire_is_compressed() -> None:
    """A compressed frame is a malformed one: there is no message, field or channel that would be inflated."""
    mesh = settled("a", "b")
    hub = mesh["b"].live
    for squeezed in (zlib.compress(bytes(10_000_000)), gzip.compress(bytes(10_000_000))):
        assert peak_of(lambda data: mesh.give(mesh["b"], FrameReceived(mesh["a"].node_id, data)), squeezed) < 100_000
    assert hub.drops["malformed"] == 2


# ---- case 8 ----

BYSTANDER = Address("192.0.2.66", 53)


def accused(mesh: Hubs) -> bytes:
    """An accusation of the receiver itself: what makes it refute."""
    reader, liar = mesh["reader"], mesh["liar"]
    boot, incarnation = reader.live.membership.view.rank(reader.node_id)
    return statement("liar", mesh.root, Accusation(liar.short, liar.boot, 1, reader.short, boot, incarnation))


def alive(mesh: Hubs) -> bytes:
    """Something that everybody passes on."""
    liar = mesh["liar"]
    packed = [pack_address(address) for address in liar.addresses]
    return statement("liar", mesh.root, Alive(liar.short, liar.boot, 50, 1, 1, packed))


def questions(mesh: Hubs) -> dict[type, list[tuple[object, ...]]]:
    """For every datagram message the packets that provoke most, sixteen at once where one is not enough."""
    reader, liar, third = mesh["reader"], mesh["liar"], mesh["third"]
    leader = mesh["reader"].live.election.coordinator
    term = reader.live.election.term
    version = Version(term, liar.short, 5)
    beacon = Beacon(term + 1, 1, 6000, True, True, version, Version(), [])
    release = Beacon(term + 1, 2, 0, False, False, version, Version(), [])
    old = Beacon(1, 1, 6000, False, False, Version(), Version(), [])
    assert leader is not None
    follow = Follow(term, reader.short, 0, False, Version(), term + 1, liar.short)
    stranger = Follow(term + 3, third.short, 0, False, Version(), term + 3, third.short)
    relayed = PingRequest(9, third.short)
    return {
        Ping: [(Ping(1, bytes(8)),), (Ping(1, bytes(8)),) * 16, (Ping(1, bytes(8)), Gossip([accused(mesh)]))],
        Ack: [(Ack(1, bytes(8)),), (Ack(1, bytes(8)),) * 16],
        PingRequest: [(relayed,), (relayed,) * 16, (PingRequest(9, liar.short),), (PingRequest(9, reader.short),) * 16],
        Relayed: [(Relayed(1),), (Relayed(1),) * 16],
        Nack: [(Nack(1),), (Nack(1),) * 16],
        Gossip: [(Gossip([accused(mesh)]),), (Gossip([accused(mesh)] * 8),), (Gossip([alive(mesh)]),), (Gossip([]),)],
        Spread: [(Spread(liar.short, [alive(mesh)]),), (Spread(reader.short, []),) * 16],
        Beacon: [(beacon,), (release,), (old,), (old,) * 16],
        Follow: [(follow,), (stranger,), (follow,) * 16],
    }


def pending_gossip(mesh: Hubs) -> None:
    """Much that the reader would like to pass on, so that answers have something to carry."""
    reader = mesh["reader"].live.membership
    for label, host in mesh.hosts.items():
        packed = [pack_address(Address(f"10.9.{index}.1", 4893)) for index in range(8)]
        blob = statement(label, mesh.root, Alive(host.short, host.boot, 40, 1, 1, packed))
        reader._s.broadcasts.add(("alive", host.node_id), blob, 50, mesh.now + 60.0)


def reflected(packet: tuple[object, ...]) -> tuple[int, int]:
    """Bytes that a bystander gets, in all, for one packet with its address as source; and the packet's own."""
    mesh = settled("reader", "liar", "third", "fourth")
    pending_gossip(mesh)
    data = mesh.seal("liar", "reader", *packet)
    effects = mesh.deliver(mesh["reader"], data, BYSTANDER)
    got = sum(len(e.data) for e in effects if isinstance(e, SendDatagram) and e.address == BYSTANDER)
    begun = len(mesh.sent)
    mesh.cut = lambda source, target: True
    mesh.run(0.29)  # late answers: a Nack comes after a quarter of a second
    late = [e.data for _, host, e in mesh.sent[begun:] if host.label == "reader" and e.address == BYSTANDER]
    probe = next((answer for answer in late if is_probe(mesh, answer)), b"")
    return got + sum(map(len, late)) - len(probe), len(data)


PROBE_BYTES_MAX = 64


def is_probe(mesh: Hubs, data: bytes) -> bool:
    """Whether this is a probe by which a new address is tried: a question of the reader's own, and nothing besides.

    One is not counted.
    """
    opened = mesh["liar"].live.datagrams.open(data, mesh["reader"].address)
    assert isinstance(opened, Opened)
    return len(data) <= PROBE_BYTES_MAX and [type(message) for message in opened.messages] == [Ping]


ASKED = [
    (kind, index)
    for kind, packets in questions(settled("reader", "liar", "third")).items()
    for index in range(len(packets))
]


def test_case_08_every_datagram_message_is_tried() -> None:
    assert {kind for kind, _ in ASKED} == set(get_args(DatagramMessage))


@pytest.mark.parametrize(("kind", "index"), ASKED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_case_08_the_answer_is_never_larger_than_the_question(kind: type, index: int) -> None:
    packet = questions(settled("reader", "liar", "third", "fourth"))[kind][index]
    answered, asked = reflected(packet)
    assert answered <= asked


@pytest.mark.parametrize("kind", [Ping, Gossip, Beacon])
def test_case_08_without_the_defence(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources believed, and answers as long as there is something to say."""
    monkeypatch.setattr(membership_machine, "gossip_bytes", lambda messages: 1000)
    monkeypatch.setattr(State, "came_from", lambda self, peer, source: self.routes.__setitem__(peer, source))
    packets = questions(settled("reader", "liar", "third", "fourth"))[kind]
    assert any(answered > asked for answered, asked in map(reflected, packets))


def test_case_08_what_is_not_authentic_is_not_answered_at_all() -> None:
    """Whoever holds no member's key gets nothing out of a node, not even an error."""
    mesh = settled("reader", "liar")
    good = mesh.seal("liar", "reader", Ping(1, bytes(8)))
    mesh.deliver(mesh["reader"], good, mesh["liar"].address)
    strangers = [good, good[:30], good[:-1] + b"?", b"\x02" + good[1:], b"\x01" + bytes(60), good[:5] + bytes(80), b""]
    for data in strangers:
        effects = mesh.deliver(mesh["reader"], data, BYSTANDER)
        assert not any(isinstance(effect, SendDatagram) for effect in effects)


def test_case_08_a_peer_behind_address_translation_is_reached_after_one_probe() -> None:
    """The price of the defence: an address that its owner did not sign is tried once before it is used."""
    mesh = settled("reader", "liar", "third")
    moved = mesh["liar"]
    public = Address("198.51.100.7", 40_000)
    mesh.tell("liar", "reader", Ping(1, bytes(8)))
    former, moved.address, moved.addresses = moved.address, public, (public,)
    mesh.run(6.0)
    reader = mesh["reader"].live.membership
    assert reader.route(moved.node_id) == public != former
    assert moved.node_id in mesh["reader"].up()
