"""Pure local decisions: how what is known of a member becomes the NodeInfo and Summary that people see."""

from collections.abc import Callable, Iterable, Sequence
from math import ceil

import msgspec

from meshnode.cluster.model import (
    Backend,
    DeviceCapability,
    Gpu,
    NodeEvicted,
    NodeInfo,
    NodeStatus,
    PeerLine,
    Role,
    ThermalState,
)
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.heartbeats.events import NO_TEMPERATURE_C, HeartbeatFlag
from protocol.ids import Address, NodeId
from protocol.membership.view import addresses_of, alive_of
from protocol.wire.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN
from protocol.wire.messages import Alive, Heartbeat
from protocol.wire.statements import Stated

MIB = 1 << 20  # heartbeats tell sizes in it
BACKENDS: dict[str, Backend] = {"cuda": "cuda", "rocm": "rocm", "metal": "metal"}


def compatible(alive: Alive) -> bool:
    """Whether there is a protocol version that both speak."""
    return alive.version_min <= PROTOCOL_VERSION and alive.version_max >= PROTOCOL_VERSION_MIN


def gpu_of(heartbeat: Heartbeat | None, names: Sequence[tuple[str, str, int, str]]) -> Gpu:
    """`names`: (name, driver, total VRAM in bytes, backend) of each device, from the profile."""
    if not names:
        return Gpu()
    free = total = sum(device[2] for device in names)
    temperature = utilization = None
    if heartbeat is not None:
        if heartbeat.vram_free_mb >= 0:
            free = min(total, heartbeat.vram_free_mb * MIB)
        temperature = float(heartbeat.gpu_temp_c) if heartbeat.gpu_temp_c > NO_TEMPERATURE_C else None
        utilization = heartbeat.gpu_busy_pm / 10 if heartbeat.gpu_busy_pm >= 0 else None
    devices = tuple(
        DeviceCapability(index=index, name=name, total_vram=vram, backend=BACKENDS.get(backend, "cpu"))
        for index, (name, _, vram, backend) in enumerate(names)
    )
    if len(devices) == 1:
        told = {"free_vram": free, "effective_free_vram": free, "temp_celsius": temperature, "utilization": utilization}
        devices = (msgspec.structs.replace(devices[0], **told),)
    return Gpu(
        available=True,
        name=names[0][0],
        driver=names[0][1],
        vram=total,
        vram_free=free,
        effective_free_vram=free,
        backend=devices[0].backend,
        temp_celsius=temperature,
        utilization=utilization,
        thermal_state=thermal_state(heartbeat.flags) if heartbeat is not None else None,
        devices=devices,
    )


def thermal_state(flags: int) -> ThermalState:
    """How hot the hottest device is, as its own node says."""
    if flags & HeartbeatFlag.EMERGENCY:
        return "emergency"
    if flags & HeartbeatFlag.THROTTLED:
        return "throttled"
    return "warning" if flags & HeartbeatFlag.WARM else "normal"


def load_fields(heartbeat: Heartbeat, age_s: float, *, up: bool) -> dict[str, object]:
    """The fields of NodeInfo that come from a heartbeat. Only a node that is up has been running on since."""
    return {
        "cpu_percent": heartbeat.cpu_pm / 10,
        "ram_used": heartbeat.ram_used_mb * MIB,
        "storage_used": heartbeat.storage_used_mb * MIB,
        "uptime_seconds": int(heartbeat.uptime_s + (age_s if up else 0.0)),
        "load": heartbeat.load_c / 100,
        "slots_free": heartbeat.slots_free,
        "battery_percent": heartbeat.battery_pct if heartbeat.battery_pct >= 0 else None,
        "on_battery": bool(heartbeat.flags & HeartbeatFlag.ON_BATTERY) if heartbeat.battery_pct >= 0 else None,
        "age_seconds": round(age_s, 1),
    }


def addresses_text(addresses: Iterable[Address]) -> tuple[str, ...]:
    """Addresses as people read them."""
    return tuple(str(address) for address in addresses)


def stated_addresses(stated: Stated | None) -> tuple[Address, ...]:
    """The addresses that an Alive statement gives."""
    return addresses_of(alive_of(stated)) if stated is not None else ()


def peer_line(node: NodeInfo) -> PeerLine:
    """The short form of a node."""
    return PeerLine(
        id=node.id,
        name=node.name,
        status=node.status,
        role=node.role,
        coordinator=node.coordinator,
        suspect=node.suspect,
        left=node.left,
        incompatible=node.incompatible,
        address=node.address,
        rtt_ms=node.rtt_ms,
    )


def find(nodes: Iterable[tuple[NodeId, str]], wanted: str) -> NodeId:
    """The node that a person means: by id, by name, or by the beginning of its id. MeshError if none or several."""
    listed = list(nodes)
    for matches in (
        [node for node, _ in listed if node == wanted],
        [node for node, name in listed if name == wanted],
        [node for node, name in listed if name.casefold() == wanted.casefold()],
        [node for node, _ in listed if len(wanted) >= 4 and node.startswith(wanted)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise MeshError(
                ErrorCode.CONFLICT,
                f"{len(matches)} nodes are called {wanted!r}; name one by its id: {', '.join(matches)}.",
                detail={"candidates": list(matches)},
            )
    raise MeshError(ErrorCode.UNKNOWN_NODE, f"No node of this mesh is called {wanted!r}. `meshnode nodes` lists them.")


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """The nearest-rank quantile of sorted values; raises IndexError when there are none."""
    return ordered[max(0, ceil(fraction * len(ordered)) - 1)]


def status_of(*, up: bool) -> NodeStatus:
    """The two words that clients know."""
    return "online" if up else "offline"


def role_of(raw: str | None) -> Role:
    """A role that the roster names; unknown ones have the fewest rights."""
    return "admin" if raw == "admin" else "member"


def shut_out(said: NodeEvicted, name_of: Callable[[NodeId], str]) -> str:
    """What a node that is a member no more says of itself, in one line for a person."""
    if said.by is None:
        return (
            "this node was admitted and then not heard of for so long that its admission was withdrawn; nobody talks "
            "to it any more. `meshnode leave --force` starts afresh, then join with a new invitation"
        )
    why = f" ({said.reason})" if said.reason else ""
    return (
        f"this node was evicted from its mesh by {name_of(said.by)} at {said.at}{why}; "
        "nobody talks to it any more. `meshnode leave --force` starts afresh, then join with a new invitation"
    )


def forgery(peer: NodeId, name: str) -> str:
    """A member's link was cut for what it passed on, in one line for a person."""
    return (
        f"{name} passed on forged statements: its link was cut, and it is not listened to for a while. "
        f"Look into that machine; `meshnode evict {peer}` puts it out"
    )


def unsound_records(peer: NodeId, name: str, for_s: float) -> str:
    """A member is muted for the records it sent, in one line for a person."""
    return (
        f"{name} sent records that no sound node sends: its records are ignored for {for_s:.0f} s. "
        f"Look into that machine; `meshnode evict {peer}` puts it out"
    )
