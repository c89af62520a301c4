"""Case 37, stages: hostile frames, from members that have no part in a pipeline and from neighbours that do.

Whoever sends them is named and its stream ends; no engine, no neighbour and no other session is hurt by it.
"""

import contextlib
import struct
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from msgspec.structs import replace

from meshnode.kernel.calls import Granted
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream, PeerMethod
from meshnode.llm.service import host as module
from meshnode.llm.service.calls import Attach, frames_of
from protocol.ids import NodeId, node_id_bytes
from protocol.sharding.frames import (
    Accepted,
    Cancel,
    Finish,
    Frame,
    Kind,
    Open,
    Pieces,
    RefusalCode,
    Refused,
    SeqClose,
    SeqOpen,
    StageError,
    StageErrorCode,
    decode,
    encode,
    pack,
)
from protocol.sharding.pipelines import Pipeline
from protocol.sharding.sampling import Sampling
from protocol.sharding.steps import Run, Sampled, Taken, decode_tokens, encode_step_head, encode_tokens
from tests.kernel.links.world import settle
from tests.llm.engine.conftest import Cut
from tests.support.stage_world import GREEDY, PROMPT, Member, World, stages

SILENCE = "shown no life"
"""Of attackers who send nothing more every stream ends for that, soon and whatever they sent: it proves nothing."""

MINE, YOURS = b"m" * 16, b"y" * 16
LONG = Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)


@asynccontextmanager
async def two_stages_and_a_stranger(cut: Cut, folder: Path) -> AsyncIterator[tuple[World, Pipeline, list[Member]]]:
    async with stages(folder, cut(2)) as world:
        first, last, stranger = [await world.add() for _ in range(3)]
        pipeline = await world.load(first, last)
        yield world, pipeline, [first, last, stranger]


async def is_cut(stream: BulkStream) -> bool:
    """Whether the other side ends the stream, whatever it still says."""
    with trio.move_on_after(5):
        with contextlib.suppress(MeshError):
            while await stream.receive_some():
                pass
        return True
    return False


def ends_of(holder: Member, entry: Member) -> list[str]:
    """Why streams of this entry ended there, one after the other."""
    told = [fields for _, words, fields in holder.node.log.records if words == "an entry's stream ended"]
    return [str(fields["why"]) for fields in told if fields["peer"] == entry.id]


# ---- members that have no part in it


@pytest.mark.parametrize("role", ["previous", "last"])
async def test_case_37_a_stranger_gets_no_stream_of_a_neighbour(cut: Cut, tmp_path: Path, role: str) -> None:
    async with two_stages_and_a_stranger(cut, tmp_path) as (_, pipeline, (first, last, stranger)):
        for target in (first, last):
            with pytest.raises(MeshError) as caught:
                async with stranger.calls.stream(target.id, "llm.attach", Attach(pipeline.id, role)):
                    pass
            assert caught.value.code is ErrorCode.FORBIDDEN
        with pytest.raises(MeshError) as caught:
            async with stranger.calls.stream(first.id, "llm.attach", Attach(b"?" * 8, "entry")):
                pass
        assert caught.value.code is ErrorCode.NOT_FOUND


def of_no_entry(me: Member) -> dict[str, bytes]:
    """What an entry may not send, or not so."""
    node = node_id_bytes(me.id)
    return {
        "no msgpack": pack(Kind.CANCEL, b"\xc1"),
        "a cancel without a body": pack(Kind.CANCEL, b""),
        "an open without a body": pack(Kind.OPEN, b""),
        "nesting": pack(Kind.OPEN, b"\x91" * 5_000),
        "a lying count": pack(Kind.OPEN, b"\x96\xc4\x10" + MINE + b"\xc4\x14" + node + b"\xdd\xff\xff\xff\xff"),
        "another's name": encode(Open(MINE, bytes(20), PROMPT, GREEDY)),
        "a step": step([Run(0, 1, 0, 1)], sound(1)),
        "tokens": encode_tokens(Sampled(1, (Taken(0, (5,), Finish.NONE),))),
        "a session for a slot": encode(SeqOpen(MINE, 0, node)),
        "the end of a slot": encode(SeqClose(YOURS, 0)),
        "an error": encode(StageError(StageErrorCode.INTERNAL, "all is lost")),
        "a request of an agent": pack(Kind.CALIBRATE, b"\x93\x01\x10\x01"),
        "the order to stop": pack(Kind.STOP, b""),
        "an unknown kind": struct.pack("<IB", 1, 255),
        "a frame without end": struct.pack("<IB", 2**32 - 1, Kind.OPEN),
    }


