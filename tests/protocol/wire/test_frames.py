"""The frame codec, the first words, and what is decided by them."""

import random
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import NodeId, node_id_bytes, node_id_of
from protocol.wire.frames import (
    FRAME_PAYLOAD_BYTES_MAX,
    HELLO_FRAME_BYTES_MAX,
    Channel,
    Farewell,
    Frame,
    FrameDecoder,
    FrameTooLarge,
    Hello,
    HelloOk,
    IdleAgree,
    IdleDecline,
    IdleOffer,
    LinkMessage,
    Ping,
    Pong,
    Refused,
    RemoteProtocolError,
    Standing,
    Verdict,
    Versions,
    agree,
    decode_link_message,
    encode_frame,
    encode_link_message,
    judge_dial,
    refuse_versions,
)
from protocol.wire.limits import FRAME_BYTES_MAX, FRAME_HEADER_BYTES

LOW, HIGH = sorted(node_id_of(bytes([n]) * 32) for n in (1, 2))


def hello(**changes: object) -> Hello:
    fields: dict[str, object] = {
        "version_min": 1,
        "version_max": 1,
        "features": [],
        "node_id": node_id_bytes(LOW),
        "boot": 5,
        "attempt": 3,
        "agent": "meshnode/0.1",
        "kind": 0,
    }
    return Hello(**(fields | changes))  # type: ignore[arg-type] # a table of fields


def decode_all(decoder: FrameDecoder, pieces: list[bytes]) -> list[Frame]:
    frames = []
    for piece in pieces:
        decoder.feed(piece)
        while (frame := decoder.next_frame()) is not None:
            frames.append(frame)
    return frames


@given(
    st.lists(st.tuples(st.sampled_from(list(Channel)), st.binary(max_size=300)), max_size=12),
    st.lists(st.integers(1, 40), min_size=1, max_size=50),
)
def test_frames_survive_any_cutting(frames: list[tuple[Channel, bytes]], steps: list[int]) -> None:
    data = b"".join(encode_frame(channel, payload) for channel, payload in frames)
    pieces, at, turn = [], 0, 0
    while at < len(data):
        step = steps[turn % len(steps)]
        pieces.append(data[at : at + step])
        at, turn = at + step, turn + 1
    decoder = FrameDecoder(frame_bytes_max=FRAME_BYTES_MAX)
    assert decode_all(decoder, pieces) == [Frame(channel, payload) for channel, payload in frames]
    assert decoder.buffered_bytes == 0


def test_the_layout_is_length_channel_payload() -> None:
    assert encode_frame(Channel.RPC, b"ab") == b"\x00\x00\x00\x03\x01ab"
    assert len(encode_frame(Channel.MACHINES, b"")) == FRAME_HEADER_BYTES
    biggest = encode_frame(Channel.MACHINES, bytes(FRAME_PAYLOAD_BYTES_MAX))
    assert int.from_bytes(biggest[:4], "big") == FRAME_BYTES_MAX
    assert decode_all(FrameDecoder(frame_bytes_max=FRAME_BYTES_MAX), [biggest])[0].payload == bytes(
        FRAME_PAYLOAD_BYTES_MAX
    )
    with pytest.raises(ValueError, match="at most"):
        encode_frame(Channel.MACHINES, bytes(FRAME_PAYLOAD_BYTES_MAX + 1))


@pytest.mark.parametrize("length", [FRAME_BYTES_MAX + 1, 2**31, 2**32 - 1])
def test_a_frame_too_large_is_refused_by_its_header_and_nothing_is_kept(length: int) -> None:
    decoder = FrameDecoder(frame_bytes_max=FRAME_BYTES_MAX)
    decoder.feed(length.to_bytes(4, "big"))
    with pytest.raises(FrameTooLarge):
        decoder.next_frame()
    assert decoder.buffered_bytes == 0


def test_a_frame_without_a_channel_is_refused() -> None:
    decoder = FrameDecoder(frame_bytes_max=FRAME_BYTES_MAX)
    decoder.feed(bytes(4))
    with pytest.raises(RemoteProtocolError):
        decoder.next_frame()


def test_missing_bytes_stops_exactly_at_the_end_of_a_frame() -> None:
    data = encode_frame(Channel.LINK, b"hello") + b"what follows"
    decoder, at, reads = FrameDecoder(frame_bytes_max=100), 0, []
    while (frame := decoder.next_frame()) is None:
        reads.append(decoder.missing_bytes)
        decoder.feed(data[at : at + decoder.missing_bytes])
        at += reads[-1]
    assert frame == Frame(Channel.LINK, b"hello")
    assert reads == [4, 6]
    assert data[at:] == b"what follows"


