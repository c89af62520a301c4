"""Builds the tasks subsystem: what to run, to mount, to answer to peers, and to tell of protocol events."""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from meshnode.api.routing import Mount
from meshnode.api.sse import BusNames
from meshnode.kernel.calls import PeerCalls
from meshnode.kernel.database import KeyValue
from meshnode.kernel.driver import Driver
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import Links
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.kernel.logs import Logger
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.near import nearest
from meshnode.kernel.offload import Offload
from meshnode.kernel.records import RecordWriter
from meshnode.kernel.resources.gpu import GpuDevice
from meshnode.kernel.resources.profile import Profile
from meshnode.settings.tree import TaskSettings
from meshnode.tasks.core.showing import stands
from meshnode.tasks.execution.inputs import Disk, InputFiles, disk_sizes
from meshnode.tasks.execution.isolation import Trial, no_network
from meshnode.tasks.execution.running import ProcessExecutions
from meshnode.tasks.execution.terms import Terms
from meshnode.tasks.execution.users import gives_users
from meshnode.tasks.model import TaskSubmitted, TaskUpdated
from meshnode.tasks.peers import task_methods
from meshnode.tasks.routes import TaskRoutes
from meshnode.tasks.service.desk import Desk
from meshnode.tasks.service.executing import Executing
from meshnode.tasks.service.figures import Figures
from meshnode.tasks.service.input_keeping import InputKeeping
from meshnode.tasks.service.inputs import Inputs
from meshnode.tasks.service.keeping import Keeping
from meshnode.tasks.service.lending import Lending, Taken
from meshnode.tasks.service.outputs import Outputs
from meshnode.tasks.service.records import TaskKey, TaskRecords
from meshnode.tasks.service.scheduling import Scheduling
from meshnode.tasks.service.streaming import Streaming
from meshnode.tasks.service.submits import Submits
from meshnode.tasks.service.telling import Telling
from meshnode.tasks.service.whole import TaskService
from meshnode.tasks.service.witnessing import Witnessing
from protocol.effects import Persist
from protocol.election.fence import Fence
from protocol.ids import NodeId
from protocol.node import Node
from protocol.placement.executing import Executing as ExecutingMachine
from protocol.placement.scheduling import Scheduling as SchedulingMachine
from protocol.placement.tasks import Attempt
from protocol.placement.tracking import SchedulingParameters
from protocol.placement.witnessing import WITNESS_MACHINE, Witness

FIRST_TOKEN: Final = 2_000_000  # record writers' tokens, apart from those of others
PURPOSE: Final = "tasks"
EVENTS: Final[BusNames] = {
    TaskSubmitted: ("task_submitted", lambda event: event.task),
    TaskUpdated: ("task_updated", lambda event: event.task),
}
"""What `/api/events` tells of tasks."""


@dataclass(frozen=True, kw_only=True)
class TaskGround:
    """What the subsystem stands on."""

    settings: TaskSettings
    trusts_user: bool  # whether the local API needs no token of this agent's user
    data_dir: Path
    hub: Node
    driver: Driver
    links: Links
    key_value: KeyValue
    fence: Fence
    offload: Offload
    name_of: Callable[[NodeId], str]
    find_node: Callable[[str], NodeId]
    profile: Callable[[], Profile | None]
    gpus: Callable[[], Sequence[GpuDevice]]
    publish: Callable[[object], object]
    metrics: Metrics
    now: Callable[[], float]
    wall: Callable[[], float]
    log: Callable[[str], Logger]
    scheduling: SchedulingParameters = field(default_factory=SchedulingParameters)
    disk: Disk = disk_sizes


@dataclass(frozen=True)
class Tasks:
    """What the composition root mounts and runs. `observe` must be given every event of the protocol."""

    executions: ProcessExecutions
    service: TaskService
    desk: Desk
    streaming: Streaming
    lending: Lending
    inputs: Inputs
    input_keeping: InputKeeping
    methods: Mapping[str, PeerMethod[Any]]
    mount: Mount
    observe: Callable[[object], None]


def build_tasks(ground: TaskGround) -> Tasks:
    """Wire it."""
    return _Assembly(ground).built()


