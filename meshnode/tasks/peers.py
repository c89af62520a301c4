"""What peers may ask about tasks: submissions, commands, notes, reports, figures, output, input."""

from collections.abc import Mapping
from typing import Any

from meshnode.kernel.calls import Granted
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.tasks.service.executing import Executing
from meshnode.tasks.service.inputs import Inputs
from meshnode.tasks.service.outputs import Outputs
from meshnode.tasks.service.records import TaskRecords
from meshnode.tasks.service.scheduling import Scheduling
from meshnode.tasks.service.streaming import Streaming
from meshnode.tasks.service.wire import (
    Hold,
    InputOffered,
    InputWanted,
    OutputWanted,
    Placed,
    StatsWanted,
    Tail,
    TailWanted,
)
from meshnode.tasks.service.witnessing import Witnessing
from protocol.ids import NodeId
from protocol.placement.commands import (
    CommandAnswer,
    HoldNotes,
    NodeReport,
    NotesAnswer,
    NotesWanted,
    Positions,
    PositionsWanted,
    SchedulerStats,
    Submit,
    Submitted,
    TaskCommand,
)


def task_methods(
    *,
    records: TaskRecords,
    scheduling: Scheduling,
    executing: Executing,
    witnessing: Witnessing,
    outputs: Outputs,
    inputs: Inputs,
    streaming: Streaming,
) -> Mapping[str, PeerMethod[Any]]:
    """The methods by name."""

    async def submit(peer: NodeId, asked: Submit) -> Submitted:
        return await scheduling.submit(peer, asked)

    async def hold(peer: NodeId, asked: Hold) -> bool:
        await records.take_order(peer, asked.record)
        return True

    async def command(peer: NodeId, asked: TaskCommand) -> CommandAnswer:
        return await executing.command(peer, asked)

    async def notes(peer: NodeId, asked: HoldNotes | NotesWanted) -> NotesAnswer:
        return await witnessing.command(peer, asked)

    async def report(peer: NodeId, told: NodeReport) -> bool:
        scheduling.report(peer, told)
        return True

    async def positions(peer: NodeId, asked: PositionsWanted) -> Positions:
        return scheduling.positions(asked)

    async def stats(peer: NodeId, asked: StatsWanted) -> SchedulerStats:
        return scheduling.stats()

    async def placed(peer: NodeId, told: Placed) -> bool:
        streaming.placed(peer, told)
        return True

    async def output(peer: NodeId, asked: OutputWanted) -> Granted:
        return outputs.grant(peer, asked)

    async def tail(peer: NodeId, asked: TailWanted) -> Tail:
        return await outputs.tail(asked)

    async def wanted_input(peer: NodeId, asked: InputWanted) -> Granted:
        return await inputs.grant(peer, asked)

    async def store(peer: NodeId, asked: InputOffered) -> Granted:
        return await inputs.store(peer, asked)

    message: Any = HoldNotes | NotesWanted  # a union, which no type of a type can say
    return {
        "tasks.submit": PeerMethod(Submit, submit),
        "tasks.hold": PeerMethod(Hold, hold),
        "tasks.command": PeerMethod(TaskCommand, command),
        "tasks.notes": PeerMethod(message, notes),
        "tasks.report": PeerMethod(NodeReport, report),
        "tasks.positions": PeerMethod(PositionsWanted, positions),
        "tasks.stats": PeerMethod(StatsWanted, stats),
        "tasks.placed": PeerMethod(Placed, placed),
        "tasks.output": PeerMethod(OutputWanted, output),
        "tasks.tail": PeerMethod(TailWanted, tail),
        "tasks.input": PeerMethod(InputWanted, wanted_input),
        "tasks.store": PeerMethod(InputOffered, store),
    }
