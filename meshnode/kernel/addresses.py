"""Under which addresses other nodes can reach this one, best first.

Its job: the decision (`advertised`, a pure function over what was read) and the watch that reads again when interfaces
change. Telling peers is membership's business (AddressesChanged), dialling the links'.

Linux tells of changes through a netlink socket (RFC 3549); elsewhere, and where that socket is refused, the interfaces
are read every few seconds.
"""

import re
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Final, Protocol

import psutil
import trio

from meshnode.kernel.logs import Logger
from protocol.ids import Address
from protocol.wire.limits import ADDRESSES_PER_NODE_MAX

PER_INTERFACE_MAX: Final = 4
"""So many addresses of one interface come first; a card with a dozen IPv6 addresses must not hide the next card."""

POLL_INTERVAL_S: Final = 5.0
SAFETY_INTERVAL_S: Final = 60.0
SETTLE_S: Final = 0.5
"""A cable that is plugged in causes a burst of messages; one look after the burst is enough."""

RESOLVE_DEADLINE_S: Final = 2.0

_CONTAINER: Final = re.compile(r"^(docker|br-|veth|virbr|vnet|lxc|lxd|cni|flannel|cali|podman|vmnet|vboxnet|vmenet)")
_TUNNEL: Final = re.compile(r"^(tun|tap|utun|ipsec|ppp|wg|tailscale|zt|nebula|ham|gre|sit|ip6tnl|mesh)")
_ULA: Final = ip_network("fc00::/7")

# linux/if_addr.h: an address that may not be used yet (tentative), not any more (deprecated), or never (failed); one
# that was made to be forgotten (temporary, RFC 8981).
_UNUSABLE_FLAGS: Final = 0x20 | 0x40 | 0x08
_TEMPORARY_FLAG: Final = 0x01

# linux/rtnetlink.h: links, and addresses and routes of both families.
_RTMGRP_LINK_AND_ADDRESSES: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_DRAINED_AT_ONCE_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """One address of one interface that is up. `is_temporary`: a privacy address that will be replaced."""

    interface: str
    host: str
    has_default_route: bool = False
    is_temporary: bool = False


@dataclass(frozen=True, slots=True)
class Advice:
    """One entry of settings.peers.advertise: a host name or IP literal and, where it differs from ours, a port."""

    host: str
    port: int | None = None


def parse_advice(text: str) -> Advice:
    """Read HOST, HOST:PORT, [IPV6]:PORT or a bare IPv6 literal. Raises ValueError on anything else."""
    match = re.fullmatch(r"\[([^\[\]]+)\](?::(\d{1,5}))?", text) or re.fullmatch(r"([^:\s\[\]]+)(?::(\d{1,5}))?", text)
    host, port = (match[1], match[2]) if match else (str(ip_address(text)), None)
    if port is not None and not 1 <= int(port) <= 65_535:
        raise ValueError(f"{port} is no port")
    return Advice(host, int(port) if port is not None else None)


def advertised(
    interfaces: Sequence[InterfaceAddress],
    *,
    bound: Sequence[str],
    port: int,
    first: Sequence[Address] = (),
) -> tuple[Address, ...]:
    """The addresses to tell others, best first, at most ADDRESSES_PER_NODE_MAX.

    `bound`: the IP literals that the peer port is bound to; none, 0.0.0.0 or :: stand for all (of that family).
    `first`: what the owner of this machine said. Then come the interface with the default route, other cards, bridges
    of containers and virtual machines, tunnels; within an interface IPv4 before private before public IPv6. Link-local
    addresses count only where there is nothing better, loopback only where there is nothing else at all or where the
    port is bound to it.
    """
    chosen = list(first)
    exact = [host for host in bound if not ip_address(host).is_unspecified]
    if bound and len(exact) == len(bound):
        chosen += [Address(host, port) for host in exact]
        return _bounded(chosen)
    families = {ip_address(host).version for host in bound} or {4, 6}
    usable = [entry for entry in interfaces if _ip(entry).version in families and not _ip(entry).is_unspecified]
    remote = [entry for entry in usable if not _ip(entry).is_loopback]
    routable = [entry for entry in remote if not _ip(entry).is_link_local]
    ranked = _fair(sorted(routable, key=_rank)) or sorted(remote, key=_rank)
    chosen += [Address(entry.host, port) for entry in ranked]
    if not chosen:
        chosen = [Address(entry.host, port) for entry in sorted(usable, key=_rank)]
    if not chosen:
        chosen = [Address("127.0.0.1" if 4 in families else "::1", port)]
    return _bounded(chosen)


