"""What this node lends to tasks: what its owner allows, less what others need, as reports tell it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

import psutil
import trio

from meshnode.kernel.errors import MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.resources.gpu import GpuDevice
from meshnode.kernel.resources.memory import ControlGroups, effective_memory
from meshnode.kernel.resources.profile import Profile
from protocol.heartbeats.events import HeartbeatFlag
from protocol.node import Node
from protocol.placement.commands import LABELS_MAX, Accepts, Capacity, Lent

LOOK_S: Final = 5.0
MEMORY_STEP_BYTES: Final = 64 * 1024 * 1024
"""Free memory is told in such steps: every change of what is lent is a report to the coordinator."""

RESERVE_SHARE: Final = 0.125
DISK_SHARE: Final = 0.5
BUSY_STEP_PM: Final = 50
SLOTS_MAX: Final = 256


class Owner(Protocol):
    """What this machine's owner set: see `tasks` in the settings."""

    @property
    def accept(self) -> Accepts: ...
    @property
    def slots(self) -> int: ...
    @property
    def cpus(self) -> float: ...
    @property
    def memory_bytes_max(self) -> int: ...
    @property
    def disk_bytes_max(self) -> int: ...
    @property
    def hours(self) -> str: ...
    @property
    def on_battery(self) -> bool: ...
    @property
    def isolation(self) -> str: ...
    @property
    def network(self) -> bool: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


class Isolation(Protocol):
    """Whether tasks can be shut in here."""

    async def lack(self) -> str:
        """Why not, and what to do; empty: they can."""
        ...


@dataclass(frozen=True, slots=True)
class Taken:
    """What tasks take here at the moment."""

    cpus: float = 0.0
    ram_bytes: int = 0
    vram_bytes: int = 0
    disk_bytes: int = 0


class Lending:
    """Looks now and then, and tells `told` when something changed that matters."""

    def __init__(
        self,
        *,
        hub: Node,
        settings: Owner,
        folder: Path,
        isolation: Isolation,
        no_network: str,
        name: Callable[[], str],
        profile: Callable[[], Profile | None],
        gpus: Callable[[], Sequence[GpuDevice]],
        taken: Callable[[], Taken],
        inputs: Callable[[], tuple[bytes, ...]],
        told: Callable[[Lent], None],
        wall: Callable[[], float],
        log: Logger,
    ) -> None:
        """`no_network`: why no task may have the network here, whatever the settings say. `inputs`: marks of the large
        ones that lie here.
        """
        if settings.network and no_network:
            log.warning("tasks.network is set in vain", why=no_network)
        self._hub = hub
        self._settings = settings
        self._folder = folder
        self._isolation = isolation
        self._no_network = no_network
        self._name = name
        self._profile = profile
        self._gpus = gpus
        self._taken = taken
        self._inputs = inputs
        self._told = told
        self._wall = wall
        self._groups = ControlGroups()
        self._last: Lent | None = None

    @property
    def last(self) -> Lent | None:
        """What was told last."""
        return self._last

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await trio.sleep(LOOK_S)

    async def look(self) -> None:
        """Look once, and tell what changed."""
        if self._settings.isolation == "none":
            lack, isolation = "", "none"
        else:
            try:
                lack = await self._isolation.lack()
            except MeshError as error:
                lack = error.message
            isolation = "" if lack else "bubblewrap"
        lent = self.lent(isolation, lack)
        if lent != self._last:
            self._last = lent
            self._told(lent)

    def lent(self, isolation: str, lack: str) -> Lent:
        """What is lent now."""
        settings, profile = self._settings, self._profile()
        now, most = self._capacity()
        return Lent(
            capacity=now,
            os=profile.os if profile is not None else "",
            arch=profile.arch if profile is not None else "",
            name=self._name()[:128],
            labels=tuple(label[:128] for label in settings.labels[:LABELS_MAX]),
            accepts=settings.accept,
            closed=lack[:512] or self._closed(),
            isolation=isolation,
            network=settings.network and not self._no_network,
            busy_pm=self._busy_pm(),
            most=most,
            inputs=self._inputs(),
        )

    def _closed(self) -> str:
        settings = self._settings
        flags = self._flags()
        if settings.hours and not within_hours(settings.hours, datetime.fromtimestamp(self._wall())):
            return f"its owner lets tasks start only {settings.hours}"
        if flags & HeartbeatFlag.ON_BATTERY and not settings.on_battery:
            return "it runs on its battery"
        if flags & HeartbeatFlag.DRAINING:
            return "it is about to stop"
        return ""

    def _capacity(self) -> tuple[Capacity, Capacity]:
        """Now, and when nobody else needs anything of this machine."""
        settings, taken = self._settings, self._taken()
        cores = _cores()
        machine = psutil.virtual_memory()
        memory = effective_memory(machine.total, machine.available, self._groups.limits())
        reserve = int(RESERVE_SHARE * memory.total)
        disk = psutil.disk_usage(str(self._folder))
        gpus = list(self._gpus())

        def lent(ram: int, vram: int, room: int) -> Capacity:
            ram = min(settings.memory_bytes_max, ram) if settings.memory_bytes_max else ram
            room = min(settings.disk_bytes_max, room) if settings.disk_bytes_max else room
            return Capacity(
                cpus=min(settings.cpus or cores, float(cores)),
                ram_bytes=_stepped(min(ram, memory.total)),
                gpus=min(len(gpus), 64),
                vram_bytes=_stepped(vram),
                disk_bytes=_stepped(room),
                slots=min(settings.slots or cores, SLOTS_MAX),
            )

        now = lent(
            max(0, memory.available - reserve) + taken.ram_bytes,
            sum(gpu.free_vram for gpu in gpus) + taken.vram_bytes,
            int(disk.free * DISK_SHARE) + taken.disk_bytes,
        )
        whole = lent(memory.total - reserve, sum(gpu.total_vram for gpu in gpus), int(disk.total * DISK_SHARE))
        return now, whole

    def _flags(self) -> HeartbeatFlag:
        heard = self._hub.heartbeats.latest.get(self._hub.me)
        return HeartbeatFlag(heard[0].flags & 63 if heard is not None else 0)

    def _busy_pm(self) -> int:
        heard = self._hub.heartbeats.latest.get(self._hub.me)
        if heard is None:
            return 0
        by_tasks = 1000 * self._taken().cpus / _cores()
        return max(0, min(1000, round((heard[0].cpu_pm - by_tasks) / BUSY_STEP_PM) * BUSY_STEP_PM))


def within_hours(hours: str, moment: datetime) -> bool:
    """Whether a time of day lies in `22:00-06:30`; the same time twice is the whole day."""
    begin, end = (int(text[:2]) * 60 + int(text[3:]) for text in hours.split("-"))
    now = moment.hour * 60 + moment.minute
    if begin == end:
        return True
    return begin <= now < end if begin < end else now >= begin or now < end


def _stepped(size: int) -> int:
    return size // MEMORY_STEP_BYTES * MEMORY_STEP_BYTES


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
