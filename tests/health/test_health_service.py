"""Health as a whole: a real database, checks that fail and hang, the report over HTTP, readiness."""

import errno
import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from meshnode.health.model import HealthReport, MeshContact, Probe, Status, Verdict
from meshnode.health.service import CHECK_LIMIT_S, available_memory
from meshnode.health.setup import Health, build_health
from meshnode.health.store import HealthStore
from meshnode.kernel.clock import SystemClock
from meshnode.kernel.database import DATABASE_NAME, open_database, read_migrations
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.offload import InlineOffload
from meshnode.kernel.service import AgentHealth, Policy, ServiceHealth, State
from tests.support.api_client import fetch
from tests.support.api_server import TOKEN, running_api
from tests.support.failing_disk import FailingDisk
from tests.support.recording_log import RecordingLog

MIGRATIONS = read_migrations("health", "meshnode.health")
CHANGED = "This node's health changed."
ALWAYS = {"database", "storage", "memory", "wal", "services", "p2p_network", "clock", "event_loop"}


@dataclass
class World:
    """What surrounds the health subsystem, set by each test."""

    mesh: MeshContact = field(default_factory=lambda: MeshContact(0, 0))
    state: State = State.RUNNING
    log: RecordingLog = field(default_factory=RecordingLog)

    def contact(self) -> MeshContact:
        return self.mesh

    def supervised(self) -> AgentHealth:
        return AgentHealth("ok", (ServiceHealth("gossip", Policy.FATAL, self.state, 1.0, 0),))


@asynccontextmanager
async def health(data_dir: Path, world: World, *probes: Probe) -> AsyncGenerator[Health, None]:
    async with open_database(data_dir / DATABASE_NAME, MIGRATIONS, wall=1.8e9, inline=True) as database:
        yield build_health(
            database=database,
            data_dir=data_dir,
            mesh=world,
            supervised=world.supervised,
            clock=SystemClock(),
            offload=InlineOffload(),
            logger=world.log,
            probes=probes,
        )


def probe(name: str, run: Callable[[], Any], on_failure: Status = Status.DEGRADED) -> Probe:
    async def wait_and_run() -> Verdict:
        await trio.lowlevel.checkpoint()
        verdict: Verdict = run()
        return verdict

    return Probe(name, wait_and_run, on_failure)


async def test_a_mesh_of_one_is_healthy(data_dir: Path) -> None:
    world = World()
    async with health(data_dir, world) as built:
        assert built.service.report().status is Status.UNKNOWN
        assert not built.readiness().ready
        report = await built.service.check()
        assert report.status is Status.HEALTHY, report
        assert set(report.checks) == ALWAYS
        assert built.readiness().ready
    assert world.log.records == [("info", CHANGED, {"status": "healthy"})]


async def test_the_database_is_really_written(data_dir: Path) -> None:
    async with (
        open_database(data_dir / DATABASE_NAME, MIGRATIONS, wall=1.8e9, inline=True) as database,
    ):
        store = HealthStore(database)
        await store.write(123.5)
        await store.write(124.5)
        assert database.read(lambda c: c.execute("SELECT written_at FROM health_probe").fetchall()) == [(124.5,)]
        assert store.wal_bytes() > 0


async def test_an_optional_part_degrades_and_a_needed_one_is_unhealthy(data_dir: Path) -> None:
    def broken() -> Verdict:
        raise MeshError(ErrorCode.UNREACHABLE, "The engine does not answer. Restart it.")

    def unreadable() -> Verdict:
        raise PermissionError(13, "Permission denied")

    world = World()
    async with health(data_dir, world, probe("engine", broken)) as built:
        report = await built.service.check()
        check = report.checks["engine"]
        assert (report.status, check.status) == (Status.DEGRADED, Status.DEGRADED)
        assert check.message == "The engine does not answer. Restart it."
        assert check.error == "unreachable: The engine does not answer. Restart it."
        assert built.readiness().ready
    async with health(data_dir, world, probe("folder", unreadable, Status.UNHEALTHY)) as built:
        report = await built.service.check()
        assert report.status is Status.UNHEALTHY
        assert "Permission denied" in (report.checks["folder"].error or "")
        assert built.readiness().waiting_for.keys() == {"folder"}


async def test_a_check_that_hangs_is_cut_off_and_holds_up_no_other(data_dir: Path, autojump_clock: MockClock) -> None:
    async def hang() -> Verdict:
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    world = World()
    async with health(data_dir, world, Probe("engine", hang)) as built:
        began = trio.current_time()
        report = await built.service.check()
        assert trio.current_time() - began == pytest.approx(CHECK_LIMIT_S)
        check = report.checks["engine"]
        assert (check.status, check.duration_ms) == (Status.DEGRADED, CHECK_LIMIT_S * 1000)
        assert check.error == "no answer within 10 s"
        assert report.checks["database"].duration_ms < CHECK_LIMIT_S * 1000


