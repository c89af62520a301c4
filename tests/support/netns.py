"""Several hosts on one machine: network namespaces, the cables between them, and ways to cut those.

Its job: make hosts that are as far apart as real ones, let a test open sockets inside any of them, and take everything
away again. It leaves agents to `tests.support.agents`. Linux and root only; `why_not` says what is missing.
"""

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

COMMAND_LIMIT_S: Final = 20.0
NAMESPACES: Final = Path("/run/netns")
CLONE_NEWNET: Final = 0x4000_0000
BRIDGE: Final = "br0"


class NetworkSetupError(RuntimeError):
    """A command that makes or changes the network failed."""


def command(*words: str, stdin: str = "") -> str:
    """Run a short command and return what it said. Raises NetworkSetupError with its words on failure."""
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    if done.returncode != 0:
        raise NetworkSetupError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}\n{stdin}")
    return done.stdout


def why_not() -> str | None:
    """Why this machine cannot be several hosts, or None if it can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    for tool in ("ip", "nft"):
        if shutil.which(tool) is None:
            return f"needs the command {tool} (Debian: apt install iproute2 nftables)"
    name = f"mn{os.getpid()}probe"
    try:
        command("ip", "netns", "add", name)
    except NetworkSetupError as error:
        return f"network namespaces cannot be made here: {error}"
    try:
        command("ip", "-n", name, "link", "add", "t0", "type", "veth", "peer", "name", "t1")
        command("ip", "netns", "exec", name, "nft", "add", "table", "inet", "probe")
    except NetworkSetupError as error:
        return f"the network of a namespace cannot be changed here: {error}"
    finally:
        command("ip", "netns", "del", name)
    return None


def socket_in(namespace: str, family: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A socket that belongs to that namespace, whichever thread uses it. Raises OSError."""
    made: list[socket.socket | OSError] = []

    def make() -> None:
        # A namespace is a property of the thread, and this thread is used for nothing else afterwards.
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(descriptor, CLONE_NEWNET) != 0:
                made.append(OSError(ctypes.get_errno(), f"setns {namespace}"))
            else:
                made.append(socket.socket(family, kind))
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=make, name=f"socket in {namespace}")
    thread.start()
    thread.join()
    if not made:
        raise OSError(f"no socket in {namespace}: the namespace is gone")
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


@dataclass
class Cable:
    """One card of a host and the switch port that it leads to. `addresses` are those it has now, with prefix length."""

    card: str
    port: str
    mac: str
    addresses: list[str] = field(default_factory=list)


