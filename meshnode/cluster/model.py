"""What the cluster speaks of: nodes, the mesh's summary, the coordinator, invitations, pings, and its events.

Field names are those that clients of the local API know. Sizes are bytes, percentages 0 to 100, durations seconds
unless the name says else. A field that is None is left out of answers.
"""

from typing import Final, Literal

import msgspec

from protocol.ids import NodeId

NodeStatus = Literal["online", "offline"]
Role = Literal["admin", "member"]
Backend = Literal["cuda", "rocm", "metal", "cpu"]
ThermalState = Literal["normal", "warning", "throttled", "emergency"]

INVITATION_TTL_S_MIN: Final = 10.0
INVITATION_TTL_S_MAX: Final = 7 * 86_400.0


class DeviceCapability(msgspec.Struct, frozen=True, kw_only=True):
    """One graphics device. Heartbeats tell sums: what changes is known of a node's only device, not of several."""

    index: int
    name: str
    total_vram: int
    backend: Backend
    free_vram: int | None = None
    effective_free_vram: int | None = None
    temp_celsius: float | None = None
    utilization: float | None = None


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A node's graphics devices together. `available` False: it has none that is known.

    Memory is summed up, `temp_celsius` is the hottest one's, `utilization` the mean of those that tell it; `name`,
    `driver` and `backend` are the first one's; `thermal_state` holds until the hottest cooled down.
    """

    available: bool = False
    name: str = "CPU"
    driver: str = "CPU"
    vram: int = 0
    vram_free: int = 0
    effective_free_vram: int = 0
    backend: Backend = "cpu"
    generator: Literal["automatic1111", "comfyui", "none"] = "none"
    temp_celsius: float | None = None
    utilization: float | None = None
    thermal_state: ThermalState | None = None
    devices: tuple[DeviceCapability, ...] | None = None


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One member as this node sees it."""

    id: NodeId
    name: str
    status: NodeStatus
    device_type: str = "unknown"
    os: str = "unknown"
    arch: str = "unknown"
    cpu_percent: float = 0.0
    ram_used: int = 0
    ram_total: int = 0
    storage_used: int = 0
    storage_total: int = 0
    addresses: tuple[str, ...] = ()
    last_seen: str | None = None
    joined_at: str | None = None
    uptime_seconds: int = 0
    gpu: Gpu = Gpu()
    role: Role = "member"
    coordinator: bool = False
    suspect: bool = False
    left: bool = False
    incompatible: bool = False  # it speaks no protocol version that this node speaks
    this_node: bool = False
    address: str | None = None  # the one in use
    rtt_ms: float | None = None
    udp_blocked: bool | None = None  # its datagrams travel over the link
    version: str | None = None
    boot: int | None = None
    load: float | None = None
    slots_free: int | None = None
    battery_percent: int | None = None
    on_battery: bool | None = None
    cpu_model: str | None = None
    cores: int | None = None
    kernel: str | None = None
    age_seconds: float | None = None  # how old the load figures are


class Coordinator(msgspec.Struct, frozen=True, kw_only=True):
    """Whom this node follows. `quorate`: more than half of the voters hold to it; only then exclusive work runs."""

    id: NodeId
    name: str
    term: int
    quorate: bool
    reason: str | None = None  # why it is not quorate, where this node knows


class MeshPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the mesh, the same on every member; admins change them. Times in seconds."""

    members_may_invite: bool
    members_may_evict: bool
    members_may_delete_models: bool
    gossip_key_rotation_s: float


class PeerLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `meshnode status`."""

    id: NodeId
    name: str
    status: NodeStatus
    role: Role
    coordinator: bool
    suspect: bool = False
    left: bool = False
    incompatible: bool = False
    address: str | None = None
    rtt_ms: float | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh in one answer; only nodes that are online count in the sums."""

    node_count: int
    offline_count: int
    total_ram: int
    used_ram: int
    total_storage: int
    used_storage: int
    total_vram: int
    free_vram: int
    gpu_node_count: int
    mesh_id: str
    node_id: NodeId
    name: str
    role: Role
    version: str
    uptime_seconds: int
    coordinator: Coordinator | None = None
    peers: tuple[PeerLine, ...] = ()
    warnings: tuple[str, ...] = ()


class Invited(msgspec.Struct, frozen=True, kw_only=True):
    """A fresh invitation. `join_url` is the only place where its secret is; it is shown once and stored nowhere."""

    token: str
    short_code: str
    expires_at: str
    cli_command: str
    join_url: str
    role: Role
    addresses: tuple[str, ...]


class InvitationLine(msgspec.Struct, frozen=True, kw_only=True):
    """An invitation as the list shows it, without its secret."""

    token: str
    role: Role
    state: str
    created_at: str
    expires_in_s: float
    wrong_proofs: int
    redeemed_by: NodeId | None = None
    redeemed_name: str | None = None


class PingReport(msgspec.Struct, frozen=True, kw_only=True):
    """Round trips over the control link, in milliseconds."""

    node_id: NodeId
    name: str
    sent: int
    received: int
    rtts_ms: tuple[float, ...]
    transport: str = "link"
    address: str | None = None
    min_ms: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None


class Joining(msgspec.Struct, frozen=True, kw_only=True):
    """A join was granted and stored; the agent now goes over to the new mesh."""

    status: Literal["success"]
    message: str
    mesh_id: str
    node_id: NodeId


# ---- events: what observers of the bus and readers of /api/events are told ----------------------------------------


class NodeJoined(msgspec.Struct, frozen=True):
    """A member is online that was not before."""

    node: NodeInfo


class NodeUpdated(msgspec.Struct, frozen=True):
    """Figures of a member changed."""

    node: NodeInfo


class NodeSuspect(msgspec.Struct, frozen=True):
    """A member did not answer somebody; it may be gone."""

    node: NodeInfo


class NodeOffline(msgspec.Struct, frozen=True):
    """A member counts as gone. `witnesses`: who bore witness; empty if only this node itself could."""

    node: NodeInfo
    witnesses: tuple[NodeId, ...]


class NodeLeft(msgspec.Struct, frozen=True):
    """A member stopped on purpose."""

    node: NodeInfo


class NodeEvicted(msgspec.Struct, frozen=True):
    """A member was evicted, for good; perhaps this very node."""

    id: NodeId
    name: str
    by: NodeId | None = None
    at: str | None = None
    reason: str | None = None


class CoordinatorMoved(msgspec.Struct, frozen=True):
    """Another coordinator, term or quorum. `coordinator` None: none is known."""

    term: int
    quorate: bool
    coordinator: NodeId | None = None


class InvitationUsed(msgspec.Struct, frozen=True):
    """A machine joined by an invitation of this node."""

    token: str
    node_id: NodeId
    name: str
