"""Which figures are healthy. Pure functions from a figure to a verdict with its reason.

Where the figures come from is `service`'s business.
"""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Final

from meshnode.health.model import MeshContact, ServiceState, Status, Verdict
from meshnode.kernel.times import span_text

_MIB: Final = 1 << 20

STORAGE_FREE_BYTES_MIN: Final = 256 * _MIB
STORAGE_FREE_BYTES_CRITICAL: Final = 64 * _MIB
MEMORY_AVAILABLE_BYTES_MIN: Final = 256 * _MIB
MEMORY_AVAILABLE_BYTES_CRITICAL: Final = 64 * _MIB
WAL_BYTES_MAX: Final = 100 * _MIB
WAL_BYTES_CRITICAL: Final = 1024 * _MIB
CLOCK_NOISE_S: Final = 0.1
"""Round trips between busy machines do not tell smaller differences."""
CLOCK_OFFSET_S_MAX: Final = 5.0
CLOCK_OFFSET_S_CRITICAL: Final = 300.0
CLOCK_EARLIEST_S: Final = 1_735_689_600.0
"""2025-01-01: no clock that is right is before it. A board without a battery starts in 1970."""

LOOP_LAG_S_MAX: Final = 0.5
LOOP_LAG_S_CRITICAL: Final = 5.0

_SEVERITY: Final = (Status.HEALTHY, Status.UNKNOWN, Status.DEGRADED, Status.UNHEALTHY)


def worst(statuses: Iterable[Status]) -> Status:
    """The worst of them; UNKNOWN when there are none. What was not looked at yet is worse than what is well."""
    found = list(statuses)
    return max(found, key=_SEVERITY.index) if found else Status.UNKNOWN


def judge_storage(free_bytes: int, folder: str) -> Verdict:
    """Room on the data folder's disk."""
    text = f"{free_bytes // _MIB} MiB free at {folder}"
    if free_bytes < STORAGE_FREE_BYTES_CRITICAL:
        return Verdict(Status.UNHEALTHY, f"{text}: writes are about to fail. Free some space.")
    if free_bytes < STORAGE_FREE_BYTES_MIN:
        return Verdict(Status.DEGRADED, f"{text}, less than {STORAGE_FREE_BYTES_MIN // _MIB} MiB. Free some space.")
    return Verdict(Status.HEALTHY, text)


def judge_memory(available_bytes: int) -> Verdict:
    """Memory that this agent can still get."""
    text = f"{available_bytes // _MIB} MiB of memory available"
    if available_bytes < MEMORY_AVAILABLE_BYTES_CRITICAL:
        return Verdict(Status.UNHEALTHY, f"{text}: the system is about to end processes. Close something.")
    if available_bytes < MEMORY_AVAILABLE_BYTES_MIN:
        return Verdict(Status.DEGRADED, f"{text}, less than {MEMORY_AVAILABLE_BYTES_MIN // _MIB} MiB. Close something.")
    return Verdict(Status.HEALTHY, text)


def judge_wal(size_bytes: int) -> Verdict:
    """The database's write-ahead log: it grows when something keeps it from being folded in."""
    text = f"the database's log has {size_bytes / _MIB:.1f} MiB"
    if size_bytes > WAL_BYTES_CRITICAL:
        return Verdict(Status.UNHEALTHY, f"{text} and keeps growing. Restart the agent.")
    if size_bytes > WAL_BYTES_MAX:
        return Verdict(Status.DEGRADED, f"{text}, more than {WAL_BYTES_MAX // _MIB}. If it keeps growing, restart.")
    return Verdict(Status.HEALTHY, text)


def judge_clock(wall: float, offsets: Sequence[float]) -> Verdict:
    """This machine's clock against the median of the peers' (`offsets`: theirs less ours, seconds).

    The median, so that one peer with a wrong clock makes nobody else look wrong once there are three nodes.
    """
    if wall < CLOCK_EARLIEST_S:
        return Verdict(Status.UNHEALTHY, "this clock is years behind. Set it: sudo timedatectl set-ntp true")
    if not offsets:
        return Verdict(Status.HEALTHY, "no peer's clock was measured yet")
    offset = median(offsets)
    direction = "behind" if offset > 0 else "ahead of"
    peers = "the only peer measured" if len(offsets) == 1 else f"the median of {len(offsets)} peers"
    text = f"this clock is {span_text(abs(offset))} {direction} {peers}"
    if abs(offset) < CLOCK_NOISE_S:
        text = f"this clock agrees with {peers}"
    if abs(offset) > CLOCK_OFFSET_S_CRITICAL:
        return Verdict(Status.UNHEALTHY, f"{text}. Set it: sudo timedatectl set-ntp true")
    if abs(offset) > CLOCK_OFFSET_S_MAX:
        return Verdict(Status.DEGRADED, f"{text}. Set it: sudo timedatectl set-ntp true")
    return Verdict(Status.HEALTHY, text)


def judge_loop(lag_s: float) -> Verdict:
    """The longest time in the last minute that the agent's event loop was late."""
    text = f"at most {lag_s * 1000:.0f} ms late in the last minute"
    if lag_s > LOOP_LAG_S_CRITICAL:
        return Verdict(Status.UNHEALTHY, f"{text}: the machine or the agent was stopped, or is starved of CPU.")
    if lag_s > LOOP_LAG_S_MAX:
        return Verdict(Status.DEGRADED, f"{text}: the machine is very busy. Give the agent more CPU.")
    return Verdict(Status.HEALTHY, text)


def judge_mesh(contact: MeshContact) -> Verdict:
    """Whether anybody can be reached. A mesh of one is well, and so is one whose other machines are partly off."""
    if contact.others == 0:
        return Verdict(Status.HEALTHY, "this node is the only member")
    if contact.up == 0 and contact.is_looking:
        return Verdict(Status.UNKNOWN, f"just started: looking for {_others(contact.others)}")
    if contact.up == 0:
        members = "the other member" if contact.others == 1 else f"none of the {contact.others} other members"
        verb = "cannot" if contact.others == 1 else "can"
        return Verdict(
            Status.DEGRADED,
            f"{members} {verb} be reached. If they run, check the network and the firewall: meshnode doctor",
        )
    return Verdict(Status.HEALTHY, f"{contact.up} of {contact.others} other members up")


def _others(count: int) -> str:
    return "the other member" if count == 1 else f"the {count} other members"


def judge_services(services: Sequence[ServiceState]) -> Verdict:
    """The agent's own services. While they start, nothing is known; while it stops, it is unhealthy for callers."""
    by_state: dict[str, list[ServiceState]] = {}
    for service in services:
        by_state.setdefault(service.state, []).append(service)
    if failed := by_state.get("failed"):
        return Verdict(Status.UNHEALTHY, f"failed: {_named(failed)}. Restart the agent; 'meshnode logs' says more.")
    if stopping := by_state.get("stopping", []) + by_state.get("stopped", []):
        return Verdict(Status.UNHEALTHY, f"stopping: {_named(stopping)}")
    if resting := by_state.get("backing_off"):
        return Verdict(Status.DEGRADED, f"failed and will be tried again: {_named(resting)}")
    if starting := by_state.get("starting", []) + by_state.get("waiting", []):
        return Verdict(Status.UNKNOWN, f"starting: {_named(starting)}")
    return Verdict(Status.HEALTHY, f"{len(services)} services run")


def _named(services: Sequence[ServiceState]) -> str:
    return ", ".join(
        f"{service.name} ({service.last_error})" if service.last_error else service.name for service in services
    )
