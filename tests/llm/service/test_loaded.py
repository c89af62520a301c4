"""What the coordinator tells of loaded models: probed ones are ready, others have a reason; only its word counts."""

from collections.abc import Sequence
from typing import Any

import msgspec
import trio
import trio.testing

from meshnode.llm.service.loaded import LOADED, Loaded, Told
from protocol.election.events import CoordinatorChanged
from protocol.ids import NodeId
from protocol.sharding.pipelines import LoadFailed, PipelineReady
from tests.llm.service.weights.world import Board
from tests.protocol.sharding.coordinator import Coordinator
from tests.support.recording_log import RecordingLog

ME = NodeId("me")


class Election:
    coordinator: NodeId | None = ME


class Roster:
    def members(self) -> Sequence[NodeId]:
        return [NodeId("node-1")]


class Hub:
    def __init__(self, board: Board) -> None:
        self.records, self.election, self.roster = board, Election(), Roster()


def told_by(it: Coordinator, hub: Any, writer: Any, me: NodeId = ME) -> Loaded:
    return Loaded(
        me=me, hub=hub, machine=it.machine, writer=writer, name_of=lambda node: f"<{node}>", now=lambda: it.now,
        log=RecordingLog(),
    )  # fmt: skip


async def test_what_was_probed_is_ready_and_every_member_reads_it(autojump_clock: trio.testing.MockClock) -> None:
    board = Board()
    hub, it = Hub(board), Coordinator()
    mine = told_by(it, hub, board)
    follower = Coordinator()
    follower.tell(CoordinatorChanged(4, "me", True))
    follower.tell(CoordinatorChanged(5, "other", True))
    theirs = told_by(follower, hub, board, NodeId("other"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mine.run)
        it.ask("m")
        it.plan("a")
        await trio.sleep(2)
        assert theirs.states()["m"].state == "loading", "its layers are on the way"
        it.load(it.newest())
        await trio.sleep(2)
        assert theirs.states()["m"] == Told("m", "loading", False, "waiting for the first token")
        it.probe(it.newest())
        mine.observe(PipelineReady(it.newest()))
        await trio.sleep(0.5)
        assert theirs.states() == mine.states() == {"m": Told("m", "ready")}
        written = board.count
        await trio.sleep(60)
        assert board.count == written, "nothing new, nothing written"
        hub.election.coordinator = NodeId("third")
        assert theirs.states() == {}, "only the coordinator's word counts"
        nursery.cancel_scope.cancel()


async def test_a_load_that_failed_is_told_with_its_reason_for_a_while(autojump_clock: trio.testing.MockClock) -> None:
    board = Board()
    hub, it = Hub(board), Coordinator()
    mine = told_by(it, hub, board)
    it.pin("p")
    it.tell(CoordinatorChanged(3, "me", True))
    mine.observe(LoadFailed("m", "unavailable", "Loading failed 4 times; the last time: node-1: out_of_memory"))
    expected = "Loading failed 4 times; the last time: <node-1>: out_of_memory"
    assert mine.states()["m"] == Told("m", "failed", False, expected)
    assert mine.states()["p"].pinned
    it.now += 1000
    assert "m" not in mine.states()


def test_what_cannot_be_read_is_nothing() -> None:
    board = Board()
    hub, it = Hub(board), Coordinator()
    hub.election.coordinator = NodeId("other")
    reader = told_by(it, hub, board)
    for value in (b"", b"\xc1", msgspec.msgpack.encode([[["m", "burning"]]]), msgspec.msgpack.encode({"models": 1})):
        trio.run(board.put, LOADED, b"other", value)
        assert reader.states() == {}
    trio.run(board.put, LOADED, b"other", msgspec.msgpack.encode([[["m", "ready", True, "", "of a later version"]], 7]))
    assert reader.states() == {"m": Told("m", "ready", True)}
