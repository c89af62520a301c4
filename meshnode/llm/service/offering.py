"""What each node lends to models, as records that every node reads: memory, speed, devices, the version of its engine.

A node writes its own record when it changes by enough to matter. The planner's input is made of all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import trio

from meshnode.kernel.errors import MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.records import RecordWriter
from meshnode.llm.model import UNREADABLE
from protocol.ids import NodeId
from protocol.node import Node
from protocol.records.collection import Collection, only_owner
from protocol.sharding.offers import DeviceOffer, LinkFacts, Links, NodeOffer, RpcSupport, Speed
from protocol.sharding.predict import FACTOR_MAX, FACTOR_MIN, HOP_OVERHEAD_MAX_S, Learnt
from protocol.wire import limits

OFFERS: Final = "llm/offers"
LOOK_S: Final = 5.0
CHANGE_SHARE: Final = 0.1
CHANGE_BYTES_MIN: Final = 256 * 1024 * 1024
PEERS_TOLD_MAX: Final = 32
LINK_BYTES_PER_S: Final = 100e6  # what a round trip alone does not tell: a wired home network


def offers_collection() -> Collection:
    """Each node speaks for itself."""
    return Collection(OFFERS, may_write=only_owner, value_bytes_max=16_384, records_max=limits.ROSTER_MAX)


class Device(msgspec.Struct, frozen=True, array_like=True):
    """One graphics device that the engine can use."""

    name: str
    vram_free_bytes: int
    speed: Speed


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """One node's record. Later versions append."""

    name: str
    has_engine: bool
    version: str  # of llama-cpp-python; empty without
    threads: int
    ram_free_bytes: int
    speed: Speed
    devices: tuple[Device, ...] = ()
    rtts_us: dict[str, int] = {}  # to peers, by node id
    factors: dict[str, float] = {}  # what sessions taught, by model digest: see protocol/sharding/predict.py
    hop_overhead_s: float | None = None
    whole_only: tuple[str, ...] = ()  # architectures that its engine cannot hold a part of
    rpc: RpcSupport = ""


class Lending(Protocol):
    """This node's own figures."""

    def offer(self) -> Offer:
        """What it lends now. Blocks for a few looks at the system at most."""
        ...


@dataclass(frozen=True)
class Offers:
    """Reads the records of all nodes that are online."""

    hub: Node

    def of(self, node: NodeId) -> Offer | None:
        """One node's, or None."""
        record = self.hub.records.get(OFFERS, node.encode("ascii"))
        if record is None:
            return None
        try:
            return msgspec.msgpack.decode(record.value, type=Offer)
        except UNREADABLE:
            return None

    def online(self) -> dict[NodeId, Offer]:
        """Those of the nodes that are up."""
        found = {node: self.of(node) for node in sorted(self.hub.membership.view.up)}
        return {node: offer for node, offer in found.items() if offer is not None}

    def learnt(self) -> dict[NodeId, Learnt]:
        """What the sessions of each node have taught it, as far as that can be true."""
        found: dict[NodeId, Learnt] = {}
        for node, offer in self.online().items():
            factors = {model: one for model, one in offer.factors.items() if FACTOR_MIN <= one <= FACTOR_MAX}
            overhead = offer.hop_overhead_s
            believable = overhead is not None and 0.0 <= overhead <= HOP_OVERHEAD_MAX_S
            found[node] = Learnt(factors, overhead if believable else None)
        return found

    def unheard(self) -> list[NodeId]:
        """Nodes that are up and have not said yet what they lend."""
        return [node for node in sorted(self.hub.membership.view.up) if self.of(node) is None]

    def planning(self, holds: Callable[[NodeId], tuple[tuple[int, int], ...]]) -> tuple[list[NodeOffer], Links]:
        """As the planner takes them. `holds`: which of the model's layers a node has on its disk."""
        offers: list[NodeOffer] = []
        facts: dict[tuple[NodeId, NodeId], LinkFacts] = {}
        for node, offer in self.online().items():
            devices = tuple(DeviceOffer(one.name, one.vram_free_bytes, one.speed) for one in offer.devices)
            offers.append(
                NodeOffer(
                    node=node,
                    name=offer.name,
                    ram_free_bytes=offer.ram_free_bytes,
                    speed=offer.speed,
                    threads=offer.threads,
                    devices=devices,
                    has_engine=offer.has_engine,
                    version=offer.version,
                    rpc=offer.rpc,
                    holds=holds(node),
                    whole_only=offer.whole_only,
                )
            )
            for peer, rtt_us in offer.rtts_us.items():
                facts[node, NodeId(peer)] = LinkFacts(rtt_s=rtt_us / 1e6, bytes_per_s=LINK_BYTES_PER_S)
        return offers, Links(facts)


class OfferKeeper:
    """Keeps this node's record true."""

    def __init__(self, *, me: NodeId, hub: Node, lending: Lending, writer: RecordWriter, log: Logger) -> None:
        self._me = me
        self._hub = hub
        self._lending = lending
        self._writer = writer
        self._log = log
        self._told: Offer | None = None
        self._hurry = trio.Event()

    def hurry(self) -> None:
        """Something changed by a lot: a model was loaded or let go."""
        self._hurry.set()

    async def run(self) -> None:
        """Look now and then until cancelled."""
        while True:
            offer = self._lending.offer()
            if self._told is None or _differs(self._told, offer):
                try:
                    await self._writer.put(OFFERS, self._me.encode("ascii"), msgspec.msgpack.encode(offer))
                    self._told = offer
                except MeshError as error:
                    self._log.warning("this node's offer to models could not be written", why=error.message)
            self._hurry = trio.Event()
            with trio.move_on_after(LOOK_S):
                await self._hurry.wait()


def _differs(one: Offer, other: Offer) -> bool:
    """Whether a planner would care."""

    def plain(offer: Offer) -> Offer:
        devices = tuple(msgspec.structs.replace(device, vram_free_bytes=0) for device in offer.devices)
        return msgspec.structs.replace(offer, ram_free_bytes=0, devices=devices, rtts_us={})

    if plain(one) != plain(other) or _moved(one.ram_free_bytes, other.ram_free_bytes):
        return True
    pairs = zip(one.devices, other.devices, strict=True)
    if any(_moved(a.vram_free_bytes, b.vram_free_bytes) for a, b in pairs):
        return True
    return _rtts_differ(one.rtts_us, other.rtts_us)


def _moved(before: int, now: int) -> bool:
    return abs(now - before) > max(CHANGE_BYTES_MIN, CHANGE_SHARE * before)


def _rtts_differ(before: Mapping[str, int], now: Mapping[str, int]) -> bool:
    """A new peer, or one that is twice as far or near and a millisecond apart."""
    for peer, rtt_us in now.items():
        old = before.get(peer)
        if old is None or (abs(rtt_us - old) > 1000 and not 0.5 < rtt_us / max(old, 1) < 2.0):
            return True
    return False
