"""Who would coordinate best: an order of candidates that load and memory pressure do not disturb.

The classes are coarse on purpose. A node moves between them rarely, and the incumbent stays whatever its class becomes.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from protocol.election.events import Standing
from protocol.ids import NodeId

HOUR_S: Final = 3600
DAY_S: Final = 24 * HOUR_S
GIB: Final = 1024  # in MiB


def stability_class(uptime_s: int, *, on_battery: bool, has_battery: bool) -> int:
    """0 (on battery) to 4 (a mains-powered machine that has been up for a day). Uptime only rises, so no flapping."""
    if on_battery:
        return 0
    if has_battery:
        return 1
    return 2 + (uptime_s >= HOUR_S) + (uptime_s >= DAY_S)


def capability_class(cores: int, ram_total_mb: int) -> int:
    """0 to 3 from what never changes while a machine runs: cores and total memory, not their present use."""
    return min(3, min(cores // 4 + (cores >= 2), ram_total_mb // (4 * GIB)))


def rank_key(node: NodeId, short: bytes, standings: Mapping[NodeId, Standing]) -> tuple[int, int, bytes]:
    """Sorts candidates; the greatest is the best. Nodes that nobody has described yet come last, by id."""
    standing = standings.get(node)
    return (0, 0, short) if standing is None else (standing.stability, standing.capability, short)


def best(nodes: Iterable[tuple[NodeId, bytes]], standings: Mapping[NodeId, Standing], count: int) -> tuple[NodeId, ...]:
    """The `count` best of these (node, short id) pairs, the best first."""
    ordered = sorted(nodes, key=lambda pair: rank_key(pair[0], pair[1], standings), reverse=True)
    return tuple(node for node, _ in ordered[:count])


def rank(me: tuple[NodeId, bytes], others: Iterable[tuple[NodeId, bytes]], standings: Mapping[NodeId, Standing]) -> int:
    """How many of the others are better candidates."""
    mine = rank_key(me[0], me[1], standings)
    return sum(rank_key(node, short, standings) > mine for node, short in others)
