"""The golden vectors of the wire, read and written by a second implementation that knows docs/protocol.md only."""

import json
from typing import Any, get_args

import msgpack
import msgspec
import pytest

from protocol.rpc.messages import RpcMessage, decode_rpc
from protocol.wire import frames, messages
from protocol.wire.announcement import decode_announcement
from protocol.wire.frames import FrameDecoder
from tests.golden import wire_vectors
from tests.golden.wire_vectors import FILE, plain
from tests.protocol.wire import by_hand

GOLDEN: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
MESH = by_hand.mesh_bytes(bytes.fromhex(GOLDEN["root"]["public_key"]))
NODES = {entry["label"]: entry for entry in GOLDEN["nodes"]}
IDENTITIES = {label: by_hand.Identity(bytes.fromhex(entry["seed"])) for label, entry in NODES.items()}
CHANNELS = {"frames_channel_0": 0, "frames_channel_1": 1, "frames_channel_2": 2}


def unplain(value: Any) -> Any:
    """The inverse of wire_vectors.plain."""
    match value:
        case str() if value.startswith("0x"):
            return bytes.fromhex(value[2:])
        case list():
            return [unplain(item) for item in value]
        case {"map": pairs}:
            return {unplain(key): unplain(item) for key, item in pairs}
        case _:
            return value


def named(*unions: Any) -> set[str]:
    """The names of the messages in some unions."""
    return {kind.__name__ for union in unions for kind in get_args(union)}


def test_the_bytes_are_still_the_same() -> None:
    assert wire_vectors.vectors() == GOLDEN


def test_every_message_has_a_vector() -> None:
    assert {name for entry in GOLDEN["datagrams_a_to_b"] for name in entry["names"]} == named(messages.DatagramMessage)
    assert {entry["name"] for entry in GOLDEN["statements_by_a"]} == named(messages.StatementBody)
    assert {entry["name"] for entry in GOLDEN["frames_channel_0"]} == named(messages.LinkMessage)
    assert {entry["name"] for entry in GOLDEN["frames_channel_1"]} == named(RpcMessage)
    assert {entry["name"] for entry in GOLDEN["frames_channel_2"]} == named(frames.LinkMessage)


def test_identities() -> None:
    assert by_hand.base32(MESH) == GOLDEN["root"]["mesh_id"]
    assert by_hand.mesh_tag(MESH).hex() == GOLDEN["root"]["mesh_tag"]
    assert by_hand.Identity(bytes.fromhex(GOLDEN["root"]["seed"])).public_key.hex() == GOLDEN["root"]["public_key"]
    for label, entry in NODES.items():
        identity = IDENTITIES[label]
        assert identity.public_key.hex() == entry["public_key"]
        assert by_hand.base32(identity.node) == entry["node_id"]
        assert identity.node[:8].hex() == entry["short_id"]


def pair(sender: str, receiver: str) -> bytes:
    """The key of one direction, from the sender's secret and the receiver's public key."""
    shared = IDENTITIES[sender].shared_with(IDENTITIES[receiver].public_key)
    key = bytes.fromhex(GOLDEN["gossip_key"]["key"])
    return by_hand.pair_key(key, shared, IDENTITIES[sender].node, IDENTITIES[receiver].node, NODES[receiver]["boot"])


def test_pair_keys_both_ways() -> None:
    assert pair("a", "b").hex() == GOLDEN["pair_keys"]["a to b"]
    assert pair("b", "a").hex() == GOLDEN["pair_keys"]["b to a"]
    assert by_hand.key_id(bytes.fromhex(GOLDEN["gossip_key"]["key"])).hex() == GOLDEN["gossip_key"]["key_id"]


@pytest.mark.parametrize("index", range(len(GOLDEN["datagrams_a_to_b"])))
def test_a_datagram_is_opened_and_sealed_by_hand(index: int) -> None:
    entry = GOLDEN["datagrams_a_to_b"][index]
    data, key = bytes.fromhex(entry["bytes"]), pair("a", "b")
    head = by_hand.header(
        MESH, bytes.fromhex(GOLDEN["gossip_key"]["key_id"]), IDENTITIES["a"].node, NODES["a"]["boot"], index + 1
    )
    assert data[:27] == head
    opened = by_hand.open_datagram(key, data)
    assert plain(opened) == entry["messages"]
    assert by_hand.seal(key, head, msgpack.packb(unplain(entry["messages"]))) == data


@pytest.mark.parametrize("entry", GOLDEN["statements_by_a"], ids=lambda entry: str(entry["name"]))
def test_a_statement_is_verified_and_signed_by_hand(entry: dict[str, Any]) -> None:
    blob, identity = bytes.fromhex(entry["bytes"]), IDENTITIES["a"]
    assert plain(by_hand.open_statement(MESH, identity.public_key, blob)) == entry["fields"]
    body = msgpack.packb(unplain(entry["fields"]))
    assert body + identity.sign(by_hand.STATEMENT_DOMAIN + MESH + body) == blob
    assert by_hand.open_statement(MESH, IDENTITIES["b"].public_key, blob) is None


FRAMES = [(name, entry) for name in CHANNELS for entry in GOLDEN[name]]


@pytest.mark.parametrize(
    ("name", "entry"), FRAMES, ids=lambda value: value if isinstance(value, str) else value["name"]
)
def test_a_frame_is_read_and_written_by_hand(name: str, entry: dict[str, Any]) -> None:
    data = bytes.fromhex(entry["bytes"])
    channel, fields = by_hand.open_frame(data)
    assert (channel, plain(fields)) == (CHANNELS[name], entry["fields"])
    payload = msgpack.packb(unplain(entry["fields"]))
    assert (len(payload) + 1).to_bytes(4, "big") + bytes([channel]) + payload == data


@pytest.mark.parametrize(
    ("name", "entry"), FRAMES, ids=lambda value: value if isinstance(value, str) else value["name"]
)
def test_a_later_version_may_append_fields(name: str, entry: dict[str, Any]) -> None:
    """What this version does not know, behind what it knows, is not read."""
    longer = msgpack.packb([*unplain(entry["fields"]), "later", {"a": [1, 2]}])
    decoder = FrameDecoder(frame_bytes_max=2**20)
    decoder.feed((len(longer) + 1).to_bytes(4, "big") + bytes([CHANNELS[name]]) + longer)
    frame = decoder.next_frame()
    assert frame is not None
    decode: Any = [messages_decoder, decode_rpc, frames.decode_link_message][frame.channel]
    assert type(decode(frame.payload)).__name__ == entry["name"]


def messages_decoder(payload: bytes) -> messages.LinkMessage:
    """Channel 0."""
    decoded: messages.LinkMessage = msgspec.msgpack.decode(payload, type=messages.LinkMessage)
    return decoded


def test_the_announcement() -> None:
    entry = GOLDEN["announcement"]
    data = bytes.fromhex(entry["bytes"])
    assert data == msgpack.packb([b"mesh", 1, MESH, IDENTITIES["a"].node, entry["port"]])
    read = decode_announcement(data)
    assert read is not None
    assert (read.mesh_id, read.node_id, read.port) == (entry["mesh_id"], entry["node_id"], entry["port"])
