"""Hearing of other nodes on the local network, and being heard.

Its job: a small UDP multicast announcement now and then, on every interface, and a report of those that arrive. It
admits nobody and answers nobody (an answer to a forged source would be somebody else's flood): who heard of an address
dials it, and TLS and the roster decide. The announcement's bytes are `protocol.wire.announcement`'s.

A network without multicast is no error: the mesh then knows its members by the addresses it remembers.
"""

import errno
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from typing import Final, Protocol

import psutil
import trio

from meshnode.kernel.addresses import interface_class
from meshnode.kernel.clock import Clock
from meshnode.kernel.logs import Logger
from meshnode.kernel.service import Policy
from protocol.ids import Address, MeshId, NodeId
from protocol.wire.announcement import (
    ANNOUNCEMENT_BYTES_MAX,
    Announcement,
    decode_announcement,
    encode_announcement,
)

ANNOUNCE_INTERVAL_S: Final = 30.0
JITTER: Final = 0.2
FIRST_AFTER_S_MAX: Final = 1.0
"""After a power cut all nodes of a house start at once; the first announcement is spread over this time."""

INTERFACES_MAX: Final = 16
"""Linux lets a socket be in 20 IPv4 groups; a host with hundreds of containers has hundreds of interfaces."""

PACKETS_PER_S_MAX: Final = 100
"""What a flood may cost: more packets a second are read and thrown away unseen."""

REPORT_INTERVAL_S: Final = 5.0
"""The same node at the same address is reported at most so often."""

REMEMBERED_MAX: Final = 1_024


@dataclass(frozen=True, slots=True)
class Discovered:
    """Somebody at `address` says that it is this node of this mesh. Nothing of it is proven."""

    mesh_id: MeshId
    node_id: NodeId
    address: Address


@dataclass(frozen=True, slots=True)
class DiscoveryParameters:
    """settings.discovery, and how often to announce (seconds; each pause varies by JITTER).

    Raises ValueError for a group that is none. An empty group switches its address family off.
    """

    group: str = "239.255.48.93"
    group_ipv6: str = "ff02::4893"
    port: int = 4895
    interval_s: float = ANNOUNCE_INTERVAL_S

    def __post_init__(self) -> None:
        for group, version in ((self.group, 4), (self.group_ipv6, 6)):
            if group and (not ip_address(group).is_multicast or ip_address(group).version != version):
                raise ValueError(f"{group} is not an IPv{version} multicast group")


