"""What a node tells of its stages' memory: those of tests of versions are none that a plan must spare."""

import importlib.util
from pathlib import Path

import pytest
from trio.testing import wait_all_tasks_blocked

from meshnode.kernel.offload import InlineOffload
from meshnode.llm.service.trialstages import CONTEXT, LAYERS, TrialStage, TrialStages, made
from protocol.sharding.pipelines import Pipeline, Span
from tests.support.stage_world import stages

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
