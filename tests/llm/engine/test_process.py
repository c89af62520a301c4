"""Engine processes that crash, hang, are killed, lied to or orphaned: always an event with a reason, never more."""

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
import trio
import trio.testing
from msgspec.structs import replace

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.engine import process
from meshnode.llm.engine.client import Ended, EndReason, Engine, EnvelopeParser, Outgoing
from meshnode.llm.engine.environment import engine_environment
from meshnode.llm.engine.process import Patience, open_engine
from meshnode.llm.engine.spec import LOAD, StageSpec
from protocol.sharding.frames import (
    Destination,
    FrameError,
    Kind,
    Open,
    SeqOpen,
    StageError,
    StageErrorCode,
    encode,
    pack,
)
from protocol.sharding.sampling import Sampling
from protocol.sharding.steps import Run, decode_tokens, encode_step_head
from scripts.benchmarks.pipeline import ENTRY, StageLostError, open_pipeline
from tests.house.source import ROOT
from tests.llm.engine.conftest import Cut

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = [(index * 7) % 300 + 5 for index in range(60)]
SESSION, OTHER = b"s" * 16, b"o" * 16


def whole(cut: Cut, spec: StageSpec) -> StageSpec:
    [(path, layers)] = cut(1)
    return replace(spec, path=path, layers=layers)


def last_of_two(cut: Cut, spec: StageSpec) -> StageSpec:
    _, (path, layers) = cut(2)
    return replace(spec, path=path, layers=layers, stage=1, stages=2)


async def next_item(engine: Engine, kind: Kind) -> Outgoing:
    with trio.fail_after(20):
        async for item in engine.frames():
            assert isinstance(item, Outgoing), item
            if item.kind == kind:
                return item
    raise AssertionError("the engine ended")


async def ending(engine: Engine) -> Ended:
    with trio.fail_after(20):
        async for item in engine.frames():
            if isinstance(item, Ended):
                return item
    raise AssertionError("an iteration over frames ends with the end")


# ---- ends


async def test_progress_is_shown_and_the_process_is_gone_afterwards(cut: Cut, spec: StageSpec) -> None:
    shown: list[float] = []
    async with open_engine(whole(cut, spec), progress=shown.append) as engine:
        pid = engine.pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)
    assert engine.ended is not None
    assert engine.ended.reason is EndReason.CLOSED
    assert engine.ended.status == 0
    assert shown
    assert all(0 <= share <= 1 for share in shown)
    with pytest.raises(MeshError):
        await engine.tokenise("too late")


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel shares processors out by process")
async def test_an_engine_is_as_nice_to_other_sessions_as_its_agent_and_more(cut: Cut, spec: StageSpec) -> None:
    # It has a session of its own, and the kernel shares processors out by session first.
    async with open_engine(replace(whole(cut, spec), nice=3)) as engine:
        wanted = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 3)
        assert os.getpriority(os.PRIO_PROCESS, engine.pid) == wanted
        group = Path(f"/proc/{engine.pid}/autogroup")
        assert (await trio.to_thread.run_sync(group.read_text)).split()[-1] == str(wanted)


async def test_what_fails_in_the_block_comes_out_as_it_is(cut: Cut, spec: StageSpec) -> None:
    with pytest.raises(KeyError):
        async with open_engine(whole(cut, spec)):
            raise KeyError


async def test_a_killed_engine_is_an_event(cut: Cut, spec: StageSpec) -> None:
    async with open_engine(whole(cut, spec)) as engine:
        os.kill(engine.pid, signal.SIGKILL)
        ended = await ending(engine)
        assert (ended.reason, ended.status) == (EndReason.KILLED, -signal.SIGKILL)
        with pytest.raises(MeshError) as caught:
            await engine.send(encode(Open(SESSION, ENTRY, (1,))))
        assert caught.value.code is ErrorCode.UNAVAILABLE


async def test_a_request_in_the_air_fails_when_the_engine_dies(cut: Cut, spec: StageSpec) -> None:
    async with open_engine(whole(cut, spec)) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(MeshError):
                    await engine.tokenise("text")

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.05)
            os.kill(engine.pid, signal.SIGKILL)


