"""What nodes offer to a model, and what lies between them: the planner's other input. Measuring it is not done here."""

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from protocol.ids import NodeId

RpcSupport = Literal["", "yes", "not_built", "not_isolated"]
"""Whether a node's engines can use and lend by llama.cpp's RPC, or why not; empty: it has no engine, or never said."""


class Speed(msgspec.Struct, frozen=True):
    """How fast a processor is, as measured on one layer of `layer_bytes` bytes; other layers scale with their bytes.

    `token_s`: one token, one sequence (reading the weights is what it costs). `row_s`: each further row of the same
    batch, which is also what a token of a prompt costs.
    """

    layer_bytes: int
    token_s: float
    row_s: float

    def seconds(self, weight_bytes: int, rows: int) -> float:
        """One step of `rows` rows through weights of so many bytes."""
        if rows <= 0:
            return 0.0
        return (self.token_s + self.row_s * (rows - 1)) * weight_bytes / self.layer_bytes


class DeviceOffer(msgspec.Struct, frozen=True):
    """One GPU that the node's llama.cpp can use."""

    name: str
    vram_free_bytes: int
    speed: Speed


class NodeOffer(msgspec.Struct, frozen=True, kw_only=True):
    """What one node lends. `ram_free_bytes` is what it may still fill, not what the machine has."""

    node: NodeId
    name: str
    ram_free_bytes: int
    speed: Speed  # of its processor, with the threads that it lends
    threads: int = 1
    devices: tuple[DeviceOffer, ...] = ()
    has_engine: bool = True  # False: without the `llm` extra it routes, and holds no layers
    version: str = ""  # of llama-cpp-python
    whole_only: tuple[str, ...] = ()  # architectures of which its version can hold no part
    rpc: RpcSupport = ""
    holds: tuple[tuple[int, int], ...] = ()  # ranges [a, b) of the model's layers that lie on its disk

    def held(self, first: int, end: int) -> int:
        """How many of the layers [first, end) need not be fetched."""
        return sum(max(0, min(end, b) - max(first, a)) for a, b in self.holds)


class LinkFacts(msgspec.Struct, frozen=True):
    """Between two nodes, both ways alike."""

    rtt_s: float
    bytes_per_s: float


UNMEASURED = LinkFacts(rtt_s=0.002, bytes_per_s=50e6)
"""Wi-Fi on a fair day: nobody is preferred for never having been measured."""


class Links:
    """Pairwise facts; a pair that nobody measured gets `otherwise`."""

    def __init__(
        self, facts: Mapping[tuple[NodeId, NodeId], LinkFacts] | None = None, otherwise: LinkFacts = UNMEASURED
    ) -> None:
        self._facts = {_pair(*nodes): fact for nodes, fact in (facts or {}).items()}
        self._otherwise = otherwise

    def between(self, one: NodeId, other: NodeId) -> LinkFacts:
        """The facts of a pair, in any order."""
        return self._facts.get(_pair(one, other), self._otherwise)


def _pair(one: NodeId, other: NodeId) -> tuple[NodeId, NodeId]:
    return (one, other) if one <= other else (other, one)


def version_groups(offers: Iterable[NodeOffer], agreeing: frozenset[tuple[str, str]]) -> list[list[NodeOffer]]:
    """Nodes that may stand in one pipeline: of one version, or of versions that a self-test found to agree."""
    by_version: dict[str, list[NodeOffer]] = {}
    for offer in offers:
        by_version.setdefault(offer.version, []).append(offer)
    groups: dict[tuple[str, ...], list[NodeOffer]] = {}
    for version in sorted(by_version):
        together = [version]
        for other in sorted(by_version):
            if other != version and all((other, one) in agreeing or (one, other) in agreeing for one in together):
                together.append(other)
        groups[tuple(sorted(together))] = [offer for one in together for offer in by_version[one]]
    return list(groups.values())
