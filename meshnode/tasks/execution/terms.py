"""What a node's owner lets each task have."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Terms:
    """Sizes in bytes. `isolated` False: no walls at all. `folders`: more that tasks may read. `memory_bytes`: for tasks
    that ask for nothing; 0: no limit. `environment`: what a task without walls finds.

    `hidden`: what tasks never see, wherever it lies: this agent's data. `trusts_user`: whether a caller of the local
    API who is this agent's user needs no token; see `isolation.no_network`.
    """

    isolated: bool = True
    network: bool = False
    trusts_user: bool = True
    folders: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    memory_bytes: int = 0
    head_bytes: int = 8 << 20
    tail_bytes: int = 8 << 20
    grace_s: float = 10.0
    nice: int = 5
    environment: Mapping[str, str] = field(default_factory=dict)