def terms_of(settings: TaskSettings, *, data_dir: Path, trusts_user: bool) -> Terms:
    """What the owner lets each task have. Without walls it finds the agent's environment, but for its secrets."""
    head = settings.output_bytes_max // 4
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MESHNODE_")}
    return Terms(
        isolated=settings.isolation != "none",
        network=settings.network,
        trusts_user=trusts_user,
        hidden=(str(data_dir),),
        head_bytes=head,
        tail_bytes=settings.output_bytes_max - head,
        environment=environment,
    )


def with_names(error: MeshError, wanted: str, names: Sequence[str]) -> MeshError:
    """That there is no such node, with the names that may have been meant; another error as it is."""
    near = nearest(wanted, names)[:3]
    if error.code is not ErrorCode.UNKNOWN_NODE or not near:
        return error
    meant = " or ".join(repr(name) for name in near)
    return MeshError(error.code, f"{error.message} Did you mean {meant}?", detail={**error.detail, "near": near})


class _Assembly:
    """Builds from records to answers. Where two parts need each other, one asks only while both run, through `self`."""

    def __init__(self, ground: TaskGround) -> None:
        self._ground = ground
        hub, log = ground.hub, ground.log
        self._folder = ground.data_dir / "tasks"
        self._calls = PeerCalls(me=hub.me, links=ground.links, purpose=PURPOSE, log=log("tasks.calls"))
        self._writer = RecordWriter(ground.driver, FIRST_TOKEN)
        self._records = TaskRecords(hub=hub, writer=self._writer, changed=self._changed, own_came=self._own_came)
        self._executions = ProcessExecutions(
            folder=self._folder,
            terms=lambda: terms_of(ground.settings, data_dir=ground.data_dir, trusts_user=ground.trusts_user),
            offload=ground.offload,
            log=log("tasks.processes"),
        )
        self._machine = ExecutingMachine(me=hub.me, boot=hub.boot, fence=ground.fence, roster=hub.roster)
        self._scheduling = Scheduling(
            machine=SchedulingMachine(
                me=hub.me, rng=random.SystemRandom(), roster=hub.roster, params=ground.scheduling
            ),
            hub=hub,
            calls=self._calls,
            records=self._records,
            is_over=lambda known: stands(known, self._is_member).is_ended,
            publish=ground.publish,
            now=ground.now,
            wall=ground.wall,
            log=log("tasks.scheduling"),
        )
        self._input_files = InputFiles(self._folder / "inputs", ground.disk)
        self._input_keeping = self._build_input_keeping()
        self._inputs = Inputs(
            hub=hub,
            calls=self._calls,
            records=self._records,
            files=self._input_files,
            offload=ground.offload,
            bytes_max=ground.settings.input_bytes_max,
            kept=self._input_keeping.kept,
            name_of=ground.name_of,
            log=log("tasks.inputs"),
        )
        self._executing = Executing(
            machine=self._machine,
            calls=self._calls,
            records=self._records,
            executions=self._executions,
            input_of=self._inputs.of,
            persist=self._persist_fence,
            publish=ground.publish,
            now=ground.now,
            wall=ground.wall,
            log=log("tasks.executing"),
        )
        self._witnessing = Witnessing(
            machine=Witness(ground.key_value.load_all(WITNESS_MACHINE)), persist=self._persist, now=ground.now
        )
        self._outputs = Outputs(
            me=hub.me, calls=self._calls, executions=self._executions, progress=self._executing.progress
        )
        self._desk = self._build_desk()
        self._streaming = Streaming(
            hub=hub,
            records=self._records,
            desk=self._desk,
            outputs=self._outputs,
            is_coordinator=lambda node: node == hub.election.coordinator,
        )
        self._figures = Figures(
            metrics=ground.metrics,
            me=hub.me,
            known=lambda: len(self._records.entries),
            running=lambda: len(self._machine.attempts),
            queued=lambda: self._scheduling.stats().queued,
        )
        self._telling = Telling(records=self._records, desk=self._desk, publish=self._publish)
        self._keeping, self._lending = self._build_keeping(), self._build_lending()

    def built(self) -> Tasks:
        """The parts that others see."""
        methods = task_methods(
            records=self._records,
            scheduling=self._scheduling,
            executing=self._executing,
            witnessing=self._witnessing,
            outputs=self._outputs,
            inputs=self._inputs,
            streaming=self._streaming,
        )
        service = TaskService(
            calls=self._calls,
            methods=methods,
            records=self._records,
            loaded=self._loaded,
            parts=(
                self._scheduling.run,
                self._lending.run,
                self._executing.run,
                self._witnessing.run,
                self._keeping.run,
                self._input_keeping.run,
            ),
        )
        routes = TaskRoutes(
            desk=self._desk,
            inputs=self._inputs,
            follows=self._streaming,
            me=self._ground.hub.me,
            find_node=self._find_node,
        )
        return Tasks(
            self._executions,
            service,
            self._desk,
            self._streaming,
            self._lending,
            self._inputs,
            self._input_keeping,
            methods,
            Mount(routes.routes()),
            self._observe,
        )

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _build_desk(self) -> Desk:
        ground, hub, log = self._ground, self._ground.hub, self._ground.log
        return Desk(
            hub=hub,
            calls=self._calls,
            records=self._records,
            submits=Submits(
                hub=hub,
                calls=self._calls,
                records=self._records,
                inputs=self._inputs,
                find_node=self._find_node,
                now=ground.now,
                wall=ground.wall,
                log=log("tasks.submit"),
            ),
            outputs=self._outputs,
            name_of=ground.name_of,
            node_count=lambda: len(hub.membership.view.up),
        )

    def _build_keeping(self) -> Keeping:
        ground, hub, log = self._ground, self._ground.hub, self._ground.log
        return Keeping(
            hub=hub,
            records=self._records,
            executions=self._executions,
            keep_s=ground.settings.keep_s,
            history_s=ground.settings.history_s,
            wall=ground.wall,
            log=log("tasks.keeping"),
        )

    def _build_input_keeping(self) -> InputKeeping:
        ground = self._ground
        return InputKeeping(
            hub=ground.hub,
            records=self._records,
            files=self._input_files,
            offload=ground.offload,
            keep_s=ground.settings.keep_s,
            wall=ground.wall,
            log=ground.log("tasks.keeping"),
        )

    def _build_lending(self) -> Lending:
        ground, hub = self._ground, self._ground.hub
        return Lending(
            hub=hub,
            settings=ground.settings,
            folder=ground.data_dir,
            isolation=Trial(folder=self._folder, offload=ground.offload),
            no_network=no_network(trusts_user=ground.trusts_user, own_users=gives_users()),
            log=ground.log("tasks.lending"),
            name=lambda: ground.name_of(hub.me),
            profile=ground.profile,
            gpus=ground.gpus,
            taken=self._taken,
            inputs=lambda: self._input_keeping.marks,
            told=self._executing.lend,
            wall=ground.wall,
        )

    # ---- what parts ask of each other -------------------------------------------------------------------------------

    def _changed(self, key: TaskKey) -> None:
        self._scheduling.changed(key)
        self._streaming.changed(key)
        self._telling.changed(key)
        self._keeping.changed(key)
        if key not in self._records.entries:
            self._witnessing.order_gone(*key)

    def _publish(self, event: object) -> None:
        self._figures.heard(event)
        self._ground.publish(event)

    def _own_came(self, key: TaskKey, attempt: Attempt) -> None:
        self._executing.own_came(key, attempt)

    def _loaded(self) -> None:
        self._telling.start()
        self._witnessing.forget_gone(lambda submitter, task: (submitter, task) in self._records.entries)

    def _is_member(self, node: NodeId) -> bool:
        return node in self._ground.hub.roster

    def _find_node(self, wanted: str) -> NodeId:
        try:
            return self._ground.find_node(wanted)
        except MeshError as error:
            names = [self._ground.name_of(node) for node in self._ground.hub.roster.members()]
            raise with_names(error, wanted, names) from error

    def _taken(self) -> Taken:
        taken = self._machine.taken
        return Taken(taken.cpus_m / 1000, taken.ram_bytes, taken.vram_bytes, taken.disk_bytes)

    async def _persist(self, effect: Persist) -> None:
        await self._ground.key_value.persist([effect])

    async def _persist_fence(self, effect: Persist) -> None:
        await self._ground.key_value.persist([effect])
        self._ground.fence.persisted([effect])

    def _observe(self, event: object) -> None:
        self._writer.observe(event)
        self._records.observe(event)
        self._scheduling.observe(event)
        self._executing.observe(event)
