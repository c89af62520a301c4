"""The sampler: figures within the heartbeat's bounds, a beat a second, failures said once, and what it costs."""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from meshnode.kernel.clock import SystemClock
from meshnode.kernel.offload import InlineOffload, ThreadOffload
from meshnode.kernel.resources.gpu import GpuDevice, GpuMonitor, ThermalState
from meshnode.kernel.resources.host import Battery, CpuTimes, HostFigures, HostReader
from meshnode.kernel.resources.sampler import IdleActivity, Reading, ResourceSampler, to_sample
from protocol.heartbeats.events import HeartbeatFlag, Sample
from protocol.wire.messages import Heartbeat
from tests.support.recording_log import RecordingLog

MIB = 1 << 20


class Host(HostReader):
    """A machine whose CPU is a quarter busy, read by the test instead of the real one."""

    def __init__(self) -> None:
        self.reads: list[float] = []
        self.is_gone = False

    def read(self, now: float) -> HostFigures:
        self.reads.append(now)
        if self.is_gone:
            raise FileNotFoundError("the data folder is gone")
        busy = len(self.reads)
        return HostFigures(CpuTimes(busy, busy * 4), 1.25, 8 << 30, 3 << 30, 100 << 30, 40 << 30, Battery(70, True))


class Devices:
    """A source with one hot device."""

    def read(self) -> list[GpuDevice]:
        return [GpuDevice("A", "cuda", "1", 24 << 30, 10 << 30, 88.0, 42.0)]


def sampler(
    data_dir: Path, delivered: list[Sample], log: RecordingLog, host: HostReader | None, *, gpu: bool = False
) -> ResourceSampler:
    clock = SystemClock()
    return ResourceSampler(
        node_name="here",
        data_dir=data_dir,
        clock=clock,
        offload=InlineOffload(),
        gpus=GpuMonitor([Devices()] if gpu else [], clock=clock, offload=InlineOffload(), logger=log),
        activity=IdleActivity(4),
        deliver=delivered.append,
        logger=log,
        host=host,
    )


def reading(**changes: object) -> Reading:
    fields: dict[str, object] = dict.fromkeys(Reading.__dataclass_fields__, 0)
    fields |= {"battery": None, "gpus": (), "thermal": ThermalState.NORMAL, "draining": False, "rtt_us": -1}
    return Reading(**{**fields, **changes})  # type: ignore[arg-type]  # the fields are those of the class


def as_heartbeat(sample: Sample) -> Heartbeat:
    """The sample as a peer decodes it, bounds checked."""
    around: dict[str, Any] = {
        "signer": bytes(8),
        "boot": 1,
        "number": 1,
        "period_ds": 40,
        "follows": bytes(8),
        "term": 0,
    }
    body = Heartbeat(**{**around, **dataclasses.asdict(sample)})
    return msgspec.msgpack.decode(msgspec.msgpack.encode(body), type=Heartbeat)


def test_a_reading_becomes_a_sample() -> None:
    gpus = (
        GpuDevice("A", "cuda", "1", 24 << 30, 3 << 30, 60.0, 20.0),
        GpuDevice("B", "cuda", "1", 8 << 30, 1 << 30, 71.4),
    )
    sample = to_sample(
        reading(
            cpu_percent=12.34,
            load_1m=0.756,
            ram_used=1_500 * MIB,
            storage_used=9 * MIB,
            battery=Battery(55, True),
            gpus=gpus,
            thermal=ThermalState.THROTTLED,
            uptime_s=99,
            slots_free=3,
            draining=True,
            rtt_us=250,
        )
    )
    flags = HeartbeatFlag.ON_BATTERY | HeartbeatFlag.THROTTLED | HeartbeatFlag.DRAINING | HeartbeatFlag.GPU
    assert sample == Sample(123, 76, 1_500, 9, 4_096, 71, 200, int(flags), 55, 3, 99, 250)