class Chance(Protocol):
    """The part of random.Random that the pauses draw from."""

    def uniform(self, a: float, b: float, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface that multicast may work on. `index` is the system's number for it.

    `source`: the IPv4 address that announcements shall come from; 0.0.0.0 leaves that to the system.
    """

    name: str
    index: int
    source: str = "0.0.0.0"


class Multicast(Protocol):
    """Group membership and datagrams of one address family; tests bring their own."""

    def join(self, interfaces: list[Interface]) -> None:
        """Be in the group on these interfaces too. Raises OSError if none of them will have it."""
        ...

    async def send(self, data: bytes, interface: Interface) -> None:
        """One datagram to the group by this interface. Raises OSError."""
        ...

    async def receive(self) -> tuple[bytes, str]:
        """The next datagram and the host that it came from. Raises OSError."""
        ...

    def close(self) -> None: ...


def multicast_interfaces(bound_host: str = "") -> list[Interface]:
    """The interfaces that are up, cards before bridges before loopback, at most INTERFACES_MAX.

    `bound_host` is the IP literal that the peer port is bound to: then it is the interface of this address alone, since
    an announcement by another one would name an address where nobody listens. Loopback counts only where there is
    nothing else, for several agents on a machine without a network. Raises OSError when they cannot be read.
    """
    states = psutil.net_if_stats()
    only = _interfaces_of(bound_host)
    source = bound_host if only is not None and ":" not in bound_host else "0.0.0.0"
    found: list[tuple[int, Interface]] = []
    for index, name in socket.if_nameindex():
        state = states.get(name)
        if state is None or not state.isup or name.startswith("veth") or (only is not None and name not in only):
            continue
        flags = state.flags.split(",")
        if "loopback" in flags:
            # Left to itself, Linux lets a datagram to a group leave loopback with another interface's address.
            found.append((2, Interface(name, index, "127.0.0.1" if only is None else source)))
        elif "multicast" in flags or not state.flags:
            found.append((1 if interface_class(name) else 0, Interface(name, index, source)))
    ranked = [interface for kind, interface in sorted(found, key=lambda entry: (entry[0], entry[1].index)) if kind < 2]
    return ranked[:INTERFACES_MAX] or [interface for _, interface in found]


def _interfaces_of(host: str) -> set[str] | None:
    """The names of the interfaces that have this address; None when it stands for all."""
    try:
        ip = ip_address(host)
    except ValueError:
        return None
    if ip.is_unspecified:
        return None
    # Linux answers on all of 127.0.0.0/8, of which only the first address is listed.
    wanted = {str(ip), "127.0.0.1"} if ip.is_loopback and ip.version == 4 else {str(ip)}
    return {
        name for name, addresses in psutil.net_if_addrs().items() if any(entry.address in wanted for entry in addresses)
    }


class MulticastSocket:
    """One socket that listens to a group and one that sends to it, of the group's address family."""

    def __init__(self, group: str, port: int) -> None:
        """Bind, and set how far announcements travel: one hop. Raises OSError."""
        self._group = group
        self._port = port
        self._is_ipv4 = isinstance(ip_address(group), IPv4Address)
        family = socket.AF_INET if self._is_ipv4 else socket.AF_INET6
        listening = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._bind(listening)
            sending = socket.socket(family, socket.SOCK_DGRAM)
        except OSError:
            listening.close()
            raise
        if self._is_ipv4:
            sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
        else:
            sending.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 1)
        self._listening = trio.socket.from_stdlib_socket(listening)
        self._sending = trio.socket.from_stdlib_socket(sending)

    def join(self, interfaces: list[Interface]) -> None:
        """See Multicast."""
        failure = OSError("no interface is up")
        joined = 0
        for interface in interfaces:
            try:
                self._join(interface)
            except OSError as error:
                failure = error
                joined += error.errno == errno.EADDRINUSE  # it is in the group on this interface already
            else:
                joined += 1
        if not joined:
            raise failure

    async def send(self, data: bytes, interface: Interface) -> None:
        """See Multicast."""
        if self._is_ipv4:
            self._sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, _mreqn("0.0.0.0", interface))
            await self._sending.sendto(data, (self._group, self._port))
        else:
            self._sending.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, interface.index)
            await self._sending.sendto(data, (self._group, self._port, 0, interface.index))

    async def receive(self) -> tuple[bytes, str]:
        """See Multicast."""
        # One byte more than the longest announcement, so that a longer datagram is seen to be too long.
        data, source = await self._listening.recvfrom(ANNOUNCEMENT_BYTES_MAX + 1)
        host = str(source[0])
        if not self._is_ipv4 and source[3] and "%" not in host and ip_address(host).is_link_local:
            host = f"{host}%{source[3]}"
        return data, host

    def close(self) -> None:
        """Leave the group and give the port back."""
        self._listening.close()
        self._sending.close()

    def _bind(self, listening: socket.socket) -> None:
        # Several agents on one machine listen on the same port; each gets a copy of every multicast datagram.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform not in ("linux", "win32"):
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if self._is_ipv4:
            # Bound to the group, the socket hears nothing that is sent to the machine itself. Windows has no such bind.
            listening.bind(("" if sys.platform == "win32" else self._group, self._port))
        else:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # A link-local group cannot be bound to on several interfaces at once.
            listening.bind(("::", self._port))

    def _join(self, interface: Interface) -> None:
        if self._is_ipv4:
            self._listening.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, _mreqn(self._group, interface))
        else:
            membership = socket.inet_pton(socket.AF_INET6, self._group) + struct.pack("@I", interface.index)
            self._listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, membership)


def _mreqn(group: str, interface: Interface) -> bytes:
    """struct ip_mreqn: the group, the local address, the interface."""
    return struct.pack("@4s4si", socket.inet_aton(group), socket.inet_aton(interface.source), interface.index)