async def test_a_stopped_engine_is_found_hung_and_removed(cut: Cut, spec: StageSpec) -> None:
    async with open_engine(whole(cut, spec), beats_lost_s=1.5) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        began = trio.current_time()
        ended = await ending(engine)
        assert ended.reason is EndReason.HUNG
        assert trio.current_time() - began < 4
        assert not psutil.pid_exists(engine.pid)


async def test_one_step_over_its_deadline_is_a_hang(cut: Cut, spec: StageSpec) -> None:
    spec = replace(whole(cut, spec), rows_max=4096, prefill_rows=4096, context=4096, cells=4096, slots=1)
    async with open_engine(spec, patience=Patience(unknown_s=0.05)) as engine:
        await engine.send(encode(Open(SESSION, ENTRY, tuple([5] * 4000), GREEDY)))
        assert (await ending(engine)).reason is EndReason.HUNG


async def test_an_aborting_engine_leaves_its_words(cut: Cut, spec: StageSpec) -> None:
    async with open_engine(whole(cut, spec)) as engine:
        os.kill(engine.pid, signal.SIGABRT)
        ended = await ending(engine)
    assert (ended.reason, ended.status) == (EndReason.CRASHED, -signal.SIGABRT)
    assert "SIGABRT" in ended.words


async def test_a_dead_stage_leaves_the_other_alive(cut: Cut, spec: StageSpec) -> None:
    async with open_pipeline(cut(2), spec) as pipeline:
        async with pipeline.session(PROMPT, replace(GREEDY, max_tokens=400)) as events:
            await events.receive()
            os.kill(pipeline.engines[1].pid, signal.SIGKILL)
            with trio.fail_after(10):
                async for _ in events:
                    pass
        assert pipeline.ended[1].reason is EndReason.KILLED
        assert await pipeline.engines[0].tokenise("still here")
        with pytest.raises((MeshError, StageLostError)):
            await pipeline.engines[1].tokenise("not here")


FILES = {
    "no such file": lambda path: path.with_name("nothing.gguf"),
    "no GGUF": lambda path: written(path, b"this is no model" * 100),
    "cut off": lambda path: written(path, path.read_bytes()[:-100_000]),
}


def written(path: Path, data: bytes) -> Path:
    made = path.with_name(f"bad-{len(data)}.gguf")
    made.write_bytes(data)
    return made


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
async def test_files_that_cannot_be_loaded(cut: Cut, spec: StageSpec, llama: Path, make) -> None:
    spec = replace(whole(cut, spec), path=str(make(llama)))
    children = len(psutil.Process().children())
    with pytest.raises(MeshError) as caught:
        async with open_engine(spec):
            pass
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert caught.value.detail["reason"] == EndReason.LOAD_FAILED
    assert len(psutil.Process().children()) == children


async def test_a_wrong_number_of_layers_is_said(cut: Cut, spec: StageSpec) -> None:
    with pytest.raises(MeshError, match="8 layers"):
        async with open_engine(replace(whole(cut, spec), layers=3)):
            pass


