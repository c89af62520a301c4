"""Makes tests/golden/wire.json: every message of the wire with its bytes, for whoever writes a second implementation.

`python -m tests.golden.wire_vectors` writes the file anew. A change of these bytes is a change of the protocol: the
version rises, or the mesh breaks. Statements of the root and the join are in trust.json, records in records.json.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.election.messages import Beacon, ElectorateOffer, ElectorateRequest, Follow, Version
from protocol.ids import Address, NodeId, mesh_id_of, node_id_bytes, node_id_of, pack_address, root_pin, short_id
from protocol.records.messages import (
    LEVEL_BYTES,
    RecordBuckets,
    RecordBusy,
    RecordGrant,
    RecordLeafRequest,
    RecordLeaves,
    RecordParts,
    RecordPush,
    RecordRoot,
    RecordSplit,
    RecordTops,
    RecordTransfer,
)
from protocol.rpc import messages as rpc
from protocol.trust.keys import key_id_of
from protocol.wire import frames
from protocol.wire.announcement import Announcement, encode_announcement
from protocol.wire.crypto import STATEMENT_DOMAIN, SodiumSuite
from protocol.wire.datagram import DatagramCodec, mesh_tag
from protocol.wire.frames import Channel, encode_frame
from protocol.wire.messages import (
    Accusation,
    Ack,
    Alive,
    Gossip,
    Heartbeat,
    KeyGrant,
    KeyRequest,
    Leaving,
    Nack,
    Ping,
    PingRequest,
    Relayed,
    Spread,
    Tunnel,
    ViewOffer,
    ViewReply,
    ViewReport,
)
from tests.protocol.trust.parts import Root, public_key, seed

FILE: Final = Path(__file__).parent / "wire.json"
BOOTS: Final = {"a": 201_000_001, "b": 201_000_007}
GOSSIP: Final = seed("gossip")
SHORT: Final = {label: bytes(short_id(node_id_of(public_key(label)))) for label in ("a", "b", "c")}


def filler(label: str, size: int) -> bytes:
    """So many bytes that look random and are always the same."""
    return hashlib.shake_128(label.encode()).digest(size)


DIGEST: Final = filler("digest", 8)
VERSION: Final = Version(41, SHORT["a"], 3)


def statements() -> list[Any]:
    """One of each, said by a."""
    a, b = SHORT["a"], SHORT["b"]
    addresses = [pack_address(Address("192.168.1.10", 4893)), pack_address(Address("fd00::10", 4893))]
    return [
        Alive(a, BOOTS["a"], 2, 1, 1, addresses),
        Accusation(a, BOOTS["a"], 17, b, BOOTS["b"], 1),
        Leaving(a, BOOTS["a"], 2),
        ViewReport(a, BOOTS["a"], 18, DIGEST, b"\x07"),
        Heartbeat(
            a, BOOTS["a"], 19, 40, 125, 87, 8_192, 250_000, -1, -128, -1, 0x201, 80, 3, 86_400, 450, SHORT["b"], 41
        ),
    ]


def signed(body: Any) -> bytes:
    """The statement's bytes."""
    encoded = msgspec.msgpack.encode(body)
    return encoded + suite("a").sign(STATEMENT_DOMAIN, encoded)


def datagram_messages() -> list[Any]:
    """One of each."""
    blobs = [signed(body) for body in statements()]
    return [
        Ping(4_000_000_000, DIGEST),
        Ack(4_000_000_000, DIGEST),
        PingRequest(7, SHORT["c"]),
        Relayed(7),
        Nack(7),
        Gossip(blobs[:3]),
        Spread(SHORT["a"], [blobs[4]]),
        Beacon(41, 12, 6_000, True, True, VERSION, Version(41, SHORT["a"], 2), [SHORT["c"]]),
        Follow(41, SHORT["a"], 12, True, VERSION, 41, SHORT["a"]),
    ]


def link_messages() -> list[Any]:
    """One of each of channel 0."""
    blobs = [signed(body) for body in statements()]
    record = filler("record", 150)
    pairs = filler("pairs", 32)
    return [
        ViewOffer(DIGEST, filler("entries", 12)),
        ViewReply(blobs[:2], [SHORT["c"]]),
        Tunnel([Ping(5, DIGEST), Gossip([blobs[0]])]),
        ElectorateRequest(DIGEST),
        ElectorateOffer(VERSION, sorted(SHORT.values())),
        ElectorateOffer(VERSION, [SHORT["c"]], DIGEST, b"\x05"),
        RecordPush([record]),
        RecordRoot(77, {"trust": filler("root", 8)}),
        RecordBuckets(77, {"trust": {5: filler("level", LEVEL_BYTES)}}),
        RecordLeaves(77, {"trust": {321: pairs}}, {"trust": [322]}, {"trust": {323: 600}}),
        RecordTransfer(77, [record], {"trust": filler("wanted", 16)}),
        RecordTops(77, {"trust": filler("tops", LEVEL_BYTES)}, ["unknown"]),
        RecordLeafRequest(77, {"trust": [322, 323]}),
        RecordSplit(77, "trust", 323, 2**62 + 1, filler("parts", 512)),
        RecordParts(77, [0, 63], pairs, True),
        RecordGrant(77, [record], 2, 0),
        RecordBusy(77, 250),
        KeyRequest(key_id_of(GOSSIP)),
        KeyGrant(3, GOSSIP, SHORT["a"]),
    ]