def step(runs: list[Run], states: np.ndarray, number: int = 1) -> bytes:
    payload = states.astype(np.float32).tobytes()
    return encode_step_head(number, runs, hidden=True, payload_bytes=len(payload)) + payload


def sound(rows: int, width: int = 256) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, width))


@pytest.mark.parametrize("target", [0, 1], ids=["first", "last"])
async def test_case_37_what_no_entry_sends_costs_nobody_but_it(cut: Cut, tmp_path: Path, target: int) -> None:
    async with two_stages_and_a_stranger(cut, tmp_path) as (_, pipeline, members):
        *holders, stranger = members
        expected = await holders[0].ask(pipeline, session=YOURS)
        whys: list[str] = []
        for name, frame in of_no_entry(stranger).items():
            wanted = Attach(pipeline.id, "entry")
            async with stranger.calls.stream(members[target].id, "llm.attach", wanted) as stream:
                await stream.send_all(frame)
                assert await is_cut(stream), name
            assert [holder.stage(pipeline).state for holder in holders] == ["ready", "ready"], name
            await settle(lambda: len(ends_of(members[target], stranger)) == len(whys) + 1)  # noqa: B023 -- waited for
            whys = ends_of(members[target], stranger)
            assert SILENCE not in whys[-1], name
        assert await holders[1].ask(pipeline, session=MINE) == expected


