"""What this node lends to models: memory beside what others use, cores, devices, and how fast it was measured to be."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil

from meshnode.kernel.resources.gpu import GpuDevice
from meshnode.kernel.resources.memory import ControlGroups, effective_memory
from meshnode.llm.engine.isolation import can_be_alone
from meshnode.llm.service.offering import PEERS_TOLD_MAX, Device, Offer
from protocol.ids import NodeId
from protocol.sharding.offers import RpcSupport, Speed
from protocol.sharding.predict import Learnt

RESERVE_SHARE: Final = 0.125  # of the machine's memory stays for others
GPU_RESERVE_SHARE: Final = 0.1
WHOLE_ONLY_MAX: Final = 64
GUESSED: Final = Speed(layer_bytes=8_000_000, token_s=0.001, row_s=0.0002)
"""8 GB/s: what memory of any machine of these years gives. The first model that is loaded is measured."""

GPU_GUESSED: Final = Speed(layer_bytes=200_000_000, token_s=0.001, row_s=0.00005)


class Measured(msgspec.Struct, frozen=True, array_like=True):
    """A speed, and what it was measured on."""

    speed: Speed
    llama: str
    threads: int


def engine_version() -> str:
    """The version of llama-cpp-python here, without importing it; empty without."""
    if importlib.util.find_spec("llama_cpp") is None:
        return ""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return ""


def rpc_support() -> RpcSupport:
    """Whether llama.cpp here has its RPC backend, and this system the isolation that it needs. May start a process."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return ""
    if not any((Path(found.origin).parent / "lib").glob("libggml-rpc.*")):
        return "not_built"
    return "yes" if can_be_alone() else "not_isolated"


class Lent:
    """This node's figures. `loaded_bytes` are the mapped weights of its stages, which the system counts as free;
    `lent_bytes` other memory, which it does not."""

    def __init__(
        self,
        *,
        name: Callable[[], str],
        lends: bool,
        threads: int,
        memory_bytes_max: int,
        gpu_bytes_max: int,
        loaded_bytes: Callable[[], int],
        lent_bytes: Callable[[], int],
        gpus: Callable[[], Sequence[GpuDevice]],
        rtts: Callable[[], Mapping[NodeId, float]],
        measured: Measured | None,
        learnt: Callable[[], Learnt],
    ) -> None:
        self._name = name
        self._lends = lends
        self._threads = threads
        self._memory_bytes_max = memory_bytes_max
        self._gpu_bytes_max = gpu_bytes_max
        self._loaded_bytes = loaded_bytes
        self._lent_bytes = lent_bytes
        self._gpus = gpus
        self._rtts = rtts
        self._learnt = learnt
        self._groups = ControlGroups()
        self.version = engine_version()
        self._whole_only: tuple[str, ...] = ()
        self.rpc: RpcSupport = rpc_support() if lends else ""
        fits = measured is not None and measured.llama == self.version and measured.threads == self.threads
        self._speed = measured.speed if measured is not None and fits else None

    @property
    def threads(self) -> int:
        """How many cores an engine may use."""
        return self._threads or _cores()

    @property
    def can_load(self) -> bool:
        """Whether this node computes layers at all."""
        return self._lends and bool(self.version)

    @property
    def speed(self) -> Speed | None:
        """What was measured; None before."""
        return self._speed

    @property
    def is_measured(self) -> bool:
        """Whether its speed is known."""
        return self._speed is not None

    def measured(self, speed: Speed) -> Measured:
        """Take a measurement in; give back what to remember it by. A larger layer tells more than a small one."""
        if self._speed is None or speed.layer_bytes >= self._speed.layer_bytes:
            self._speed = speed
        return Measured(self._speed, self.version, self.threads)

    def cannot_split(self, architecture: str) -> None:
        """Offer no stages of such models, only whole ones; until the next start, which another version needs too."""
        if architecture:
            self._whole_only = tuple(sorted({*self._whole_only, architecture}))[:WHOLE_ONLY_MAX]

    def free_bytes(self) -> int:
        """Main memory that a stage may still take."""
        machine = psutil.virtual_memory()
        memory = effective_memory(machine.total, machine.available, self._groups.limits())
        loaded = self._loaded_bytes()
        if self._memory_bytes_max:
            return max(0, min(self._memory_bytes_max - self._lent_bytes(), memory.available) - loaded)
        return max(0, memory.available - int(RESERVE_SHARE * memory.total) - loaded)

    def offer(self) -> Offer:
        """See offering.Lending."""
        rtts = sorted(self._rtts().items(), key=lambda entry: entry[1])[:PEERS_TOLD_MAX]
        learnt = self._learnt()
        return Offer(
            name=self._name(),
            has_engine=self.can_load,
            version=self.version,
            threads=self.threads,
            ram_free_bytes=self.free_bytes(),
            speed=self._speed or GUESSED,
            devices=tuple(self._devices()),
            rtts_us={node: int(rtt * 1e6) for node, rtt in rtts},
            factors=dict(learnt.factors),
            hop_overhead_s=learnt.hop_overhead_s,
            whole_only=self._whole_only,
            rpc=self.rpc,
        )

    def _devices(self) -> list[Device]:
        devices = []
        for gpu in self._gpus():
            free = int(gpu.free_vram * (1 - GPU_RESERVE_SHARE))
            if self._gpu_bytes_max:
                free = min(free, self._gpu_bytes_max)
            devices.append(Device(gpu.name, free, GPU_GUESSED))
        return devices


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
