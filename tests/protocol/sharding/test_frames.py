"""Frames of the pipeline: what goes in comes out, and no bytes do anything but raise FrameError."""

import math
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.sharding import frames
from protocol.sharding.frames import (
    Accepted,
    Alternative,
    Cancel,
    Embedding,
    Finish,
    Frame,
    FrameError,
    Kind,
    Message,
    Open,
    Pieces,
    RefusalCode,
    Refused,
    SeqClose,
    SeqOpen,
    StageError,
    StageErrorCode,
    Stats,
    decode,
    encode,
)
from protocol.sharding.sampling import Grammar, GrammarKind, Sampling, seed_of
from protocol.sharding.steps import (
    FrameDecoder,
    Run,
    Sampled,
    Taken,
    decode_step,
    decode_tokens,
    encode_step_head,
    encode_tokens,
    step_bytes_max,
)

ID, NODE = b"s" * 16, b"n" * 20
SAMPLING = Sampling(
    temperature=0.5,
    logit_bias={3: -math.inf, 4: 1.5},
    grammar=Grammar(GrammarKind.GBNF, 'root ::= "a"'),
    logprobs=3,
)
MESSAGES = [
    Open(ID, NODE, (1, 2, 3), SAMPLING, (4,), "mean"),
    Cancel(ID, NODE),
    Accepted(ID, 3, 17),
    Accepted(ID),
    Refused(ID, RefusalCode.BUSY, "later", True),
    SeqOpen(ID, 1, NODE, SAMPLING, (5, 6), (1,), "", 9),
    SeqClose(ID, 1),
    Pieces(ID, 4, (7,), (b"\xff",), Finish.EOG, ((Alternative(7, -0.5, b"x"),),)),
    Embedding(ID, bytes(16), 4),
    StageError(StageErrorCode.NOT_FINITE, "NaN", ID, 2, 1),
    Stats(0.5, 0.1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
]


def one_frame(data: bytes) -> Frame:
    decoder = FrameDecoder(bytes_max=1 << 20)
    decoder.feed(data)
    frame = decoder.next_frame()
    assert frame is not None
    assert decoder.next_frame() is None
    return frame


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_way(message: Message) -> None:
    assert decode(one_frame(encode(message))) == message


def test_every_message_is_tried_above() -> None:
    assert {type(message) for message in MESSAGES} == set(frames._MESSAGES)


@given(st.integers(0, 255), st.binary(max_size=300))
def test_hostile_bodies_raise_one_error(kind: int, body: bytes) -> None:
    with pytest.raises(FrameError):
        decode(Frame(kind, body + b"\xc1"))


@given(st.sampled_from(MESSAGES), st.data())
def test_damaged_messages_decode_or_raise_one_error(message: Message, data: st.DataObject) -> None:
    body = bytearray(one_frame(encode(message)).body)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(Frame(frames._MESSAGES[type(message)], bytes(body)))
    except FrameError:
        return
    assert type(decoded) is type(message)


NONSENSE = {
    "temperature is NaN": {1: math.nan},
    "temperature below 0": {1: -1.0},
    "top_p above 1": {3: 1.5},
    "negative bias token": {11: {-1: 0.0}},
    "bias is NaN": {11: {1: math.nan}},
    "too many logprobs": {12: 21},
    "max_tokens negative": {0: -1},
    "penalty window too long": {9: 1 << 20},
}


@pytest.mark.parametrize("changes", NONSENSE.values(), ids=NONSENSE)
def test_sampling_that_makes_no_sense_is_refused(changes: dict[int, object]) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(Sampling()))
    for place, value in changes.items():
        fields[place] = value
    with pytest.raises(FrameError):
        decode(Frame(Kind.OPEN, msgspec.msgpack.encode([ID, NODE, [1], fields])))


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    assert seed_of(1, 2) == seed_of(1, 2)
    assert len({seed_of(seed, index) for seed in range(8) for index in range(64)}) == 512


# ---- steps

WIDTH = 3


def step_body(number: int, runs: list[Run], payload: bytes, *, hidden: bool) -> bytes:
    return encode_step_head(number, runs, hidden=hidden, payload_bytes=len(payload))[5:] + payload


def read(body: bytes, *, rows_max: int = 64, vocabulary: int = 100):
    return decode_step(body, embedding_width=WIDTH, rows_max=rows_max, vocabulary=vocabulary)


def test_a_step_of_tokens_survives_the_way() -> None:
    runs = [Run(0, 3, 5, 2, (8,)), Run(7, 0, 0, 0), Run(2, 1, 0, 1)]
    body = step_body(9, runs, struct.pack("<4i", 6, 7, 8, 9), hidden=False)
    step = read(body)
    assert (step.number, step.runs, step.hidden, step.rows) == (9, tuple(runs), False, 4)
    assert bytes(step.payload) == struct.pack("<4i", 6, 7, 8, 9)