async def test_case_37_without_the_check_any_member_ends_a_pipeline(
    cut: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def believe(self: module.StageHost, frame, peer) -> None:
        await self._give(frame)

    monkeypatch.setattr(module.StageHost, "take_from_entry", believe)
    async with (
        two_stages_and_a_stranger(cut, tmp_path) as (_, pipeline, (_, last, stranger)),
        stranger.calls.stream(last.id, "llm.attach", Attach(pipeline.id, "entry")) as stream,
    ):
        await stream.send_all(stranger.opening(MINE))
        await settle(lambda: last.stage(pipeline).state == "broken")


@pytest.mark.parametrize("defended", [True, False])
async def test_case_37_nobody_ends_the_session_of_another_entry(cut: Cut, tmp_path: Path, defended: bool) -> None:
    async with two_stages_and_a_stranger(cut, tmp_path) as (_, pipeline, (first, last, stranger)):
        # The engine sees to it, with the name that the agent vouches for; without that name it would end.
        named = stranger if defended else last
        async with last.entries.raw(YOURS) as heard:
            await last.entries.open(pipeline, YOURS, last.opening(YOURS, sampling=LONG))
            while not (isinstance(message := await heard.receive(), Pieces) and message.tokens):
                pass
            if defended:
                async with stranger.calls.stream(first.id, "llm.attach", Attach(pipeline.id, "entry")) as stream:
                    await stream.send_all(encode(Cancel(YOURS, node_id_bytes(named.id))))
                    await stream.send_all(stranger.opening(MINE))
                    await stream.receive_some()
            else:
                engine = first.hosts.engine(pipeline.id)
                await engine.send(encode(Cancel(YOURS, node_id_bytes(named.id))))
            finished = False
            with trio.move_on_after(15 if defended else 3):
                while not finished:
                    message = await heard.receive()
                    finished = isinstance(message, Pieces) and bool(message.finish)
            assert finished is defended


async def test_case_37_a_session_id_in_use_is_refused_and_a_prompt_too_long_too(cut: Cut, tmp_path: Path) -> None:
    async with two_stages_and_a_stranger(cut, tmp_path) as (_, pipeline, (_, last, stranger)):
        async with last.entries.raw(YOURS) as heard, stranger.entries.raw(YOURS) as other:
            await last.entries.open(pipeline, YOURS, last.opening(YOURS, sampling=LONG))
            assert isinstance(await heard.receive(), Accepted)
            await stranger.entries.open(pipeline, YOURS, stranger.opening(YOURS))
            refused = await other.receive()
            assert isinstance(refused, Refused)
            assert refused.code is RefusalCode.BAD_REQUEST
        for length in (600, 1_000_000):
            async with stranger.entries.raw(MINE) as other:
                await stranger.entries.open(pipeline, MINE, stranger.opening(MINE, (5,) * length))
                refused = await other.receive()
                assert isinstance(refused, Refused)
                assert refused.code is RefusalCode.CONTEXT_FULL
        assert len(await last.ask(pipeline, session=MINE)) == 12


# ---- neighbours


class Liar:
    """A member that holds a place in a pipeline and nothing else; what its neighbour sends it is read and kept."""

    def __init__(self, world: World, member: Member) -> None:
        self.member = member
        self.heard: list[Frame] = []

        async def attach(peer: NodeId, wanted: Attach) -> Granted:
            return member.calls.accept(peer, self._keep)

        member.node.methods["llm.attach"] = PeerMethod(Attach, attach)

    async def _keep(self, stream: BulkStream) -> None:
        async with aclosing(frames_of(stream, 1 << 24)) as frames:
            async for frame in frames:
                self.heard.append(frame)


@asynccontextmanager
async def beside_a_liar(cut: Cut, folder: Path, place: int) -> AsyncIterator[tuple[Pipeline, Member, BulkStream, Liar]]:
    """The liar has stage `place` of two; the stream is its own, to the honest neighbour."""
    async with stages(folder, cut(2)) as world:
        honest, lying = await world.add(), await world.add()
        liar = Liar(world, lying)
        nodes = [honest.id, honest.id]
        nodes[place] = lying.id
        pipeline = world.planned(nodes)
        await world.hold(honest, pipeline)
        await settle(lambda: world.is_ready(honest, pipeline), within_s=30)
        role = "previous" if place == 0 else "last"
        async with lying.calls.stream(honest.id, "llm.attach", Attach(pipeline.id, role)) as stream:
            yield pipeline, honest, stream, liar


ENTRY = bytes(20)
OPENED = encode(SeqOpen(MINE, 0, ENTRY, GREEDY, prompt_tokens=1))
NONSENSE = {
    "another width": step([Run(0, 1, 0, 1)], sound(1, 255)),
    "fewer rows than announced": step([Run(0, 9, 0, 1)], sound(1)),
    "more rows than any step has": step([Run(0, 300, 0, 1)], sound(300)),
    "rows and no payload": encode_step_head(1, [Run(0, 65535, 0, 1)], hidden=True, payload_bytes=0),
    "more outputs than rows": step([Run(0, 1, 0, 60)], sound(1)),
    "a slot twice": step([Run(0, 1, 0, 1), Run(0, 1, 1, 1)], sound(2)),
    "a slot that is not": step([Run(200, 1, 0, 1)], sound(1)),
    "a position beyond all": step([Run(0, 1, 2**32 - 1, 1)], sound(1)),
    "tokens instead of states": pack(Kind.STEP, struct.pack("<BHIHHIHi", 0, 1, 1, 0, 1, 0, 1, 5)),
    "a step of no bytes": pack(Kind.STEP, b""),
    "half a run": pack(Kind.STEP, struct.pack("<BHI", 1, 2, 1) + bytes(15)),
    "a lying count of runs": pack(Kind.STEP, struct.pack("<BHI", 1, 65535, 1)),
    "a session in no slot": encode(SeqOpen(MINE, 200, ENTRY)),
    "no msgpack": pack(Kind.SEQ_OPEN, b"\xc1"),
    "nesting": pack(Kind.SEQ_OPEN, b"\x91" * 5_000),
    "tokens of a last stage": encode_tokens(Sampled(1, ())),
    "an open": encode(Open(MINE, ENTRY, PROMPT, GREEDY)),
    "a request of an agent": pack(Kind.CALIBRATE, b"\x93\x01\x10\x01"),
    "the order to stop": pack(Kind.STOP, b""),
    "a frame without end": struct.pack("<IB", 2**32 - 1, Kind.STEP),
    "a frame of no bytes": bytes(4),
}


@pytest.mark.parametrize("frame", NONSENSE.values(), ids=NONSENSE)
async def test_case_37_a_stage_that_sends_nonsense_is_named_and_hurts_no_engine(
    cut: Cut, tmp_path: Path, frame: bytes
) -> None:
    async with beside_a_liar(cut, tmp_path, 0) as (pipeline, honest, stream, _):
        pid = honest.hosts.engine(pipeline.id).pid
        await stream.send_all(OPENED + frame)
        await settle(lambda: honest.stage(pipeline).state == "broken")
        assert honest.stage(pipeline).blamed == 0
        assert SILENCE not in honest.stage(pipeline).words
        engine = honest.hosts.engine(pipeline.id)
        assert engine.pid == pid
        assert await engine.tokenise("alive")


BAD_STEPS = {
    "NaN": (step([Run(0, 1, 0, 1)], np.full((1, 256), np.nan)), StageErrorCode.NOT_FINITE),
    "infinity": (step([Run(0, 1, 0, 1)], np.full((1, 256), -np.inf)), StageErrorCode.NOT_FINITE),
    "numbers that overflow": (step([Run(0, 1, 0, 1)], np.full((1, 256), 1e30)), StageErrorCode.NOT_FINITE),
    "out of order": (step([Run(0, 1, 7, 1)], sound(1)), StageErrorCode.OUT_OF_ORDER),
}


@pytest.mark.parametrize(("frame", "code"), BAD_STEPS.values(), ids=BAD_STEPS)
async def test_case_37_states_that_cannot_be_end_their_session_alone_and_name_the_sender(
    cut: Cut, tmp_path: Path, frame: bytes, code: StageErrorCode
) -> None:
    async with beside_a_liar(cut, tmp_path, 0) as (pipeline, honest, stream, liar):
        other = encode(SeqOpen(YOURS, 1, ENTRY, GREEDY, prompt_tokens=1))
        await stream.send_all(OPENED + other + frame + step([Run(1, 1, 0, 1)], sound(1), number=2))
        await settle(lambda: any(one.kind == Kind.TOKENS and len(one.body) > 10 for one in liar.heard))
        errors = [decode(one) for one in liar.heard if one.kind == Kind.ERROR]
        assert [(error.session, error.code, error.stage) for error in errors] == [(MINE, code, 0)]
        assert honest.stage(pipeline).state == "ready"


async def test_case_37_replays_and_steps_of_nobodys_slot_change_nothing(cut: Cut, tmp_path: Path) -> None:
    async with beside_a_liar(cut, tmp_path, 0) as (pipeline, honest, stream, liar):
        one = step([Run(0, 1, 0, 1)], sound(1))
        nobodys = step([Run(3, 1, 0, 1)], sound(1), number=9)
        closed = encode(SeqClose(YOURS, 0))
        await stream.send_all(OPENED + one + one + one + nobodys + closed + closed + one + OPENED + one)
        await settle(lambda: len([frame for frame in liar.heard if frame.kind == Kind.TOKENS]) == 6)
        answers = [decode_tokens(frame.body, vocabulary=0) for frame in liar.heard if frame.kind == Kind.TOKENS]
        given = [[run.tokens for run in answer.runs] for answer in answers]
        # The same rows at the same place give the same token; those of no session give none.
        assert given == [given[0], given[0], given[0], [], [], given[0]]
        assert len(given[0]) == 1
        assert honest.stage(pipeline).state == "ready"


LYING_TOKENS = {
    "a step that was never sent": encode_tokens(Sampled(77, ())),
    "a slot that was not in it": encode_tokens(Sampled(1, (Taken(3, (5,), Finish.NONE),))),
    "more tokens than outputs": encode_tokens(Sampled(1, (Taken(0, (5, 6, 7), Finish.NONE),))),
    "a token outside the vocabulary": encode_tokens(Sampled(1, (Taken(0, (10**6,), Finish.NONE),))),
    "a negative token": encode_tokens(Sampled(1, (Taken(0, (-1,), Finish.NONE),))),
    "a finish that is none": pack(Kind.TOKENS, struct.pack("<IHHBBi", 1, 1, 0, 1, 9, 5)),
    "half an answer": pack(Kind.TOKENS, struct.pack("<IH", 1, 2) + bytes(5)),
    "a lying count": pack(Kind.TOKENS, struct.pack("<IH", 1, 65535)),
    "an error that is none": pack(Kind.ERROR, b"\xc1"),
    "a step": step([Run(0, 1, 0, 1)], sound(1)),
    "an unknown kind": struct.pack("<IB", 1, 200),
}


@pytest.mark.parametrize("frame", LYING_TOKENS.values(), ids=LYING_TOKENS)
async def test_case_37_a_last_stage_that_lies_is_named_and_the_first_one_lives(
    cut: Cut, tmp_path: Path, frame: bytes
) -> None:
    async with beside_a_liar(cut, tmp_path, 1) as (pipeline, honest, stream, liar):
        async with liar.member.calls.stream(honest.id, "llm.attach", Attach(pipeline.id, "entry")) as entry:
            await entry.send_all(liar.member.opening(MINE, PROMPT))
            await settle(lambda: any(one.kind == Kind.STEP for one in liar.heard))
            await stream.send_all(frame)
            await settle(lambda: honest.stage(pipeline).state == "broken")
        assert honest.stage(pipeline).blamed == 1
        assert SILENCE not in honest.stage(pipeline).words
        assert await honest.hosts.engine(pipeline.id).tokenise("alive")


# ---- a stage towards its entry

TO_AN_ENTRY = {
    "another kind": encode(SeqClose(MINE, 0)),
    "no msgpack": pack(Kind.PIECES, b"\xc1"),
    "a frame without end": struct.pack("<IB", 2**32 - 1, Kind.PIECES),
    "a lying count": pack(Kind.PIECES, b"\x93\xc4\x10" + MINE + b"\x00\xdd\xff\xff\xff\xff"),
    "an unknown finish": pack(Kind.PIECES, b"\x95\xc4\x10" + MINE + b"\x00\x90\x90\x63"),
}


@pytest.mark.parametrize("frame", TO_AN_ENTRY.values(), ids=TO_AN_ENTRY)
async def test_case_37_an_entry_drops_a_stage_that_sends_nonsense(cut: Cut, tmp_path: Path, frame: bytes) -> None:
    async with stages(tmp_path, cut(2)) as world:
        honest, lying = await world.add(), await world.add()

        async def serve(stream: BulkStream) -> None:
            await stream.receive_some()
            await stream.send_all(encode(Accepted(MINE, 0)) + frame)
            await stream.receive_some()

        async def attach(peer: NodeId, wanted: Attach) -> Granted:
            return lying.calls.accept(peer, serve)

        lying.node.methods["llm.attach"] = PeerMethod(Attach, attach)
        pipeline = world.planned([lying.id, "f" * 32])
        pipeline = replace(pipeline, stages=(replace(pipeline.stages[0], end=8),))
        async with honest.entries.raw(MINE) as heard:
            await honest.entries.open(pipeline, MINE, honest.opening(MINE))
            assert isinstance(await heard.receive(), Accepted)
            lost = await heard.receive()
            assert isinstance(lost, MeshError)
            assert lost.detail["node_id"] == lying.id
            assert SILENCE not in lost.message


async def test_case_37_what_a_peers_stream_makes_fail_stays_with_it(
    cut: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of ours that a peer finds must not end the agent."""

    async def fails(self: module.StageHost, frame, peer) -> None:
        raise RecursionError("found by a peer")

    monkeypatch.setattr(module.StageHost, "take_from_entry", fails)
    async with two_stages_and_a_stranger(cut, tmp_path) as (_, pipeline, (first, _, stranger)):
        async with stranger.calls.stream(first.id, "llm.attach", Attach(pipeline.id, "entry")) as stream:
            await stream.send_all(stranger.opening(MINE))
            assert await is_cut(stream)
        assert ("exception", "a peer's stream failed") in [record[:2] for record in first.node.log.records]
