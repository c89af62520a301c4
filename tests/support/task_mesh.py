"""Members that run tasks for each other: hubs, drivers, links, databases and machines are the agent's own.

Who is in the mesh is fixed; a member can be stopped and started again, its processes live on as an agent's do.
"""

import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from meshnode.kernel.database import KeyValue, kernel_migrations, open_database
from meshnode.kernel.datagrams import open_datagrams
from meshnode.kernel.driver import Driver
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.contracts import LinkContested
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.offload import ThreadOffload
from meshnode.kernel.recordstore import DurableState, SqlRecordStore, record_migrations
from meshnode.settings.tree import TaskSettings
from meshnode.tasks.model import Submission, Task
from meshnode.tasks.service.figures import TASK_METRICS
from meshnode.tasks.setup import TaskGround, Tasks, build_tasks
from protocol.election.fence import FENCE_MACHINE, Fence
from protocol.ids import Address, NodeId
from protocol.membership.events import ContactFound
from protocol.node import Node
from protocol.placement.tasks import task_collections
from protocol.placement.tracking import SchedulingParameters
from protocol.trust.collection import trust_collection
from protocol.trust.roster import Roster
from protocol.trust.statements import TRUST_COLLECTION, admission, eviction, record_key, seal
from protocol.wire.crypto import SodiumSuite
from tests.kernel.links.world import Mesh as Links
from tests.kernel.links.world import Node as Link
from tests.protocol.test_node import KEYS
from tests.support.recording_log import RecordingLog

OPEN: TaskSettings = TaskSettings(isolation="none", slots=8, cpus=0.0)
"""Tasks without walls: what these tests are about is who runs what, not how it is shut in."""


class Disk:
    """What a node believes of its disk: the test says how much room there is, and can make it hang."""

    def __init__(self) -> None:
        self.total = self.free = 10**13
        self.looks_left: int | None = None
        """So often there is room, and then none."""
        self.gate = threading.Event()
        """While it is not set, whoever looks hangs; `hangs` says that somebody does."""
        self.gate.set()
        self.hangs = threading.Event()

    def __call__(self, _folder: Path) -> tuple[int, int]:
        if not self.gate.is_set():
            self.hangs.set()
            self.gate.wait(30)
        if self.looks_left is not None:
            self.looks_left -= 1
            if self.looks_left < 0:
                return self.total, 0
        return self.total, self.free


@dataclass
class Member:
    """One node."""

    index: int
    link: Link
    hub: Node
    driver: Driver
    tasks: Tasks
    log: RecordingLog
    disk: Disk
    events: list[object] = field(default_factory=list)

    @property
    def id(self) -> NodeId:
        return self.hub.me

    async def end_all(self) -> None:
        """No process outlives the test."""
        executions = self.tasks.executions
        for found in await executions.find():
            if found.state == "running":
                await executions.stop(found.attempt, "the test is over")
                await executions.wait(found.attempt)

    async def submit(self, command: str | list[str], **fields: Any) -> Task:
        """As the API does."""
        task, _ = await self.tasks.desk.submit(Submission(command=command, **fields))
        return task

    async def read(self, task: Task) -> Task:
        """As the API does."""
        return (await self.tasks.desk.read(task.id))[0]

    async def until_reason(self, task: Task, words: str, *, within_s: float = 20.0) -> Task:
        """Wait until it waits and says so; fails when it does not in time."""
        with trio.fail_after(within_s):
            while words not in ((found := await self.read(task)).reason or ""):  # noqa: ASYNC110 -- no event tells it
                await trio.sleep(0.02)
        return found

    async def until_id(self, task: str, *statuses: str) -> Task:
        """As `until`, for a task that only its id is known of."""
        return await self.until((await self.tasks.desk.read(task))[0], *statuses)

    async def until(self, task: Task, *statuses: str, within_s: float = 20.0) -> Task:
        """Wait until it stands so; fails when it does not in time."""
        found = task
        with trio.move_on_after(within_s):
            while True:
                try:
                    found = await self.read(task)
                except MeshError as error:
                    if error.code is not ErrorCode.NOT_FOUND:
                        raise
                else:
                    if found.status in statuses:
                        return found
                await trio.sleep(0.02)
        raise AssertionError(f"{found.status} ({found.phase}) because {found.reason or found.error}")