def interface_class(name: str) -> int:
    """0 for a card, 1 for a bridge or pair of containers and virtual machines, 2 for a tunnel."""
    if _TUNNEL.match(name):
        return 2
    return 1 if _CONTAINER.match(name) else 0


def _rank(entry: InterfaceAddress) -> tuple[int, bool, str, int, bool, str]:
    ip = _ip(entry)
    family = 0 if isinstance(ip, IPv4Address) else 1 if ip in _ULA else 2
    return (
        interface_class(entry.interface),
        not entry.has_default_route,
        entry.interface,
        family,
        entry.is_temporary,
        entry.host,
    )


def _ip(entry: InterfaceAddress) -> IPv4Address | IPv6Address:
    return ip_address(entry.host)


def _fair(ranked: Sequence[InterfaceAddress]) -> list[InterfaceAddress]:
    """The same order, but what an interface has beyond PER_INTERFACE_MAX goes to the end."""
    seen: dict[str, int] = {}
    front: list[InterfaceAddress] = []
    back: list[InterfaceAddress] = []
    for entry in ranked:
        seen[entry.interface] = seen.get(entry.interface, 0) + 1
        (front if seen[entry.interface] <= PER_INTERFACE_MAX else back).append(entry)
    return front + back


def _bounded(addresses: Iterable[Address]) -> tuple[Address, ...]:
    return tuple(dict.fromkeys(addresses))[:ADDRESSES_PER_NODE_MAX]


# ---- reading this machine ------------------------------------------------------------------------------------------


def read_interfaces(proc: Path = Path("/proc")) -> list[InterfaceAddress]:
    """Every address of every interface that is up; takes well under a millisecond. Raises OSError if it cannot."""
    states = psutil.net_if_stats()
    default = _default_interfaces(proc)
    flags = _ipv6_flags(proc)
    found: list[InterfaceAddress] = []
    for interface, addresses in psutil.net_if_addrs().items():
        if interface not in states or not states[interface].isup:
            continue
        for address in addresses:
            if address.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            host = address.address
            state = flags.get(str(ip_address(host.partition("%")[0])), 0)
            if not state & _UNUSABLE_FLAGS:
                temporary = bool(state & _TEMPORARY_FLAG)
                found.append(InterfaceAddress(interface, host, interface in default, temporary))
    return found


def _default_interfaces(proc: Path) -> set[str]:
    """The interfaces that a packet to anywhere leaves by."""
    found: set[str] = set()
    for line in _lines(proc / "net/route")[1:]:
        fields = line.split()
        if len(fields) >= 8 and fields[1] == "00000000" and fields[7] == "00000000":
            found.add(fields[0])
    for line in _lines(proc / "net/ipv6_route"):
        fields = line.split()
        # An "unreachable" default stands in every table, on the loopback interface.
        if len(fields) >= 10 and fields[0] == "0" * 32 and fields[1] == "00" and fields[9] != "lo":
            found.add(fields[9])
    return found


