"""Who may have a model unloaded, asked at the coordinator."""

import random
from typing import Any

import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.service.loads import Loads
from protocol.election.events import CoordinatorChanged
from protocol.ids import NodeId
from protocol.sharding.loading import LoadingMachine
from protocol.sharding.pipelines import NodeReport, Pipeline, Reported, Span, StageReport

ME, HOLDER, OTHER = NodeId("a" * 32), NodeId("b" * 32), NodeId("c" * 32)
MODEL = "ab" * 32
PIPELINE = Pipeline(b"12345678", MODEL, 512, 1, (Span(HOLDER, 0, 4),), 100)


def loads(machine: LoadingMachine) -> Loads:
    def refused(peer: NodeId) -> None:
        raise MeshError(ErrorCode.FORBIDDEN, f"{peer} is no admin.")

    unused: Any = None
    return Loads(
        machine=machine, planning=unused, shapes=unused, command=unused, may_unload=refused, test=unused,
        publish=unused, now=lambda: 0.0, log=unused,
    )  # fmt: skip


def test_whoever_holds_a_part_may_have_it_unloaded_and_others_only_as_admins() -> None:
    machine = LoadingMachine(me=ME, rng=random.Random(1))
    its = loads(machine)
    with pytest.raises(MeshError) as caught:
        its.unload_for(HOLDER, MODEL)
    assert (caught.value.code, caught.value.retryable) == (ErrorCode.UNAVAILABLE, True)
    machine.handle(CoordinatorChanged(1, ME, True), 0.0)
    assert its.unload_for(OTHER, MODEL), "what is not loaded is nobody's loss"
    machine.handle(Reported(HOLDER, NodeReport((StageReport(PIPELINE, "ready"),))), 0.1)
    assert its.unload_for(HOLDER, MODEL)
    with pytest.raises(MeshError) as caught:
        its.unload_for(OTHER, MODEL)
    assert caught.value.code is ErrorCode.FORBIDDEN