class Host:
    """One namespace with cards. What it drops is decided in its own packet filter, on what comes in."""

    def __init__(self, lab: "Lab", name: str) -> None:
        self._lab = lab
        self.name = name
        self.namespace = f"{lab.prefix}-{name}"
        self.cables: dict[str, Cable] = {}

    def ip(self, *lines: str) -> None:
        """Run lines of `ip` in this host, all or none reported."""
        command("ip", "-n", self.namespace, "-batch", "-", stdin="\n".join(lines) + "\n")

    def plug(self, *addresses: str, card: str = "eth0", switch: str = BRIDGE) -> Self:
        """A card, cabled to a switch, up, with these addresses."""
        number = self._lab.next_number()
        port, mac = f"p{number}", f"02:00:00:00:00:{number:02x}"
        cable = Cable(card, port, mac)
        self._lab.switch(
            f"link add {port} type veth peer name {card} address {mac} netns {self.namespace}",
            f"link set {port} master {switch} up",
        )
        self.cables[card] = cable
        self.ip(f"link set {card} up")
        self.address(*addresses, card=card)
        return self

    def address(self, *addresses: str, card: str = "eth0") -> None:
        """Give the card exactly these addresses, in one step as a DHCP client does it."""
        cable = self.cables[card]
        gone = [address for address in cable.addresses if address not in addresses]
        fresh = [address for address in addresses if address not in cable.addresses]
        # Without duplicate address detection an IPv6 address is usable at once.
        # Deleted first, because with the first address of a network Linux deletes the others of the same network too.
        # Without duplicate address detection an IPv6 address is usable at once.
        self.ip(
            *(f"addr del {address} dev {card}" for address in gone),
            *(f"addr add {address} dev {card}{' nodad' if ':' in address else ''}" for address in fresh),
        )
        cable.addresses = list(addresses)

    def set(self, name: str, value: str) -> None:
        """Set a kernel parameter of this host's network."""
        command("ip", "netns", "exec", self.namespace, "sysctl", "-q", "-w", f"{name}={value}")

    def bridge(self, address: str, name: str = "docker0") -> Self:
        """A bridge of containers with an address that leads to nobody else."""
        self.ip(f"link add {name} type bridge", f"addr add {address} dev {name}", f"link set {name} up")
        return self

    def unplug(self, card: str = "eth0") -> None:
        """Pull the cable at the switch: the card loses its carrier and keeps its addresses."""
        self._lab.switch(f"link set {self.cables[card].port} down")

    def replug(self, card: str = "eth0") -> None:
        """Put the cable back."""
        self._lab.switch(f"link set {self.cables[card].port} up")

    def ignore(self, *rules: str) -> None:
        """Drop what comes in and matches any of these nft expressions; replaces earlier rules. None: drop nothing."""
        lines = ["add table inet cut", "delete table inet cut"]
        if rules:
            lines += ["add table inet cut", "add chain inet cut in { type filter hook input priority 0 ; }"]
            lines += [f"add rule inet cut in {rule} drop" for rule in rules]
        command("ip", "netns", "exec", self.namespace, "nft", "-f", "-", stdin="\n".join(lines) + "\n")

    def ignore_hosts(self, *others: "Host") -> None:
        """Hear nothing of these hosts any more, whatever card it comes by."""
        self.ignore(*(rule for other in others for rule in other.as_source()))

    def as_source(self) -> list[str]:
        """nft expressions that match what this host sends, by any address: IPv6 gives each card one unasked."""
        return [f"ether saddr {cable.mac}" for cable in self.cables.values()]


class Lab:
    """Hosts around a switch. A context manager: at its end every namespace is gone, and with it all that was in it."""

    def __init__(self, title: str) -> None:
        self._number = 0
        self.prefix = f"mn{os.getpid()}{title}"
        self._switch = f"{self.prefix}-sw"
        self.hosts: dict[str, Host] = {}
        self._made: list[str] = []

    def __enter__(self) -> Self:
        self._make(self._switch)
        try:
            self.add_switch(BRIDGE)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take all namespaces away."""
        made, self._made = self._made, []
        problems = []
        for namespace in reversed(made):
            try:
                command("ip", "netns", "del", namespace)
            except NetworkSetupError as error:
                problems.append(str(error))
        if problems:
            raise NetworkSetupError("; ".join(problems))

    def next_number(self) -> int:
        """A number for the next port."""
        self._number += 1
        return self._number

    def add_switch(self, name: str) -> None:
        """Another switch, which leads to no other."""
        # A switch that listens for group members would hold multicast back until it has heard of them.
        self.switch(f"link add {name} type bridge mcast_snooping 0", f"link set {name} up")

    def switch(self, *lines: str) -> None:
        """Run lines of `ip` where the switches are."""
        command("ip", "-n", self._switch, "-batch", "-", stdin="\n".join(lines) + "\n")

    def host(self, name: str) -> Host:
        """A host without cards; loopback is up."""
        host = Host(self, name)
        self._make(host.namespace)
        self.hosts[name] = host
        return host

    def _make(self, namespace: str) -> None:
        command("ip", "netns", "add", namespace)
        self._made.append(namespace)
        command("ip", "-n", namespace, "link", "set", "lo", "up")


def cut_between(one_side: Sequence[Host], other_side: Sequence[Host]) -> None:
    """Nobody of one side hears anybody of the other."""
    for host in one_side:
        host.ignore_hosts(*other_side)
    for host in other_side:
        host.ignore_hosts(*one_side)


def heal(hosts: Sequence[Host]) -> None:
    """Everybody hears everybody again."""
    for host in hosts:
        host.ignore()