def test_a_step_of_states_carries_the_guesses() -> None:
    runs = [Run(0, 3, 5, 3, (7, 8)), Run(1, 1, 0, 1)]
    body = step_body(1, runs, bytes(4 * 4 * WIDTH), hidden=True)
    assert read(body).runs == tuple(runs)


def test_one_token_at_a_boundary_is_its_state_and_little_more() -> None:
    frame = encode_step_head(1, [Run(0, 1, 5, 1)], hidden=True, payload_bytes=4 * 2048)
    assert len(frame) <= 42


STEP_NONSENSE = {
    "empty": b"",
    "unknown flag": struct.pack("<BHI", 2, 0, 1),
    "runs that are not there": struct.pack("<BHI", 0, 5, 1),
    "too many runs": struct.pack("<BHI", 0, 65535, 1) + bytes(10 * 65535),
    "a slot twice": step_body(1, [Run(1, 1, 0, 0), Run(1, 1, 1, 0)], bytes(8), hidden=False),
    "a slot too high": step_body(1, [Run(999, 1, 0, 0)], bytes(4), hidden=False),
    "more outputs than rows": step_body(1, [Run(0, 1, 0, 2)], bytes(4), hidden=False),
    "a position beyond all contexts": step_body(1, [Run(0, 1, 2**32 - 1, 0)], bytes(4), hidden=False),
    "too many rows": step_body(1, [Run(0, 65, 0, 0)], bytes(4 * 65), hidden=False),
    "a payload too short": step_body(1, [Run(0, 2, 0, 0)], bytes(4 * WIDTH), hidden=True),
    "a payload too long": step_body(1, [Run(0, 1, 0, 0)], bytes(4 * WIDTH + 1), hidden=True),
    "another width": step_body(1, [Run(0, 1, 0, 0)], bytes(4 * (WIDTH + 1)), hidden=True),
    "a token outside": step_body(1, [Run(0, 1, 0, 1)], struct.pack("<i", 100), hidden=False),
    "a negative token": step_body(1, [Run(0, 1, 0, 1)], struct.pack("<i", -1), hidden=False),
    "a guess outside": step_body(1, [Run(0, 2, 0, 2, (100,))], bytes(8 * WIDTH), hidden=True),
}


@pytest.mark.parametrize("body", STEP_NONSENSE.values(), ids=STEP_NONSENSE)
def test_steps_that_make_no_sense_are_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        read(body)


@given(st.binary(max_size=200))
def test_hostile_steps_raise_one_error_or_add_up(body: bytes) -> None:
    try:
        step = read(body)
    except FrameError:
        return
    assert len(step.payload) == step.rows * 4 * (WIDTH if step.hidden else 1)


@given(
    st.integers(0, 2**32 - 1),
    st.lists(
        st.tuples(st.integers(0, 255), st.lists(st.integers(0, 99), max_size=8), st.sampled_from(Finish)), max_size=8
    ),
)
def test_tokens_survive_the_way(step: int, runs: list[tuple[int, list[int], Finish]]) -> None:
    sampled = Sampled(step, tuple(Taken(slot, tuple(tokens), finish) for slot, tokens, finish in runs))
    frame = one_frame(encode_tokens(sampled))
    assert frame.kind == Kind.TOKENS
    assert decode_tokens(frame.body, vocabulary=100) == sampled


@given(st.binary(max_size=60))
def test_hostile_tokens_raise_one_error(body: bytes) -> None:
    try:
        sampled = decode_tokens(body, vocabulary=100)
    except FrameError:
        return
    assert all(token < 100 for run in sampled.runs for token in run.tokens)


# ---- the stream


@given(st.lists(st.sampled_from(MESSAGES), max_size=6), st.lists(st.integers(1, 200), max_size=40))
def test_frames_are_found_however_the_bytes_are_cut(messages: list[Message], cuts: list[int]) -> None:
    data = b"".join(map(encode, messages))
    decoder, found, at = FrameDecoder(bytes_max=1 << 20), [], 0
    for size in [*cuts, len(data) + 1]:
        decoder.feed(data[at : at + size])
        at += size
        while (frame := decoder.next_frame()) is not None:
            found.append(decode(frame))
    assert found == messages


@pytest.mark.parametrize("length", [0, 101, 2**32 - 1])
def test_a_length_is_refused_by_its_header(length: int) -> None:
    decoder = FrameDecoder(bytes_max=100)
    decoder.feed(length.to_bytes(4, "little"))
    with pytest.raises(FrameError):
        decoder.next_frame()


def test_the_limit_of_a_model_lets_its_longest_step_pass() -> None:
    runs = [Run(slot, 1, 0, 1) for slot in range(64)]
    assert len(step_body(1, runs, bytes(64 * 4 * WIDTH), hidden=True)) <= step_bytes_max(WIDTH, 64)


def test_who_may_send_what_is_disjoint() -> None:
    sets = [frames.FROM_ENTRY, frames.FROM_PREVIOUS, frames.TO_FIRST]
    assert len(frozenset().union(*sets)) == sum(map(len, sets))
    assert all(kind < Kind.LOADING for kind in frozenset().union(*sets, frames.TO_ENTRY))
