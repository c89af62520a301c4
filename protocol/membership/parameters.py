"""The numbers of membership, with profiles for a LAN, a WAN and one machine. Seconds unless the name says else."""

from dataclasses import dataclass, replace
from typing import Final, Literal

Profile = Literal["lan", "wan", "local"]


@dataclass(frozen=True, slots=True)
class Parameters:
    """Timing and fan-out. Detection takes about probe_interval / 1 + probe_timeout + suspicion_floor + spreading."""

    probe_interval_s: float = 0.5
    direct_timeout_s: float = 0.3  # then relays are asked
    relay_timeout_s: float = 0.65  # then the link is tried; measured from the start of the probe
    probe_timeout_s: float = 1.0  # then the target is accused
    relays: int = 3
    relay_wait_s: float = 0.25  # how long a relay waits for the target before its Nack
    gossip_interval_s: float = 0.1
    gossip_fanout: int = 4
    transmit_factor: float = 2.0  # a statement is sent about factor * ln(N + 2) times by each node that passes it on
    suspicion_floor_s: float = 2.0  # time for the accused to refute, counted from the first accusation seen
    suspicion_expiry_s: float = 20.0  # accusations without enough witnesses lapse
    witnesses_max: int = 3
    verifiers: int = 12  # about how many nodes probe a suspect at once, whatever the mesh's size
    reach_window_s: float = 5.0  # who was heard from in this window could be a witness
    isolation_s: float = 60.0  # hearing nobody for so long, a node takes the others for gone, privately
    announce_interval_s: float = 3.0
    heal_wait_s: float = 2.5  # mass resurrections are left to view reports for so long
    report_fresh_s: float = 15.0
    report_age_s: float = 20.0  # a node that started later makes no report: it copied its view
    report_mass: int = 8  # from so many disagreements on, a view report is cheaper than single statements
    sync_wait_s: float = 3.0  # a difference of views must last so long before a link repairs it
    sync_pause_s: float = 5.0
    young_s: float = 5.0  # a node that just started repairs differences sooner
    probe_interval_young_s: float = 0.2  # and probes more often: views are compared with pings
    sync_wait_young_s: float = 0.1
    sync_pause_young_s: float = 0.25
    stall_s: float = 1.5  # no event for so long: this process did not run
    health_max: int = 8  # Lifeguard's local health multiplier saturates here
    leave_sends_max: int = 64  # a starting or leaving node tells so many peers itself


LAN: Final = Parameters()


def parameters(profile: Profile) -> Parameters:
    """The profile's numbers. `wan` bears round trips of 300 ms; `local` is for many agents on one busy machine."""
    match profile:
        case "lan":
            return LAN
        case "wan":
            return replace(
                LAN,
                probe_interval_s=1.0,
                probe_interval_young_s=0.4,
                direct_timeout_s=1.0,
                relay_timeout_s=2.0,
                probe_timeout_s=3.0,
                relay_wait_s=0.9,
                gossip_interval_s=0.25,
                suspicion_floor_s=4.0,
            )
        case "local":
            return replace(LAN, direct_timeout_s=0.5, relay_timeout_s=1.0, probe_timeout_s=1.5, relay_wait_s=0.4)
