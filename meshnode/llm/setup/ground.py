"""What the llm subsystem is given of the agent. What it builds of that is `setup`'s."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshnode.kernel.database import Database, KeyValue
from meshnode.kernel.driver import Driver
from meshnode.kernel.links import Links
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.kernel.redaction import SecretSet
from meshnode.kernel.resources.gpu import GpuDevice
from meshnode.settings.tree import LlmSettings
from protocol.election.fence import Fence
from protocol.ids import NodeId
from protocol.node import Node


@dataclass(frozen=True, kw_only=True)
class LlmGround:
    """What the subsystem stands on."""

    settings: LlmSettings
    data_dir: Path
    hub: Node
    driver: Driver
    links: Links
    database: Database
    key_value: KeyValue
    fence: Fence
    name_of: Callable[[NodeId], str]
    find_node: Callable[[str], NodeId]
    gpus: Callable[[], Sequence[GpuDevice]]
    rtts: Callable[[], Mapping[NodeId, float]]
    publish: Callable[[object], object]
    hidden: SecretSet
    offload: Offload
    now: Callable[[], float]
    wall: Callable[[], float]
    log: Callable[[str], Logger]
