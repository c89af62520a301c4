"""What a node tells of its stages: their memory, where tests of versions are none that a plan must spare; their end."""

import importlib.util
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.offload import InlineOffload
from meshnode.llm.engine.client import Engine
from meshnode.llm.engine.spec import StageSpec
from meshnode.llm.service.host import StageHost
from meshnode.llm.service.trialstages import CONTEXT, LAYERS, TrialStage, TrialStages, made
from protocol.sharding.frames import Pieces
from protocol.sharding.pipelines import Pipeline, Span
from protocol.sharding.sampling import Sampling
from tests.support.stage_world import stages

LONG = Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)
pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is missing")


async def test_stages_of_tests_are_not_told_as_taken_memory(tmp_path: Path) -> None:
    model = made("llama", "Q8_0")
    assert model is not None
    path = tmp_path / "whole.gguf"
    path.write_bytes(model.data)
    async with stages(tmp_path, [(str(path), LAYERS)]) as world:
        member = await world.add()
        trials = TrialStages(
            calls=member.calls,
            hosts=member.hosts,
            folder=tmp_path / "trials",
            can_load=lambda: True,
            coordinator=lambda: member.id,
            offload=InlineOffload(),
            log=member.node.log,
        )
        world.nursery.start_soon(trials.run)
        await wait_all_tasks_blocked()
        tested = Pipeline(b"t" * 8, model.digest, CONTEXT, 1, (Span(member.id, 0, LAYERS),))
        assert await trials.begin(member.id, TrialStage(tested, "llama", "Q8_0")) == ""
        await member.hosts.stages[tested.id].until_loaded()
        assert member.hosts.loaded_bytes() == 0
        await world.load(member)
        planned = member.hosts.loaded_bytes()
        assert planned == member.hosts.engine(tested.id).facts.model_bytes
        assert await trials.end(tested.id) == ""
        assert member.hosts.loaded_bytes() == planned


async def test_a_stage_that_its_llama_cpp_cannot_hold_marks_the_node(tmp_path: Path) -> None:
    model = made("llama", "Q8_0")
    assert model is not None
    path = tmp_path / "whole.gguf"
    path.write_bytes(model.data)

    @asynccontextmanager
    async def none(spec: StageSpec, **more: Any) -> AsyncIterator[Engine]:
        raise MeshError(ErrorCode.UNAVAILABLE, "only whole", detail={"reason": "uncut"})
        yield

    async with stages(tmp_path, [(str(path), 4), (str(path), 4)]) as world:
        member = await world.add()
        member.hosts.open_engine = none
        spans = (Span(member.id, 0, 4), Span(member.id, 4, LAYERS))
        await StageHost(Pipeline(b"t" * 8, model.digest, CONTEXT, 1, spans), spans[0], member.hosts).run()
        assert member.lent.whole_only == ["llama"]


async def test_an_entry_hears_at_once_that_the_only_stage_is_gone(tmp_path: Path) -> None:
    model = made("llama", "Q8_0")
    assert model is not None
    path = tmp_path / "whole.gguf"
    path.write_bytes(model.data)
    async with stages(tmp_path, [(str(path), LAYERS)]) as world:
        holder, entry = await world.add(), await world.add()
        pipeline = await world.load(holder)
        session = b"s" * 16
        async with entry.entries.raw(session) as heard:
            await entry.entries.open(pipeline, session, entry.opening(session, sampling=LONG))
            while not isinstance(await heard.receive(), Pieces):
                pass
            os.kill(holder.hosts.engine(pipeline.id).pid, signal.SIGKILL)
            with trio.fail_after(10):
                while not isinstance(await heard.receive(), MeshError):
                    pass