async def test_the_words_of_an_engine_stand_though_its_beats_end_with_them(
    cut: Cut, spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, said = process._Watch(whole(cut, spec), process.PATIENCE, 1.0), trio.Event()
    why = Ended(EndReason.LOAD_FAILED, "no", None)

    async def beats_stop() -> None:
        await said.wait()

    class Loading:
        async def _read_until_loaded(self, _progress: object) -> Ended:
            await trio.testing.wait_all_tasks_blocked()
            said.set()
            return why

    monkeypatch.setattr(watch, "_beats_stop", beats_stop)
    assert await watch._loaded_or_lost(Loading(), None) is why


async def test_memory_that_does_not_suffice_is_said(cut: Cut, spec: StageSpec) -> None:
    spec = replace(whole(cut, spec), context=10_000_000, cells=40_000_000, memory_bytes_max=8 << 30)
    with pytest.raises(MeshError) as caught:
        async with open_engine(spec):
            pass
    assert caught.value.detail["reason"] == EndReason.OUT_OF_MEMORY


async def test_a_cancelled_open_leaves_nothing(cut: Cut, spec: StageSpec) -> None:
    before = {child.pid for child in psutil.Process().children()}
    descriptors = psutil.Process().num_fds()
    for delay in (0.0, 0.02, 0.1, 0.25):
        with trio.move_on_after(delay):
            async with open_engine(whole(cut, spec)):
                await trio.sleep_forever()
        assert {child.pid for child in psutil.Process().children()} == before
    assert psutil.Process().num_fds() <= descriptors + 1


async def test_an_engine_without_llama_cpp_says_how_to_get_it(
    cut: Cut, spec: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")")

    def lacking(environment: Mapping[str, str], *, threads: int) -> dict[str, str]:
        return engine_environment(environment, threads=threads) | {"PYTHONPATH": str(tmp_path)}

    monkeypatch.setattr(process, "engine_environment", lacking)
    with pytest.raises(MeshError) as caught:
        async with open_engine(whole(cut, spec)):
            pass
    assert caught.value.detail["reason"] == EndReason.NOT_INSTALLED


def test_no_secret_travels_in_the_environment() -> None:
    environment = {"PATH": "/bin", "MESHNODE_TOKEN": "secret", "AWS_SECRET_ACCESS_KEY": "secret", "HF_TOKEN": "secret"}
    made = engine_environment(environment, threads=3)
    assert "secret" not in made.values()
    assert (made["PATH"], made["OMP_NUM_THREADS"]) == ("/bin", "3")


async def test_what_an_engine_gave_up(cut: Cut, spec: StageSpec) -> None:
    async with open_engine(whole(cut, replace(spec, nice=5))) as engine:
        running = psutil.Process(engine.pid)
        assert running.nice() == min(19, psutil.Process().nice() + 5)
        assert int(await trio.Path(f"/proc/{engine.pid}/oom_score_adj").read_text()) > 500
        if engine.facts.isolated:
            assert os.readlink(f"/proc/{engine.pid}/ns/net") != os.readlink("/proc/self/ns/net")


ORPHAN = """
import sys, trio, os, signal
from meshnode.llm.engine.process import Patience, open_engine
from meshnode.llm.engine.spec import StageSpec
async def main():
    async with open_engine(StageSpec(path=sys.argv[1], layers=8, threads=1, cells=512, context=256)) as engine:
        print(engine.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


def test_an_engine_ends_with_its_agent(llama: Path) -> None:
    agent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(llama)], stdout=subprocess.PIPE, cwd=ROOT)
    with agent:
        assert agent.stdout is not None
        engine = psutil.Process(int(agent.stdout.readline()))
        agent.kill()
    engine.wait(timeout=10)


# ---- lies


def step_of(number: int, runs: list[Run], states: np.ndarray) -> bytes:
    payload = states.astype(np.float32).tobytes()
    return encode_step_head(number, runs, hidden=True, payload_bytes=len(payload)) + payload


async def opened(engine: Engine, session: bytes, slot: int) -> None:
    await engine.send(encode(SeqOpen(session, slot, ENTRY, GREEDY, prompt_tokens=1)))


def sound(rows: int = 1) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 256))


BAD_STATES = {"NaN": np.nan, "infinite": np.inf, "too large": 1e30}


@pytest.mark.parametrize("value", BAD_STATES.values(), ids=BAD_STATES)
async def test_states_that_are_no_numbers_end_one_session_alone(cut: Cut, spec: StageSpec, value: float) -> None:
    async with open_engine(last_of_two(cut, spec)) as engine:
        await opened(engine, SESSION, 0)
        await opened(engine, OTHER, 1)
        states = sound(2)
        states[0, 17] = value
        await engine.send(step_of(1, [Run(0, 1, 0, 1), Run(1, 1, 0, 1)], states))
        item = await next_item(engine, Kind.ERROR)
        error = item.message()
        assert isinstance(error, StageError)
        assert (error.code, error.session, error.stage) == (StageErrorCode.NOT_FINITE, SESSION, 0)
        assert (item.destination, item.node) == (Destination.ENTRY, ENTRY)
        item = await next_item(engine, Kind.TOKENS)
        sampled = decode_tokens(item.body, vocabulary=engine.facts.vocabulary)
        assert [(run.slot, len(run.tokens)) for run in sampled.runs] == [(1, 1)]
        # The neighbour's next step, and a new session in the slot, are as if nothing had been.
        await opened(engine, SESSION, 0)
        await engine.send(step_of(2, [Run(0, 1, 0, 1), Run(1, 1, 1, 1)], sound(2)))
        sampled = decode_tokens((await next_item(engine, Kind.TOKENS)).body, vocabulary=engine.facts.vocabulary)
        assert [len(run.tokens) for run in sampled.runs] == [1, 1]


NONSENSE = {
    "another width": step_of(1, [Run(0, 1, 0, 1)], np.zeros((1, 255))),
    "a slot that is not": step_of(1, [Run(200, 1, 0, 1)], np.zeros((1, 256))),
    "empty": pack(Kind.STEP, b""),
    "no msgpack": pack(Kind.SEQ_OPEN, b"\xc1"),
    "a slot to open that is not": encode(SeqOpen(SESSION, 200, ENTRY)),
}


@pytest.mark.parametrize("frame", NONSENSE.values(), ids=NONSENSE)
async def test_nonsense_of_a_stage_is_named_and_the_process_lives(cut: Cut, spec: StageSpec, frame: bytes) -> None:
    async with open_engine(last_of_two(cut, spec)) as engine:
        await engine.send(frame)
        error = (await next_item(engine, Kind.ERROR)).message()
        assert isinstance(error, StageError)
        assert (error.session, error.stage) == (None, 0)
        assert await engine.tokenise("alive")


async def test_a_hole_in_a_sequence_is_out_of_order(cut: Cut, spec: StageSpec) -> None:
    async with open_engine(last_of_two(cut, spec)) as engine:
        await opened(engine, SESSION, 0)
        await engine.send(step_of(1, [Run(0, 1, 5, 1)], sound()))
        error = (await next_item(engine, Kind.ERROR)).message()
        assert isinstance(error, StageError)
        assert error.code is StageErrorCode.OUT_OF_ORDER


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 5, 6, 10, 32, 36, 99, 255])
async def test_garbage_of_any_kind_is_survived(cut: Cut, spec: StageSpec, kind: int) -> None:
    async with open_engine(whole(cut, spec)) as engine:
        rng = np.random.default_rng(kind)
        for size in (0, 1, 7, 300):
            body = rng.bytes(size)
            await engine.send(struct.pack("<IB", len(body) + 1, kind) + body)
        assert await engine.tokenise("alive")


async def test_a_lying_last_stage_ends_the_sessions_and_is_named(cut: Cut, spec: StageSpec) -> None:
    (path, layers), _ = cut(2)
    spec = replace(spec, path=path, layers=layers, stage=0, stages=2)
    async with open_engine(spec) as engine:
        await engine.send(encode(Open(SESSION, ENTRY, (5, 6), GREEDY)))
        await next_item(engine, Kind.STEP)
        await engine.send(pack(Kind.TOKENS, struct.pack("<IH", 99, 0)))
        error = (await next_item(engine, Kind.ERROR)).message()
        while isinstance(error, StageError) and error.session is None:
            error = (await next_item(engine, Kind.ERROR)).message()
        assert isinstance(error, StageError)
        assert (error.session, error.stage) == (SESSION, 1)
        assert await engine.tokenise("alive")


async def test_a_lost_entry_ends_its_sessions(cut: Cut, spec: StageSpec) -> None:
    (path, layers), _ = cut(2)
    async with open_engine(replace(spec, path=path, layers=layers, stage=0, stages=2)) as engine:
        await engine.send(encode(Open(SESSION, ENTRY, (5, 6), GREEDY)))
        await next_item(engine, Kind.STEP)
        await engine.lose_entry(ENTRY)
        closed = await next_item(engine, Kind.SEQ_CLOSE)
        assert closed.destination is Destination.NEXT


def test_an_engine_that_sends_nonsense_is_not_believed() -> None:
    parser = EnvelopeParser(bytes_max=100)
    parser.feed(bytes([9]) + bytes(40))
    with pytest.raises(FrameError):
        parser.items()
    assert LOAD not in set(Kind)
