"""Who is there and how they do: reads for the API, and the events that observers are told.

Everything is answered from this node's own copy, so it is the same from every member once news has travelled. It
decides nothing about membership; it watches what the protocol publishes.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec

from meshnode.cluster import core
from meshnode.cluster.model import (
    Coordinator,
    CoordinatorMoved,
    NodeEvicted,
    NodeInfo,
    NodeJoined,
    NodeLeft,
    NodeOffline,
    NodeSuspect,
    NodeUpdated,
    Summary,
)
from meshnode.cluster.service.clocks import Clocks
from meshnode.cluster.service.names import NAMES_COLLECTION, name_of
from meshnode.cluster.service.notices import Notices
from meshnode.kernel.bus import EventBus
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.resources.profile import Profile
from meshnode.kernel.times import rfc3339
from protocol.effects import LinkLost, LinkOpened
from protocol.election.events import CoordinatorChanged, QuorumChanged
from protocol.heartbeats.events import HeartbeatHeard
from protocol.ids import Address, NodeId
from protocol.membership.events import (
    CutOff,
    DatagramsPass,
    ForgeryCut,
    PeerCleared,
    PeerDown,
    PeerLeft,
    PeerMeasured,
    PeerSuspected,
    PeerUp,
    Reconnected,
    Stalled,
)
from protocol.membership.view import alive_of
from protocol.node import Node
from protocol.records.events import ClockAgrees, ClockContradicted, PeerMuted, RecordChanged, RecordHeld
from protocol.trust.events import RosterChanged

PROFILE_COLLECTION: Final = "nodes"
RTT_WEIGHT: Final = 0.2  # of a new measurement in the moving average
SUMMARY_FRESH_S: Final = 0.25
NODES_PAGE: Final = 1000


class Facts(Protocol):
    """What the composition root knows of this very agent."""

    @property
    def version(self) -> str: ...
    @property
    def name(self) -> str: ...
    def uptime_s(self) -> float: ...
    def now(self) -> float: ...
    def wall(self) -> float: ...


class Nodes:
    """Reads of the mesh, and the translator of protocol events."""

    def __init__(self, *, hub: Node, facts: Facts, bus: EventBus, metrics: Metrics, notices: Notices) -> None:
        self._hub = hub
        self._facts = facts
        self._bus = bus
        self._metrics = metrics
        self._rtt_s: dict[NodeId, float] = {}
        self._tunnelled: set[NodeId] = set()
        self._last_seen: dict[NodeId, float] = {}
        self._names: dict[NodeId, str] = {}
        self._profiles: dict[NodeId, Profile] = {}
        self._quorum: QuorumChanged | None = None
        self._followed_quorate = False  # as the coordinator said, if that is another node
        self._notices = notices
        self._clocks = Clocks()
        self._no_version_in_common: set[NodeId] = set()  # as the last attempt to open a link showed
        self._summary: tuple[float, Summary] | None = None
        metrics.track("fabric_uptime_seconds", facts.uptime_s)
        metrics.track("fabric_nodes_online", lambda: float(len(hub.membership.view.up)))

    # ---- reads -------------------------------------------------------------------------------------------------

    @property
    def me(self) -> NodeId:
        """This node."""
        return self._hub.me

    def name_of(self, node: NodeId) -> str:
        """A member's name, or this node's own; else the id."""
        known = self._names.get(node)
        if known is None and node in self._hub.roster:
            known = self._names[node] = name_of(self._hub, node)
        return known or (self._facts.name if node == self._hub.me else node)

    def addresses(self, node: NodeId) -> list[Address]:
        """Where a member can be reached, the best first."""
        return list(self._hub.membership.addresses(node))

    def rtts(self) -> Mapping[NodeId, float]:
        """Round trips to peers that were measured, in seconds."""
        return self._rtt_s

    def find(self, wanted: str, *, also_evicted: bool = False) -> NodeId:
        """The member (or, by its id, an evicted one) that a person means. MeshError UNKNOWN_NODE or CONFLICT."""
        if also_evicted and any(tombstone.node_id == wanted for tombstone in self._hub.roster.evictions()):
            return NodeId(wanted)
        return core.find([(member, self.name_of(member)) for member in self._hub.roster.members()], wanted)

    def node(self, node: NodeId) -> NodeInfo:
        """One member. MeshError UNKNOWN_NODE if it is none."""
        if node not in self._hub.roster:
            raise MeshError(ErrorCode.UNKNOWN_NODE, f"{node} is no member of this mesh. `meshnode nodes` lists them.")
        return self._info(node)

    def nodes(self, *, limit: int | None = None, cursor: str | None = None) -> tuple[list[NodeInfo], str | None]:
        """Members, the newest first, and the cursor of the next page."""
        members = sorted(self._hub.roster.members(), key=self._joined_key)
        start = 0
        if cursor is not None:
            ids = [str(member) for member in members]
            if cursor not in ids:
                raise MeshError(ErrorCode.BAD_REQUEST, "This cursor leads nowhere any more; list from the beginning.")
            start = ids.index(cursor) + 1
        page = members[start : start + min(limit or NODES_PAGE, NODES_PAGE)]
        more = start + len(page) < len(members)
        return [self._info(member) for member in page], page[-1] if page and more else None

    def _joined_key(self, member: NodeId) -> tuple[int, str]:
        admission = self._hub.roster.admission(member)
        return (-(admission.joined_at if admission is not None else 0), member)

    def online(self) -> list[NodeId]:
        """Members that are up, this node included."""
        return sorted(self._hub.membership.view.up)

    def admins(self) -> list[NodeId]:
        """Members that hold the root key, those online first."""
        roster, up = self._hub.roster, self._hub.membership.view.up
        found = [member for member in roster.members() if roster.role(member) == "admin"]
        return sorted(found, key=lambda member: (member not in up, member))

    def coordinator(self) -> Coordinator | None:
        """Whom this node follows."""
        election = self._hub.election
        leader = election.coordinator
        if leader is None:
            return None
        quorate = self._quorate()
        reason = None
        if not quorate and self._quorum is not None and leader == self._hub.me:
            reason = self._quorum.reason + self._dead_votes()
        return Coordinator(id=leader, name=self.name_of(leader), term=election.term, quorate=quorate, reason=reason)

    def _dead_votes(self) -> str:
        """What to do if the majority is missing because of nodes that were evicted and cannot be asked any more."""
        voters, roster = self._hub.election.electorate.voters, self._hub.roster
        evicted = [stone.node_id for stone in roster.evictions() if bytes(roster.short(stone.node_id)) in voters]
        if not evicted:
            return ""
        return f"; if the evicted machine is gone for good: meshnode evict {evicted[0]} --lost"

    def _quorate(self) -> bool:
        if self._hub.election.coordinator == self._hub.me:
            return self._hub.election.is_quorate(self._facts.now(), self._facts.wall())
        return self._followed_quorate

    def summary(self) -> Summary:
        """The mesh in one answer; at most a quarter of a second old."""
        now = self._facts.now()
        if self._summary is None or now > self._summary[0] + SUMMARY_FRESH_S:
            self._summary = (now, self._summarise())
        return self._summary[1]

    def _summarise(self) -> Summary:
        infos = [self._info(member) for member in self._hub.roster.members()]
        online = [info for info in infos if info.status == "online"]
        with_gpu = [info.gpu for info in online if info.gpu.available]
        others = sorted(
            (info for info in infos if not info.this_node), key=lambda info: (info.status, info.name, info.id)
        )
        me = self._hub.me
        return Summary(
            node_count=len(online),
            offline_count=len(infos) - len(online),
            total_ram=sum(info.ram_total for info in online),
            used_ram=sum(info.ram_used for info in online if info.ram_total),
            total_storage=sum(info.storage_total for info in online),
            used_storage=sum(info.storage_used for info in online if info.storage_total),
            total_vram=sum(gpu.vram for gpu in with_gpu),
            free_vram=sum(gpu.vram_free for gpu in with_gpu),
            gpu_node_count=len(with_gpu),
            mesh_id=self._hub.mesh_id,
            node_id=me,
            name=self.name_of(me),
            role=core.role_of(self._hub.roster.role(me)),
            version=self._facts.version,
            uptime_seconds=int(self._facts.uptime_s()),
            coordinator=self.coordinator(),
            peers=tuple(map(core.peer_line, others)),
            warnings=tuple(self.warnings()),
        )

    @property
    def is_shut_out(self) -> bool:
        """Whether this node was evicted: by its own roster, or as the others say."""
        return self._hub.me not in self._hub.roster or "evicted" in self._notices

    def warnings(self) -> Sequence[str]:
        """What the person should know and do something about."""
        found = self._notices.texts()
        found += filter(None, [self._clocks.warning(self.name_of)])
        odd = [self.name_of(member) for member in self._hub.roster.members() if self._incompatible(member)]
        if odd:
            found.append(f"no protocol version in common with {', '.join(odd)}: update meshnode there or here")
        if self._hub.membership.cut_off:
            found.append(
                "this node hears no other: it is cut off, and what it shows of the others is what it last knew. "
                "Check its network and its firewall"
            )
        if self._hub.me not in self._hub.roster:
            found.append(core.shut_out(self._evicted(self._hub.me), self.name_of))
        return found

    def _evicted(self, node: NodeId) -> NodeEvicted:
        stone = self._hub.roster.evicted(node)
        if stone is None:
            return NodeEvicted(node, self.name_of(node))
        at = rfc3339(stone.evicted_at / 1000)
        return NodeEvicted(node, self.name_of(node), by=stone.by, at=at, reason=stone.reason or None)

    def _info(self, node: NodeId) -> NodeInfo:
        hub, view = self._hub, self._hub.membership.view
        admission, stated = hub.roster.admission(node), view.known.get(node)
        up = node in view.up
        fields: dict[str, object] = {}
        heard = hub.heartbeats.latest.get(node)
        if heard is not None:
            age_s = max(0.0, self._facts.now() - heard[1])
            fields |= core.load_fields(heard[0], age_s, up=up)
        profile = self.profile(node)
        if profile is not None:
            fields |= {
                "device_type": profile.device_type,
                "os": profile.os,
                "arch": profile.arch,
                "ram_total": profile.ram_total,
                "storage_total": profile.storage_total,
                "version": profile.agent_version,
                "cpu_model": profile.cpu or None,
                "cores": profile.cores_logical,
                "kernel": profile.kernel,
            }
        devices = profile.gpus if profile is not None else ()
        listed = [(device.name, device.driver, device.total_vram, device.backend) for device in devices]
        addresses = hub.membership.addresses(node) if node != hub.me else core.stated_addresses(stated)
        seen = self._last_seen.get(node)
        rtt = self._rtt_s.get(node)
        return NodeInfo(
            id=node,
            name=self.name_of(node),
            status=core.status_of(up=up),
            addresses=core.addresses_text(addresses),
            last_seen=rfc3339(self._facts.wall()) if up else rfc3339(seen) if seen is not None else None,
            joined_at=rfc3339(admission.joined_at / 1000) if admission is not None else None,
            gpu=core.gpu_of(heard[0] if heard is not None else None, listed),
            role=core.role_of(hub.roster.role(node)),
            coordinator=hub.election.coordinator == node,
            suspect=node in hub.membership.suspects(),
            left=node in view.left,
            incompatible=self._incompatible(node),
            this_node=node == hub.me,
            address=str(addresses[0]) if up and addresses and node != hub.me else None,
            rtt_ms=round(rtt * 1000, 3) if rtt is not None and up else None,
            udp_blocked=True if node in self._tunnelled else None,
            boot=alive_of(stated).boot if stated is not None else None,
            **fields,  # type: ignore[arg-type]  # the two functions above name fields of NodeInfo
        )

    def _incompatible(self, node: NodeId) -> bool:
        """Whether it says, or its links and datagrams show, that it speaks no protocol version of ours.

        What a datagram claims is not proven, so it counts only of a member that is not up: nobody else can slander it.
        """
        view = self._hub.membership.view
        stated = view.known.get(node)
        if stated is not None and not core.compatible(alive_of(stated)):
            return True
        return node not in view.up and (node in self._no_version_in_common or node in self._hub.datagrams.version_seen)

    def profile(self, node: NodeId) -> Profile | None:
        """What a member says that its machine is."""
        known = self._profiles.get(node)
        if known is None:
            record = self._hub.records.get(PROFILE_COLLECTION, node.encode("ascii"))
            if record is not None:
                known = _decode_profile(record.value)
                if known is not None:
                    self._profiles[node] = known
        return known

    # ---- events ------------------------------------------------------------------------------------------------

    def observe(self, event: object) -> None:
        """Take one event of the protocol: keep what reads need, and tell the bus."""
        match event:
            case PeerMeasured(peer, rtt_s, tunnelled):
                before = self._rtt_s.get(peer)
                self._rtt_s[peer] = rtt_s if before is None else before + RTT_WEIGHT * (rtt_s - before)
                (self._tunnelled.add if tunnelled else self._tunnelled.discard)(peer)
            case DatagramsPass(peer):
                if peer in self._tunnelled:
                    self._tunnelled.discard(peer)
                    self._changed()
                    self._bus.publish(NodeUpdated(self._info(peer)))
            case PeerUp(peer):
                self._changed()
                self._bus.publish(NodeJoined(self._info(peer)))
            case PeerSuspected(peer):
                self._bus.publish(NodeSuspect(self._info(peer)))
            case PeerCleared(peer):
                self._bus.publish(NodeUpdated(self._info(peer)))
            case PeerDown(peer, witnesses, private):
                self._gone(peer)
                self._bus.publish(NodeOffline(self._info(peer), () if private else witnesses))
            case PeerLeft(peer):
                self._gone(peer)
                if peer in self._hub.roster:
                    self._bus.publish(NodeLeft(self._info(peer)))
            case HeartbeatHeard(node):
                if node in self._hub.roster:
                    self._bus.publish(NodeUpdated(self._info(node)))
            case _:
                self._observe_others(event)

    def _observe_others(self, event: object) -> None:
        match event:
            case RosterChanged(admitted=admitted, removed=removed, altered=altered):
                # Those removed keep the names under which they are spoken of; a roster has none for them.
                for node in (*admitted, *altered):
                    self._names.pop(node, None)
                self._changed()
                for node in removed:
                    stone = self._hub.roster.evicted(node)
                    if stone is not None:
                        left = stone.by == node
                        self._metrics.count("meshnode_nodes_left_total" if left else "fabric_node_evictions_total")
                    self._bus.publish(self._evicted(node))
                    self._profiles.pop(node, None)
                    self._no_version_in_common.discard(node)
                    self._clocks.agreed(node)
                    self._notices.clear(f"liar {node}")
                if self._hub.me in removed:
                    # What others said of it is now known for certain, and in more detail.
                    self._notices.clear("evicted")
            case CoordinatorChanged(term, leader, quorate):
                self._changed()
                self._followed_quorate = quorate
                self._bus.publish(CoordinatorMoved(term, quorate, NodeId(leader) if leader is not None else None))
            case QuorumChanged():
                self._quorum = event
                self._changed()
            case RecordChanged(collection, key, record):
                if record.author is not None and self._clocks.agreed(record.author):
                    self._changed()
                if collection == NAMES_COLLECTION:
                    self._renamed(NodeId(key.decode("ascii", "replace")))
                if collection == PROFILE_COLLECTION:
                    self._profiles.pop(NodeId(key.decode("ascii", "replace")), None)
                    self._changed()
            case RecordHeld(author=author, ahead_s=ahead_s) if author in self._hub.roster:
                self._clocks.held(author, ahead_s)
                self._changed()
            case LinkLost(peer=peer, code=ErrorCode.EVICTED) if self._hub.me in self._hub.roster:
                self._notices.put(
                    "evicted",
                    f"{self.name_of(peer)} says that this node was evicted from the mesh. If that is meant, "
                    "`meshnode leave --force` starts afresh; then join with a new invitation",
                )
                self._changed()
            case LinkLost(peer=peer, code=ErrorCode.INCOMPATIBLE_VERSION):
                if peer in self._hub.roster and peer not in self._no_version_in_common:
                    self._no_version_in_common.add(peer)
                    self._changed()
                    self._bus.publish(NodeUpdated(self._info(peer)))
            case LinkOpened(peer):
                self._no_version_in_common.discard(peer)
                if self._notices.clear("evicted"):
                    self._changed()
            case CutOff():
                self._changed()
                for peer in self._hub.membership.view.peers:
                    self._bus.publish(NodeSuspect(self._info(peer)))
            case Reconnected():
                self._changed()
                for peer in self._hub.membership.view.peers:
                    self._bus.publish(NodeUpdated(self._info(peer)))
            case ForgeryCut(peer):
                self._notices.put(f"liar {peer}", core.forgery(peer, self.name_of(peer)))
                self._changed()
            case PeerMuted(peer, for_s):
                self._notices.put(f"liar {peer}", core.unsound_records(peer, self.name_of(peer), for_s))
                self._changed()
            case ClockContradicted(_, ahead_s):
                self._notices.put(
                    "clock",
                    f"this machine's clock is {ahead_s:.0f} s behind what other nodes wrote; set it (for example: "
                    "`timedatectl set-ntp true`)",
                )
                self._changed()
            case ClockAgrees():
                if self._notices.clear("clock"):
                    self._changed()
            case Stalled():
                self._changed()

    def _renamed(self, node: NodeId) -> None:
        self._changed()
        if node in self._hub.roster:
            self._names[node] = name_of(self._hub, node)
            self._bus.publish(NodeUpdated(self._info(node)))

    def _gone(self, peer: NodeId) -> None:
        self._changed()
        self._last_seen[peer] = self._facts.wall()
        self._rtt_s.pop(peer, None)
        self._tunnelled.discard(peer)

    def _changed(self) -> None:
        self._summary = None


def _decode_profile(value: bytes) -> Profile | None:
    try:
        return msgspec.msgpack.decode(value, type=Profile)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None  # a later version's profile may have another shape; the node is shown without it