@pytest.mark.parametrize("gpus", [(), (GpuDevice("A", "cuda", "1", 0, 0),)])
def test_what_there_is_not_is_minus_one_and_a_temperature_minus_128(gpus: tuple[GpuDevice, ...]) -> None:
    sample = to_sample(reading(gpus=gpus))
    assert (sample.gpu_temp_c, sample.gpu_busy_pm, sample.battery_pct, sample.rtt_us) == (-128, -1, -1, -1)
    assert (sample.vram_free_mb, sample.flags) == ((0, HeartbeatFlag.GPU) if gpus else (-1, 0))


@pytest.mark.parametrize(
    "extreme",
    [
        {"cpu_percent": 250.0, "load_1m": 1e12, "rtt_us": 2**40, "slots_free": 10**9},
        {"cpu_percent": -3.0, "load_1m": -1.0, "rtt_us": -50, "slots_free": -1, "ram_used": -1, "uptime_s": -1},
        {"gpus": (GpuDevice("A", "cuda", "1", 0, 0, 1e6, 1e6),)},
        {"gpus": (GpuDevice("A", "cuda", "1", 0, 0),)},
    ],
)
def test_every_sample_passes_the_peers_bounds(extreme: dict[str, object]) -> None:
    assert as_heartbeat(to_sample(reading(**extreme))).signer == bytes(8)


async def test_one_sample_a_second(data_dir: Path, autojump_clock: MockClock) -> None:
    delivered: list[Sample] = []
    host = Host()
    made = sampler(data_dir, delivered, RecordingLog(), host, gpu=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        assert len(delivered) == 1
        await trio.sleep(9.5)
        nursery.cancel_scope.cancel()
    assert len(delivered) == 10
    pauses = [later - sooner for sooner, later in itertools.pairwise(host.reads)]
    assert pauses == pytest.approx([1.0] * 9)
    last = delivered[-1]
    assert (last.cpu_pm, last.gpu_temp_c, last.vram_free_mb, last.slots_free, last.uptime_s) == (250, 88, 10_240, 4, 9)
    assert HeartbeatFlag(last.flags) == HeartbeatFlag.ON_BATTERY | HeartbeatFlag.THROTTLED | HeartbeatFlag.GPU
    assert made.latest is not None
    assert made.latest.cpu_percent == pytest.approx(25.0)
    assert (await made.profile()).gpus[0].total_vram == 24 << 30


async def test_beats_missed_in_a_stop_are_not_made_up_for(data_dir: Path, mock_clock: MockClock) -> None:
    delivered: list[Sample] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(sampler(data_dir, delivered, RecordingLog(), Host()).run)
        mock_clock.jump(3_600)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert len(delivered) == 2


async def test_a_missing_data_folder_is_said_once_and_heals(data_dir: Path, autojump_clock: MockClock) -> None:
    delivered: list[Sample] = []
    log, host = RecordingLog(), Host()
    host.is_gone = True
    async with trio.open_nursery() as nursery:
        await nursery.start(sampler(data_dir, delivered, log, host).run)
        await trio.sleep(5.5)
        assert (delivered, len(log.at("error"))) == ([], 1)
        host.is_gone = False
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert len(delivered) == 1


async def test_this_machine_is_sampled_for_a_hundredth_of_what_an_idle_agent_may_cost(data_dir: Path) -> None:
    clock, log = SystemClock(), RecordingLog()
    made = ResourceSampler(
        node_name="here",
        data_dir=data_dir,
        clock=clock,
        offload=ThreadOffload(),
        gpus=GpuMonitor([], clock=clock, offload=InlineOffload(), logger=log),
        activity=IdleActivity(1),
        deliver=lambda sample: None,
        logger=log,
    )
    await made.sample()
    began, rounds = time.process_time(), 200
    for _ in range(rounds):
        await made.sample()
    # About 0.2 ms where it was written; the bound leaves room for a Raspberry Pi under full load.
    assert (time.process_time() - began) / rounds < 0.005
    assert made.latest is not None
    as_heartbeat(to_sample(made.latest))