def test_decoding_a_big_frame_in_small_pieces_is_not_quadratic_and_keeps_no_more_than_the_frame() -> None:
    data = encode_frame(Channel.MACHINES, bytes(FRAME_PAYLOAD_BYTES_MAX))
    decoder = FrameDecoder(frame_bytes_max=FRAME_BYTES_MAX)
    tracemalloc.start()
    try:
        for at in range(0, len(data) - 1, 1000):
            decoder.feed(data[at : min(at + 1000, len(data) - 1)])
            assert decoder.next_frame() is None
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 1.5 * FRAME_BYTES_MAX
    decoder.feed(data[-1:])
    assert decoder.next_frame() is not None


MESSAGES: list[LinkMessage] = [
    hello(),
    hello(kind=1, grant=bytes(16), purpose="storage.chunk", features=["x"]),
    HelloOk(version=1, features=[], boot=3, attempt=9, agent="a"),
    Refused("evicted", "You were evicted.", False),
    Ping(1),
    Pong(2**53),
    IdleOffer(),
    IdleAgree(),
    IdleDecline(),
    Farewell("the agent stops"),
]


GOLDEN = [
    (
        Hello(1, 2, [], bytes(range(20)), 7, 3, "meshnode/0.1", 0),
        "0000002f029b01010290c414000102030405060708090a0b0c0d0e0f101112130703ac6d6573686e6f64652f302e3100c400a0",
    ),
    (HelloOk(1, [], 9, 0, "meshnode/0.1"), "0000001502970201900900ac6d6573686e6f64652f302e3100"),
    (Refused("evicted", "Gone.", False, 1, 1), "00000014029603a765766963746564a5476f6e652ec20101"),
    (Ping(5), "0000000402920405"),
    (Pong(5, 300), "0000000702930505cd012c"),
    (IdleOffer(), "00000003029106"),
    (IdleAgree(), "00000003029107"),
    (IdleDecline(), "00000003029108"),
    (Farewell("the agent stops"), "00000013029209af746865206167656e742073746f7073"),
]


