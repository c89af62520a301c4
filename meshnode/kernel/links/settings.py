"""Every limit and interval of the links, with its default."""

from dataclasses import dataclass, field

from protocol.rpc.machine import RpcParams
from protocol.wire.frames import Versions


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Seconds and bytes as the names say. `host` None listens on all interfaces, IPv4 and IPv6; `port` 0 takes any."""

    host: str | None = None
    port: int = 4893

    stagger_s: float = 0.15
    handshake_s: float = 5.0
    dial_s: float = 12.0
    redial_min_s: float = 0.5
    redial_max_s: float = 5.0
    redial_incompatible_s: float = 30.0

    write_stall_s: float = 15.0
    ping_interval_s: float = 5.0
    missed_pings_max: int = 2
    clock_interval_s: float = 300.0
    link_idle_s: float = 60.0
    close_s: float = 1.0

    queue_bytes_max: int = 8 * 1024 * 1024
    handshakes_max: int = 256
    handshakes_per_host_max: int = 64
    calls_waiting_max: int = 4096
    grants_max: int = 64
    grant_s: float = 10.0
    bulk_stall_s: float = 30.0

    versions: Versions = field(default_factory=Versions)
    rpc: RpcParams = field(default_factory=RpcParams)
