"""Answers of an agent as the local API gives them, for tests of what the command line makes of them."""

from typing import Any

ME = "a" * 8 + "2" * 24
PEER = "b" * 8 + "3" * 24
OTHER = "b" * 4 + "c" * 4 + "4" * 24
MESH = "m" * 26
WALL = 1_800_000_000.0
"""2027-01-15T08:00:00Z"""


def node(**changes: Any) -> dict[str, Any]:
    """One member: this node, unless changed."""
    return {
        "id": ME,
        "name": "den",
        "status": "online",
        "os": "linux",
        "arch": "amd64",
        "cpu_percent": 12.4,
        "ram_used": 3 * 1024**3,
        "ram_total": 16 * 1024**3,
        "storage_used": 100 * 1024**3,
        "storage_total": 500 * 1024**3,
        "addresses": ["192.0.2.1:4893"],
        "uptime_seconds": 11_520,
        "gpu": {"available": False, "name": "CPU"},
        "role": "admin",
        "coordinator": True,
        "suspect": False,
        "left": False,
        "incompatible": False,
        "this_node": True,
        "version": "0.1.0",
        "age_seconds": 0.4,
    } | changes


def peer(**changes: Any) -> dict[str, Any]:
    """Another member."""
    return (
        node(
            id=PEER,
            name="attic",
            role="member",
            coordinator=False,
            this_node=False,
            address="192.0.2.2:4893",
            rtt_ms=0.423,
            last_seen="2027-01-15T07:59:48Z",
            gpu={"available": True, "name": "RTX 3090", "vram": 24 * 1024**3, "vram_free": 20 * 1024**3},
        )
        | changes
    )


def summary(**changes: Any) -> dict[str, Any]:
    """The mesh of the two."""
    return {
        "node_count": 2,
        "offline_count": 1,
        "total_ram": 32 * 1024**3,
        "used_ram": 6 * 1024**3,
        "total_storage": 1000 * 1024**3,
        "used_storage": 200 * 1024**3,
        "total_vram": 24 * 1024**3,
        "free_vram": 20 * 1024**3,
        "gpu_node_count": 1,
        "mesh_id": MESH,
        "node_id": ME,
        "name": "den",
        "role": "admin",
        "version": "0.1.0",
        "uptime_seconds": 11_520,
        "coordinator": {"id": ME, "name": "den", "term": 4, "quorate": True},
        "peers": [
            {
                "id": PEER,
                "name": "attic",
                "status": "online",
                "role": "member",
                "coordinator": False,
                "address": "192.0.2.2:4893",
                "rtt_ms": 0.423,
            },
            {"id": OTHER, "name": "barn", "status": "offline", "role": "member", "coordinator": False},
        ],
        "warnings": [],
    } | changes