class TaskMesh:
    """Of members that know and see each other."""

    def __init__(
        self,
        folder: Path,
        links: Links,
        nursery: trio.Nursery,
        stack: AsyncExitStack,
        scheduling: SchedulingParameters,
    ) -> None:
        self._scheduling = scheduling
        self.folder = folder
        self._links = links
        self._nursery = nursery
        self._stack = stack
        self.members: list[Member] = []

    def names(self, node: NodeId) -> str:
        return next((f"n{member.index}" for member in self.members if member.id == node), node)

    def find(self, wanted: str) -> NodeId:
        for member in self.members:
            if wanted in (member.id, f"n{member.index}"):
                return member.id
        raise MeshError(ErrorCode.UNKNOWN_NODE, f"No node of this mesh is called {wanted!r}.")

    async def until(self, reached: Callable[[], bool], within_s: float = 20.0) -> None:
        """Wait for a state that no event tells about, and fail when it does not come in time."""
        with trio.fail_after(within_s):
            while not reached():  # noqa: ASYNC110 -- what readers see has no event
                await trio.sleep(0.01)

    def _coordinators(self) -> int:
        followed = {member.hub.election.coordinator for member in self.members}
        return len(followed) if None not in followed else 0

    async def evict(self, member: Member, by: Member) -> None:
        """As an admin's agent does."""
        root = self._links.root
        out = eviction(node_id=member.id, evicted_at=int(time.time() * 1000), by=by.id)
        blob = seal(out, SodiumSuite(root.seed, root.mesh_id))
        await by.tasks.desk._records._writer.put(TRUST_COLLECTION, record_key(member.id), blob)

    @property
    def coordinator(self) -> Member:
        """Whom all follow."""
        return next(one for one in self.members if one.hub.election.is_coordinator)

    async def build(self, settings: Sequence[TaskSettings]) -> None:
        links = [await self._links.add(collect=False) for _ in settings]
        root = self._links.root
        signs = SodiumSuite(root.seed, root.mesh_id)
        admissions = [
            seal(
                admission(
                    public_key=link.identity.public_key, name=f"n{index}", role="member" if index else "admin",
                    admitted_at=1000 + index, by=links[0].node_id,
                ),
                signs,
            )
            for index, link in enumerate(links)
        ]  # fmt: skip
        for index, (link, wanted) in enumerate(zip(links, settings, strict=True)):
            await self._add(index, link, wanted, admissions)
        first = self.members[0]
        for other in self.members[1:]:
            first.driver.submit(ContactFound(other.id, other.hub.membership.addresses(other.id)[0]))
        size = len(self.members)
        await self.until(lambda: all(len(member.hub.membership.view.up) == size for member in self.members))
        await self.until(lambda: self._coordinators() == 1)

    async def _add(self, index: int, link: Link, settings: TaskSettings, admissions: list[bytes]) -> None:
        root, identity, folder = self._links.root, link.identity, self.folder / f"m{index}"
        folder.mkdir()
        sockets = open_datagrams("127.0.0.1", 0)
        self._stack.callback(sockets.close)
        opened = open_database(folder / "db", [*kernel_migrations(), *record_migrations()], wall=time.time())
        database = await self._stack.enter_async_context(opened)
        store, key_value, log = SqlRecordStore(database), KeyValue(database), RecordingLog()
        suite = SodiumSuite(identity.seed, root.mesh_id)
        roster = Roster(root_public_key=root.public_key, verifier=suite, statements=admissions)
        hub = Node(
            me=identity.node_id, mesh_id=root.mesh_id, boot=1, founder=index == 0, suite=suite,
            rng=random.Random(index), roster=roster, durable={"keys": KEYS},
            collections=(trust_collection(root.public_key, suite), *task_collections()),
            record_store=store, addresses=(Address("127.0.0.1", sockets.port),),
        )  # fmt: skip
        state = DurableState(database, key_value, store)
        driver = Driver(node=hub, sockets=sockets, links=link.links, store=state.persist, log=log)
        events: list[object] = []
        disk = Disk()
        tasks = build_tasks(
            TaskGround(
                settings=settings, trusts_user=True, data_dir=folder, hub=hub, driver=driver, links=link.links,
                key_value=key_value,
                fence=Fence(key_value.load_all(FENCE_MACHINE)),
                offload=ThreadOffload(), name_of=self.names, find_node=self.find, profile=lambda: None,
                gpus=tuple, publish=events.append, metrics=Metrics(TASK_METRICS),
                now=trio.current_time, wall=time.time, log=lambda name: log,
                scheduling=self._scheduling,
                disk=disk,
            )
        )  # fmt: skip
        link.methods |= tasks.methods
        # The links' own table of methods was made before the service was.
        link.links._calls._methods = link.methods
        member = Member(index, link, hub, driver, tasks, log, disk, events)
        self.members.append(member)
        await self._nursery.start(driver.run, [tasks.observe])
        self._nursery.start_soon(self._pump, member)
        await self._nursery.start(tasks.executions.run)
        await self._nursery.start(tasks.service.run)

    async def _pump(self, member: Member) -> None:
        async for event in member.link.receive:
            if not isinstance(event, LinkContested):
                member.driver.submit(event)


@asynccontextmanager
async def task_mesh(
    folder: Path,
    size: int = 3,
    *,
    settings: Sequence[TaskSettings] | None = None,
    scheduling: SchedulingParameters | None = None,
) -> AsyncIterator[TaskMesh]:
    """So many members, the first of which is the admin."""
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        mesh = TaskMesh(folder, Links(folder, nursery), nursery, stack, scheduling or SchedulingParameters())
        try:
            await mesh.build(settings if settings is not None else [OPEN] * size)
            yield mesh
        finally:
            with trio.move_on_after(10, shield=True):
                for member in mesh.members:
                    await member.end_all()
            nursery.cancel_scope.cancel()