class Discovery:
    """Announces this node and reports others. Constructed once; `run` may be started again after a failure."""

    name: Final = "discovery"
    policy: Final = Policy.RESTART

    def __init__(
        self,
        *,
        mesh_id: MeshId,
        node_id: NodeId,
        peer_port: int,
        bound_host: str,
        heard: Callable[[Discovered], None],
        clock: Clock,
        chance: Chance,
        logger: Logger,
        params: DiscoveryParameters | None = None,
        interfaces: Callable[[str], list[Interface]] = multicast_interfaces,
        open_multicast: Callable[[str, int], Multicast] = MulticastSocket,
    ) -> None:
        """`bound_host`: the IP literal that the peer port is bound to, or nothing for all; `heard` must not block."""
        self._node_id = node_id
        self._packet = encode_announcement(Announcement(mesh_id, node_id, peer_port))
        self._heard = heard
        self._clock = clock
        self._chance = chance
        self._logger = logger
        self._params = params or DiscoveryParameters()
        self._bound_host = bound_host
        self._interfaces = interfaces
        self._open_multicast = open_multicast
        self._complained: set[str] = set()
        self._reported: OrderedDict[tuple[NodeId, Address], float] = OrderedDict()
        self._window_at = float("-inf")
        self._window_packets = 0
        self.dropped_packets = 0
        """Datagrams that were no announcement, or too many."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce and listen for ever, on whatever multicast there is; started at once."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            for group in (self._params.group, self._params.group_ipv6):
                # Bound to one family, an announcement by the other would name an address where nobody listens.
                if group and (not self._bound_host or (":" in group) == (":" in self._bound_host)):
                    nursery.start_soon(self._run_group, group)

    async def _run_group(self, group: str) -> None:
        while True:
            try:
                multicast = self._open_multicast(group, self._params.port)
            except OSError as error:
                self._complain(group, f"socket: {error}")
                await self._pause()
                continue
            try:
                async with trio.open_nursery() as nursery:
                    self._join(multicast, group)
                    nursery.start_soon(self._listen, multicast, group)
                    await trio.sleep(self._chance.uniform(0.0, FIRST_AFTER_S_MAX))
                    while True:
                        await self._announce(multicast, group)
                        await self._pause()
            finally:
                multicast.close()

    async def _pause(self) -> None:
        interval = self._params.interval_s
        await trio.sleep(self._chance.uniform(interval * (1 - JITTER), interval * (1 + JITTER)))

    async def _announce(self, multicast: Multicast, group: str) -> None:
        """Once by every interface; interfaces come and go, so the group is joined anew each time."""
        interfaces = self._join(multicast, group)
        sent, failure = 0, "no interface is up"
        for interface in interfaces:
            try:
                await multicast.send(self._packet, interface)
                sent += 1
            except OSError as error:
                failure = f"{interface.name}: {error}"
        if sent == 0:
            self._complain(group, failure)

    def _join(self, multicast: Multicast, group: str) -> list[Interface]:
        try:
            interfaces = self._interfaces(self._bound_host)
            multicast.join(interfaces)
        except OSError as error:
            self._complain(group, str(error))
            return []
        return interfaces

    async def _listen(self, multicast: Multicast, group: str) -> None:
        while True:
            try:
                data, host = await multicast.receive()
            except OSError as error:
                self._complain(group, f"receiving: {error}")
                await self._pause()
                continue
            self._received(data, host)

    def _received(self, data: bytes, host: str) -> None:
        now = self._clock.monotonic()
        if now - self._window_at >= 1.0:
            self._window_at, self._window_packets = now, 0
        self._window_packets += 1
        announcement = decode_announcement(data) if self._window_packets <= PACKETS_PER_S_MAX else None
        if announcement is None:
            self.dropped_packets += 1
            return
        if announcement.node_id == self._node_id:
            return
        address = Address(host, announcement.port)
        key = (announcement.node_id, address)
        if now - self._reported.get(key, float("-inf")) < REPORT_INTERVAL_S:
            return
        self._reported[key] = now
        self._reported.move_to_end(key)
        if len(self._reported) > REMEMBERED_MAX:
            self._reported.popitem(last=False)
        self._heard(Discovered(announcement.mesh_id, announcement.node_id, address))

    def _complain(self, group: str, why: str) -> None:
        """Once per group: a network without multicast stays one, and works."""
        if group not in self._complained:
            self._complained.add(group)
            self._logger.info("Discovery does not work on this network; joining by URL does.", group=group, why=why)