async def test_checks_run_every_half_minute_and_changes_are_told_once(
    data_dir: Path, autojump_clock: MockClock
) -> None:
    rounds: list[float] = []
    verdict = Verdict(Status.HEALTHY, "fine")

    def watched() -> Verdict:
        rounds.append(trio.current_time())
        return verdict

    world = World()
    async with health(data_dir, world, probe("engine", watched)) as built, trio.open_nursery() as nursery:
        await nursery.start(built.service.run)
        await trio.sleep(95)
        verdict = Verdict(Status.DEGRADED, "slow")
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    pauses = [later - sooner for sooner, later in itertools.pairwise(rounds)]
    assert len(pauses) == 5
    assert pauses == pytest.approx([30.0] * 5)
    assert world.log.records == [
        ("info", CHANGED, {"status": "healthy"}),
        ("warning", CHANGED, {"status": "degraded", "engine": "slow"}),
    ]


async def test_what_is_in_memory_is_judged_at_once(data_dir: Path) -> None:
    world = World()
    async with health(data_dir, world) as built:
        await built.service.check()
        world.mesh = MeshContact(2, 0, (30.0,))
        report = built.service.report()
        assert report.status is Status.DEGRADED
        assert {name for name, check in report.checks.items() if check.status is Status.DEGRADED} == {
            "p2p_network",
            "clock",
        }
        world.mesh, world.state = MeshContact(0, 0), State.STARTING
        assert built.readiness().waiting_for == {"services": "starting: gossip"}
        world.mesh, world.state = MeshContact(2, 0, is_looking=True), State.RUNNING
        assert built.service.report().status is Status.UNKNOWN
        assert built.readiness().ready, "it serves this machine while it looks for the others"
        world.state = State.FAILED
        assert built.service.report().status is Status.UNHEALTHY


async def test_a_late_event_loop_is_noticed(data_dir: Path, mock_clock: MockClock) -> None:
    async with health(data_dir, World()) as built, trio.open_nursery() as nursery:
        await nursery.start(built.service.run)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1.0)
        await trio.testing.wait_all_tasks_blocked()
        assert built.service.report().checks["event_loop"].status is Status.HEALTHY
        mock_clock.jump(3.0)
        await trio.testing.wait_all_tasks_blocked()
        check = built.service.report().checks["event_loop"]
        assert check.status is Status.DEGRADED
        assert "2000 ms" in check.message
        nursery.cancel_scope.cancel()


async def test_two_checks_of_one_name_are_a_mistake(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        async with health(data_dir, World(), probe("wal", lambda: Verdict(Status.HEALTHY, ""))):
            pass


async def test_the_report_over_http(data_dir: Path) -> None:
    world = World()
    async with health(data_dir, world) as built, running_api(mounts=[built.mount]) as running:
        await built.service.check()
        answer = await fetch(running.port, "GET", "/api/health", token=TOKEN)
        assert answer.status == 200
        assert answer.json["status"] == "healthy"
        assert answer.json["checks"].keys() == ALWAYS
        database = answer.json["checks"]["database"]
        assert database.keys() == {"name", "status", "message", "duration_ms", "last_check"}
        assert database["last_check"].endswith("Z")
        assert msgspec.convert(answer.json, HealthReport).checks["wal"].status is Status.HEALTHY
        world.state = State.FAILED
        answer = await fetch(running.port, "GET", "/api/health", token=TOKEN)
        assert (answer.status, answer.json["status"]) == (503, "unhealthy")


def test_this_machine_has_memory() -> None:
    assert available_memory() > 0


async def test_a_full_disk_is_told_at_once_and_so_is_room(data_dir: Path) -> None:
    world = World()
    async with open_database(data_dir / DATABASE_NAME, MIGRATIONS, wall=1.8e9) as database:
        built = build_health(
            database=database, data_dir=data_dir, mesh=world, supervised=world.supervised,
            clock=SystemClock(), offload=InlineOffload(), logger=world.log,
        )  # fmt: skip
        assert (await built.service.check()).status is Status.HEALTHY
        # Another part's write meets it, between two rounds of checks.
        with FailingDisk(errno.ENOSPC), pytest.raises(MeshError):
            await HealthStore(database).write(2.0)
        report = built.service.report()
        assert report.status is Status.UNHEALTHY
        for name in ("database", "storage"):
            assert "is full: nothing was stored. Free some space" in report.checks[name].message
        assert not built.readiness().ready
        await HealthStore(database).write(3.0)
        assert built.service.report().status is Status.HEALTHY