def own_link_messages() -> list[Any]:
    """One of each of channel 2."""
    node = node_id_bytes(node_id_of(public_key("a")))
    return [
        frames.Hello(1, 1, ["bulk"], node, BOOTS["a"], 4, "meshnode/0.1.0", 1, filler("grant", 16), "chunk"),
        frames.HelloOk(1, ["bulk"], BOOTS["b"], 2, "meshnode/0.1.0", 1_800_000_000_123),
        frames.Refused("evicted", "This machine was evicted.", False, 1, 1, bytes(range(16))),
        frames.Ping(8),
        frames.Pong(8, 1_800_000_000_123),
        frames.IdleOffer(),
        frames.IdleAgree(),
        frames.IdleDecline(),
        frames.Farewell("stopping"),
    ]


def rpc_messages() -> list[Any]:
    """One of each of channel 1."""
    return [
        rpc.Request(1, "cluster.ping", 5_000, b'{"n":1}'),
        rpc.Reply(1, b'{"n":1}'),
        rpc.Failure(2, "not_found", "There is no such thing.", False, b'{"what":"thing"}'),
        rpc.Cancel(3),
    ]


def suite(label: str) -> SodiumSuite:
    """The suite of the node with this label."""
    return SodiumSuite(seed(label), mesh_id_of(Root().public_key))


class Members:
    """The part of a roster that sealing asks."""

    def public_key(self, node_id: NodeId) -> bytes:
        return next(public_key(label) for label in SHORT if node_id_of(public_key(label)) == node_id)

    def short(self, node_id: NodeId) -> bytes:
        return bytes(short_id(node_id))


class Keys:
    """One gossip key."""

    def sending(self) -> tuple[bytes, bytes]:
        return key_id_of(GOSSIP), GOSSIP

    def receiving(self, key_id: bytes) -> bytes | None:
        return GOSSIP if key_id == key_id_of(GOSSIP) else None


def sealed(bodies: list[list[Any]]) -> Iterator[bytes]:
    """Datagrams from a to b, with the sequence numbers 1, 2, 3 ..."""
    a, b = (node_id_of(public_key(label)) for label in ("a", "b"))
    codec = DatagramCodec(
        me=a,
        boot=BOOTS["a"],
        mesh_id=mesh_id_of(Root().public_key),
        suite=suite("a"),
        roster=Members(),  # type: ignore[arg-type] # the two methods that sealing asks
        keys=Keys(),
    )
    codec.learn_boot(b, BOOTS["b"])
    for messages in bodies:
        data = codec.seal(b, messages)
        assert data is not None
        yield data


def plain(value: Any) -> Any:
    """A decoded value as JSON holds it: bytes as "0x..." and maps as {"map": pairs}."""
    match value:
        case bytes():
            return "0x" + value.hex()
        case list() | tuple():
            return [plain(item) for item in value]
        case dict():
            return {"map": [[plain(key), plain(item)] for key, item in value.items()]}
        case _:
            return value


def fields_of(message: Any) -> Any:
    """Tag and fields, from the struct and not from its bytes."""
    config, builtins = message.__struct_config__, msgspec.structs.astuple(message)
    return plain([config.tag, *(_inner(item) for item in builtins)])


def _inner(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        items = [_inner(item) for item in msgspec.structs.astuple(value)]
        return items if tag is None else [tag, *items]
    return [_inner(item) for item in value] if isinstance(value, list) else value


def entry(message: Any, data: bytes) -> dict[str, Any]:
    """One vector."""
    return {"name": type(message).__name__, "fields": fields_of(message), "bytes": data.hex()}


def vectors() -> dict[str, Any]:
    """Everything, made anew. Seeds are SHA-256 of their label."""
    root = Root()
    mesh = mesh_id_of(root.public_key)
    ids = {label: node_id_of(public_key(label)) for label in ("a", "b", "c")}
    messages = datagram_messages()
    bodies = [[message] for message in messages] + [[messages[0], messages[5]]]
    datagrams = list(sealed(bodies))
    forth = suite("a").pair_key(GOSSIP, public_key("b"), ids["a"], ids["b"], BOOTS["b"])
    back = suite("b").pair_key(GOSSIP, public_key("a"), ids["b"], ids["a"], BOOTS["a"])
    assert forth is not None
    assert back is not None
    return {
        "root": {
            "seed": seed("root").hex(),
            "public_key": root.public_key.hex(),
            "mesh_id": mesh,
            "mesh_tag": mesh_tag(mesh).hex(),
            "pin": root_pin(root.public_key).hex(),
        },
        "nodes": [
            {
                "label": label,
                "seed": seed(label).hex(),
                "public_key": public_key(label).hex(),
                "node_id": ids[label],
                "short_id": SHORT[label].hex(),
                "boot": BOOTS.get(label, 0),
            }
            for label in ids
        ],
        "gossip_key": {"key": GOSSIP.hex(), "key_id": key_id_of(GOSSIP).hex()},
        "pair_keys": {"a to b": forth.hex(), "b to a": back.hex()},
        "datagrams_a_to_b": [
            {"names": [type(m).__name__ for m in body], "messages": [fields_of(m) for m in body], "bytes": data.hex()}
            for body, data in zip(bodies, datagrams, strict=True)
        ],
        "statements_by_a": [entry(body, signed(body)) for body in statements()],
        "frames_channel_0": [
            entry(m, encode_frame(Channel.MACHINES, msgspec.msgpack.encode(m))) for m in link_messages()
        ],
        "frames_channel_1": [entry(m, encode_frame(Channel.RPC, rpc.encode_rpc(m))) for m in rpc_messages()],
        "frames_channel_2": [entry(m, frames.encode_link_message(m)) for m in own_link_messages()],
        "announcement": {
            "mesh_id": mesh,
            "node_id": ids["a"],
            "port": 4893,
            "bytes": encode_announcement(Announcement(mesh, ids["a"], 4893)).hex(),
        },
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
