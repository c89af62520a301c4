"""Inputs and events of the heartbeats machine."""

from dataclasses import dataclass
from enum import IntFlag
from typing import Final

import msgspec

from protocol.ids import NodeId
from protocol.wire.messages import Heartbeat

NO_TEMPERATURE_C: Final = -128
"""In Heartbeat.gpu_temp_c: there is no device, or none tells its temperature."""


class HeartbeatFlag(IntFlag):
    """Bits of Heartbeat.flags. Bits 8 and 9 hold the capability class of election.candidates.

    Devices are warm, throttled or in an emergency (then throttled as well) until they cooled down.
    """

    ON_BATTERY = 1
    THROTTLED = 2
    DRAINING = 4
    GPU = 8
    WARM = 16
    EMERGENCY = 32


_CAPABILITY_SHIFT = 8


def capability_bits(capability: int) -> int:
    """A capability class (0 to 3) as bits of Heartbeat.flags."""
    return (capability & 3) << _CAPABILITY_SHIFT


def capability_in(flags: int) -> int:
    """The capability class that flags carry."""
    return flags >> _CAPABILITY_SHIFT & 3


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of this machine. Fields as in the Heartbeat message, which documents units and absent values."""

    cpu_pm: int
    load_c: int
    ram_used_mb: int
    storage_used_mb: int
    vram_free_mb: int
    gpu_temp_c: int
    gpu_busy_pm: int
    flags: int
    battery_pct: int
    slots_free: int
    uptime_s: int
    rtt_us: int


class SampleTaken(msgspec.Struct, frozen=True, gc=False):
    """The sampler read this machine; the machine decides whether that is worth telling."""

    sample: Sample


class Led(msgspec.Struct, frozen=True, gc=False):
    """Whom this node follows, and who would lead next: stated in its heartbeats, and told more often."""

    leader: NodeId | None
    term: int
    deputies: tuple[NodeId, ...]


class HeartbeatHeard(msgspec.Struct, frozen=True, gc=False):
    """A newer heartbeat of a member (or this node's own) is known now."""

    node: NodeId
    heartbeat: Heartbeat
    at: float  # monotonic seconds, this node's clock