def _ipv6_flags(proc: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in _lines(proc / "net/if_inet6"):
        fields = line.split()
        if len(fields) >= 6:
            found[str(IPv6Address(bytes.fromhex(fields[0])))] = int(fields[4], 16)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []  # not Linux, or IPv6 is switched off


async def resolve(host: str, *, port: int) -> list[Address]:
    """The IP addresses of a host name or literal; empty when the name is not known within RESOLVE_DEADLINE_S."""
    with trio.move_on_after(RESOLVE_DEADLINE_S):
        try:
            answers = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return []
        return [Address(str(sockaddr[0]), port) for _, _, _, _, sockaddr in answers]
    return []


# ---- watching it ---------------------------------------------------------------------------------------------------


class InterfaceReader(Protocol):
    """Reads this machine's interfaces; see `read_interfaces`."""

    def __call__(self) -> list[InterfaceAddress]: ...


class AddressWatcher:
    """Keeps `current` true while it runs, and tells of every new list."""

    def __init__(
        self,
        *,
        bound_host: str,
        port: int,
        advertise: Sequence[str],
        logger: Logger,
        read: InterfaceReader = read_interfaces,
        wakeups: Callable[[], AsyncGenerator[None, None]] | None = None,
    ) -> None:
        """`bound_host`, `advertise`: settings.peers.host and .advertise; `port`: the one really bound.

        `wakeups` yields whenever reading again may be worth it; without it the system is asked. Raises ValueError for
        an entry of `advertise` that cannot be read.
        """
        self._bound_host = bound_host
        self._port = port
        self._advice = [parse_advice(text) for text in advertise]
        self._logger = logger
        self._read = read
        self._wakeups = wakeups or (lambda: interface_changes(logger))
        self._current: tuple[Address, ...] = ()
        self._unresolved: set[str] = set()

    @property
    def current(self) -> tuple[Address, ...]:
        """The addresses as last decided; empty before `refresh` or `run`."""
        return self._current

    async def refresh(self) -> tuple[Address, ...]:
        """Read and decide now. A failed reading leaves all as it was."""
        first = [address for advice in self._advice for address in await self._resolved(advice)]
        bound = []
        if self._bound_host:
            bound = [address.host for address in await resolve(self._bound_host, port=self._port)] or [self._bound_host]
        try:
            interfaces = self._read()
        except OSError as error:
            self._logger.warning("The network interfaces cannot be read; peers keep the known ones.", why=str(error))
            return self._current
        self._current = advertised(interfaces, bound=bound, port=self._port, first=first)
        return self._current

    async def run(
        self,
        changed: Callable[[tuple[Address, ...]], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Watch for ever, and tell `changed` of each new list; started once the first list stands."""
        await self._look(changed)
        task_status.started()
        async with aclosing(self._wakeups()) as wakeups:
            async for _ in wakeups:
                await self._look(changed)

    async def _look(self, changed: Callable[[tuple[Address, ...]], None]) -> None:
        before = self._current
        if await self.refresh() != before:
            changed(self._current)

    async def _resolved(self, advice: Advice) -> list[Address]:
        addresses = await resolve(advice.host, port=advice.port or self._port)
        if addresses:
            self._unresolved.discard(advice.host)
        elif advice.host not in self._unresolved:
            self._unresolved.add(advice.host)
            self._logger.warning(
                "An address in peers.advertise is not known to the name service; it is left out until it is.",
                host=advice.host,
            )
        return addresses


async def interface_changes(logger: Logger) -> AsyncGenerator[None, None]:
    """Yields after each change of interfaces, addresses or routes, and once a minute; without netlink every 5 s."""
    listening = _netlink(logger)
    if listening is None:
        while True:
            await trio.sleep(POLL_INTERVAL_S)
            yield
    with listening:
        while True:
            with trio.move_on_after(SAFETY_INTERVAL_S):
                await trio.lowlevel.wait_readable(listening)
                await trio.sleep(SETTLE_S)
            _drain(listening)
            yield


def _drain(listening: socket.socket) -> None:
    """Forget what the messages say: one look at everything is what follows anyway."""
    try:
        for _ in range(_DRAINED_AT_ONCE_MAX):
            listening.recv(65_536)
    except OSError:
        # Nothing more is there, or ENOBUFS: there were more changes at once than the kernel keeps for us.
        return


def _netlink(logger: Logger) -> socket.socket | None:
    """A socket that hears of changes, or None where there is none to be had."""
    if sys.platform != "linux":
        return None
    try:
        listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    except OSError as error:
        logger.debug("Changes of the network are polled for: no netlink socket.", why=str(error))
        return None
    try:
        listening.bind((0, _RTMGRP_LINK_AND_ADDRESSES))
    except OSError as error:
        listening.close()
        logger.debug("Changes of the network are polled for: netlink is refused.", why=str(error))
        return None
    listening.setblocking(False)
    return listening