@pytest.mark.parametrize(("message", "frame"), GOLDEN, ids=lambda value: type(value).__name__)
def test_the_bytes_of_every_link_message_stay_what_they_are(message: LinkMessage, frame: str) -> None:
    """Peers of another version speak these very bytes: a change here is a new protocol version."""
    assert encode_link_message(message).hex() == frame
    assert decode_link_message(bytes.fromhex(frame)[FRAME_HEADER_BYTES:]) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_link_messages_come_back_and_ignore_what_a_later_version_appends(message: LinkMessage) -> None:
    frame = encode_link_message(message)
    assert frame[4] == Channel.LINK
    assert decode_link_message(frame[5:]) == message
    longer = msgspec.msgpack.encode([*msgspec.msgpack.decode(frame[5:]), "news", {"more": [1]}])
    decoded = decode_link_message(longer)
    assert type(decoded) is type(message)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x91\x63",
        b"\x92\x04\xa1x",
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x09\xdb\xff\xff\xff\xff",
        b"\x92\x09\xa2\xff\xfe",
        b"\x93\x04\x01" + b"\x91" * 3000,
        msgspec.msgpack.encode([1, 1, 256, [], bytes(20), 1, 1, "a", 0]),
        msgspec.msgpack.encode([1, 1, 1, ["f"] * 33, bytes(20), 1, 1, "a", 0]),
        msgspec.msgpack.encode([1, 1, 1, [], bytes(19), 1, 1, "a", 0]),
        msgspec.msgpack.encode([1, 1, 1, [], bytes(20), 2**32, 1, "a", 0]),
        msgspec.msgpack.encode([1, 1, 1, [], bytes(20), 1, 1, "a" * 65, 0]),
        msgspec.msgpack.encode([1, 1, 1, [], bytes(20), 1, 1, "a", 2]),
        msgspec.msgpack.encode([1, 1, 1, [], bytes(20), 1, 1, "a", 0, bytes(17)]),
        bytes(5000),
    ],
)
def test_what_is_no_link_message_is_refused(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_link_message(payload)


def test_two_thousand_hostile_streams_raise_one_kind_of_error_or_wait() -> None:
    rng = random.Random(2_000)
    templates = [encode_link_message(message) for message in MESSAGES]
    refused = waiting = read = 0
    for _ in range(2_000):
        data = bytearray(rng.choice(templates) * rng.randrange(1, 4))
        for _ in range(rng.randrange(1, 8)):
            match rng.randrange(3):
                case 0:
                    data[rng.randrange(len(data))] = rng.randrange(256)
                case 1:
                    del data[rng.randrange(len(data)) :]
                    data += b"\0"
                case _:
                    at = rng.randrange(len(data))
                    data[at:at] = rng.randbytes(rng.randrange(1, 40))
        decoder = FrameDecoder(frame_bytes_max=HELLO_FRAME_BYTES_MAX)
        decoder.feed(bytes(data))
        try:
            while (frame := decoder.next_frame()) is not None:
                decode_link_message(frame.payload)
                read += 1
            waiting += 1
        except RemoteProtocolError:
            refused += 1
    assert refused > 500
    assert waiting > 50
    assert read > 50


def test_versions_meet_at_the_highest_common_one_or_both_ranges_are_named() -> None:
    assert agree(Versions(1, 3), Versions(2, 5)) == 3
    assert agree(Versions(2, 5), Versions(1, 3)) == 3
    assert agree(Versions(1, 1), Versions(1, 1)) == 1
    assert agree(Versions(1, 1), Versions(2, 3)) is None
    assert agree(Versions(4, 4), Versions(2, 3)) is None
    refused = refuse_versions(Versions(2, 3), Versions(1, 1))
    assert refused.code == "incompatible_version"
    assert not refused.retryable
    assert "2 to 3" in refused.message
    assert "the other 1" in refused.message
    assert refused.message.endswith("Update meshnode on that node.")
    assert (refused.version_min, refused.version_max) == (2, 3)
    assert refuse_versions(Versions(1, 1), Versions(2, 3)).message.endswith("on this node.")


def judge(me: NodeId, peer: NodeId, *, greeting: bool, standing: Standing | None = None) -> Verdict:
    return judge_dial(me=me, peer=peer, hello=hello(), greeting=greeting, standing=standing)


def test_of_two_dials_that_cross_the_lower_ids_survives_on_both_sides() -> None:
    assert judge(LOW, HIGH, greeting=True) is Verdict.DUPLICATE
    assert judge(HIGH, LOW, greeting=True) is Verdict.ACCEPT
    # A dial that has not got as far as HELLO may lead nowhere: it refuses nobody.
    assert judge(LOW, HIGH, greeting=False) is Verdict.ACCEPT
    assert judge(HIGH, LOW, greeting=False) is Verdict.ACCEPT


@pytest.mark.parametrize(
    ("standing", "verdict"),
    [
        (Standing(boot=5, attempt=2), Verdict.ACCEPT),
        (Standing(boot=5, attempt=3), Verdict.OBSOLETE),
        (Standing(boot=5, attempt=4), Verdict.OBSOLETE),
        (Standing(boot=4, attempt=9), Verdict.ACCEPT),
        (Standing(boot=6, attempt=0), Verdict.OBSOLETE),
    ],
)
def test_a_standing_link_yields_to_a_newer_dial_only(standing: Standing, verdict: Verdict) -> None:
    for me, peer in ((LOW, HIGH), (HIGH, LOW)):
        assert judge(me, peer, greeting=False, standing=standing) is verdict


def test_every_interleaving_of_two_dials_ends_in_exactly_one_link() -> None:
    """All orders in which two nodes that dial each other may send and read their HELLOs and answers."""
    outcomes: set[tuple[str, ...]] = set()
    _explore({}, [], outcomes)
    assert outcomes == {("high",), ("low",)}


def _explore(state: dict[str, object], path: list[str], outcomes: set[tuple[str, ...]]) -> None:
    """One model of the pool's rule: what each side does with a HELLO and with an answer, in every order."""
    ids = {"low": LOW, "high": HIGH}
    enabled = []
    for side, other in (("low", "high"), ("high", "low")):
        if not state.get(f"{side} sent") and not state.get(f"{side} link") and not state.get(f"{side} gave up"):
            enabled.append(("send", side, other))
        if state.get(f"{side} sent") and not state.get(f"{side} answered"):
            enabled.append(("read hello", other, side))
        if state.get(f"{side} answered") and not state.get(f"{side} heard"):
            enabled.append(("read answer", side, other))
    if not enabled:
        links = {state.get("low link"), state.get("high link")}
        assert len(links) == 1, path
        assert None not in links, path
        outcomes.add((str(links.pop()),))
        return
    for action, side, other in enabled:
        after = dict(state)
        if action == "send":
            after[f"{side} sent"] = after[f"{side} greeting"] = True
        elif action == "read hello":
            # `other` dialled; its only dial has number 1. A link that `other` answered tells that dial 1 is given up.
            standing = None if not after.get(f"{side} link") else Standing(5, int(bool(after.get(f"{side} knows"))))
            verdict = judge_dial(
                me=ids[side],
                peer=ids[other],
                hello=hello(attempt=1),
                greeting=bool(after.get(f"{side} greeting")),
                standing=standing,
            )
            after[f"{other} answered"] = verdict.value
            if verdict is Verdict.ACCEPT:
                after[f"{side} link"] = other
                after[f"{side} greeting"] = False
                after[f"{side} gave up"] = True
        else:
            verdict_value, greeting = after[f"{side} answered"], after.get(f"{side} greeting")
            after[f"{side} heard"] = True
            after[f"{side} greeting"] = False
            if verdict_value == "accept" and greeting:
                after[f"{side} link"] = side
                # HELLO_OK carries the highest number under which the answerer ever dialled.
                after[f"{side} knows"] = after.get(f"{other} sent")
        _explore(after, [*path, f"{action} {side}"], outcomes)
