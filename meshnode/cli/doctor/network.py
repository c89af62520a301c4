"""The doctor's checks of the network: ports, addresses, multicast, names and the firewall."""

import errno
import json
import os
import socket
import sys
from typing import Any, Final

from meshnode.cli.doctor.finding import Finding, Patient, Result
from meshnode.cli.doctor.machine import lock_holder
from meshnode.cli.doctor.system import run_program
from meshnode.kernel.addresses import advertised, read_interfaces
from meshnode.kernel.discovery import multicast_interfaces
from meshnode.kernel.ports import holder_of, transport_of

_TCP: Final = socket.SOCK_STREAM
_UDP: Final = socket.SOCK_DGRAM


def check_ports(patient: Patient) -> Finding:
    """The agent's ports are free, or taken by the agent itself."""
    wanted = [
        ("127.0.0.1", patient.api_port, _TCP, "--api-port"),
        ("::1", patient.api_port, _TCP, "--api-port"),
        (patient.peer_host, patient.peer_port, _TCP, "--peer-port"),
        (patient.peer_host, patient.peer_port, _UDP, "--peer-port"),
        ("", patient.onboarding_port, _TCP, "--onboarding-port"),
    ]
    ours = lock_holder(patient.data_dir)
    troubles: list[tuple[str, str, int]] = []
    for host, port, kind, flag in wanted:
        error = _bind_error(host, port, kind)
        if error is None or (host == "::1" and error in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
            continue  # without IPv6 the agent does without ::1
        protocol = transport_of(kind)
        if error in (errno.EACCES, errno.EPERM):
            troubles.append((f"{protocol} {port} is reserved for root", flag, port))
        elif error == errno.EADDRINUSE:
            owner = holder_of(port, transport_of(kind))
            if ours is None or owner is None or owner[0] != ours:
                troubles.append((f"{protocol} {port} is taken by {_named(owner)}", flag, port))
        else:
            troubles.append((f"{protocol} {port} cannot be bound ({os.strerror(error)})", flag, port))
    if not troubles:
        listed = f"{patient.api_port}, {patient.peer_port} and {patient.onboarding_port}"
        state = "are free" if ours is None else "are free or the agent's own"
        return Finding("ports", Result.OK, f"{listed} {state}")
    flags = dict.fromkeys(f"{flag} {_free_port(port)}" for _, flag, port in troubles)
    return Finding("ports", Result.FAIL, "; ".join(text for text, _, _ in troubles), f"meshnode up {' '.join(flags)}")


def _bind_error(host: str, port: int, kind: int) -> int | None:
    """Why the port cannot be bound, or None when it can. The socket is closed at once and heard nothing."""
    if port == 0:
        return None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        probe = socket.socket(family, kind)
    except OSError as error:
        return error.errno or errno.EIO
    with probe:
        if kind == _TCP and os.name == "posix":
            # Without it a port counts as taken for a minute after its last connection.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            if kind == _TCP:
                probe.listen(1)
        except OSError as error:
            return error.errno or errno.EIO
    return None


def _named(owner: tuple[int, str] | None) -> str:
    return "a process of another user" if owner is None else f"{owner[1]} (process {owner[0]})"


def _free_port(near: int) -> int:
    """The next port that is free for TCP and UDP."""
    for port in range(min(near + 100, 65_000), 65_535):
        if _bind_error("", port, _TCP) is None and _bind_error("", port, _UDP) is None:
            return port
    return 0


def check_addresses(patient: Patient) -> Finding:
    """Other machines can reach this one under at least one address."""
    interfaces = read_interfaces(patient.root / "proc")
    bound = [patient.peer_host] if patient.peer_host else []
    try:
        chosen = advertised(interfaces, bound=bound, port=patient.peer_port)
    except ValueError:
        return Finding("addresses", Result.OK, f"peers are told {patient.peer_host}")
    hosts = [address.host for address in chosen]
    families = sorted({"IPv6" if ":" in host else "IPv4" for host in hosts})
    if all(host.startswith("127.") or host == "::1" for host in hosts):
        mend = "connect this machine to the network" if not bound else "meshnode up --peer-host ''"
        return Finding("addresses", Result.WARN, "only this machine itself can reach this node", mend)
    return Finding("addresses", Result.OK, f"{' and '.join(families)}: {', '.join(hosts)}")


def check_multicast(patient: Patient) -> Finding:
    """A datagram to the discovery group can be sent. That the network carries it, only a second machine can tell."""
    failure = "no interface is up"
    for interface in multicast_interfaces():
        with socket.socket(socket.AF_INET, _UDP) as sending:
            try:
                # A hop limit of 0: it stays on this machine, and the agents of this mesh are not bothered.
                sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
                index = interface.index.to_bytes(4, sys.byteorder)
                source = socket.inet_aton(interface.source)
                sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(4) + source + index)
                sending.sendto(b"doctor", (patient.multicast_group, patient.discovery_port))
            except OSError as error:
                failure = f"{interface.name}: {error.strerror}"
                continue
        return Finding("multicast", Result.OK, f"announcements leave by {interface.name}")
    mend = patient.system.sudo(f"ip route add {patient.multicast_group}/32 dev INTERFACE")
    return Finding("multicast", Result.WARN, f"nodes cannot find each other by themselves ({failure})", mend)


def check_local_names(patient: Patient) -> Finding:
    """Whether other machines know this one as NAME.local (RFC 6762). Nothing in the mesh needs it."""
    name = socket.gethostname().partition(".")[0]
    if sys.platform == "darwin" or (patient.root / "run/avahi-daemon/pid").exists():
        return Finding("local_names", Result.OK, f"this machine is {name}.local to others")
    mend = patient.system.install({"apt": "avahi-daemon libnss-mdns", "dnf": "avahi nss-mdns", "": "avahi nss-mdns"})
    return Finding("local_names", Result.OK, f"{name}.local is not announced; addresses are used instead", mend)


def check_firewall(patient: Patient) -> Finding:
    """No firewall of this machine stands between the peers. One that only root can see is not seen by others."""
    peers, onboarding = patient.peer_port, patient.onboarding_port
    ufw = patient.root / "etc/ufw/ufw.conf"
    if ufw.exists() and "ENABLED=yes" in ufw.read_text(encoding="utf-8", errors="replace"):
        commands = [f"ufw allow {peers}/tcp", f"ufw allow {peers}/udp", f"ufw allow {onboarding}/tcp"]
        rules = patient.root / "etc/ufw/user.rules"
        if os.access(rules, os.R_OK) and f"--dport {peers} " in rules.read_text(encoding="utf-8", errors="replace"):
            return Finding("firewall", Result.OK, "ufw is on and lets the peers in")
        return Finding("firewall", Result.WARN, "ufw is on", " && ".join(map(patient.system.sudo, commands)))
    state = run_program(["firewall-cmd", "--state"])
    if state is not None and state.text == "running":
        ports = f"--add-port={peers}/tcp --add-port={peers}/udp --add-port={onboarding}/tcp"
        command = f"firewall-cmd --permanent {ports}"
        commands = [patient.system.sudo(command), patient.system.sudo("firewall-cmd --reload")]
        listed = run_program(["firewall-cmd", "--list-ports"])
        if listed is not None and {f"{peers}/tcp", f"{peers}/udp"} <= set(listed.text.split()):
            return Finding("firewall", Result.OK, "firewalld is on and lets the peers in")
        return Finding("firewall", Result.WARN, "firewalld is on", " && ".join(commands))
    return _check_nftables(patient)


def _check_nftables(patient: Patient) -> Finding:
    listed = run_program(["nft", "-j", "list", "ruleset"])
    if listed is None or listed.status != 0:
        hidden = listed is not None and not patient.system.is_root
        text = "no firewall was seen; only root can look into nftables" if hidden else "no firewall was seen"
        return Finding("firewall", Result.OK, text)
    try:
        entries: list[Any] = json.loads(listed.text)["nftables"]
    except (ValueError, KeyError, TypeError):
        return Finding("firewall", Result.OK, "nftables answers in a form that is not understood here")
    ports = {patient.peer_port, patient.onboarding_port}
    closed = closed_input_chain(entries, patient.peer_port)
    if closed is None:
        return Finding("firewall", Result.OK, "nftables lets the peers in")
    tcp, udp = f"tcp dport {{ {', '.join(map(str, sorted(ports)))} }}", f"udp dport {patient.peer_port}"
    commands = [patient.system.sudo(f"nft 'insert rule {closed} {match} accept'") for match in (tcp, udp)]
    return Finding("firewall", Result.WARN, f"nftables drops what arrives (chain {closed})", " && ".join(commands))


def closed_input_chain(entries: list[Any], port: int) -> str | None:
    """`FAMILY TABLE CHAIN` of an input chain that drops by default and has no rule about this port; None: no such."""
    for entry in entries:
        chain = entry.get("chain") if isinstance(entry, dict) else None
        if not chain or chain.get("hook") != "input" or chain.get("policy") != "drop":
            continue
        place = (chain.get("family"), chain.get("table"), chain.get("name"))
        rules = [
            other["rule"]
            for other in entries
            if isinstance(other, dict)
            and "rule" in other
            and (other["rule"].get("family"), other["rule"].get("table"), other["rule"].get("chain")) == place
        ]
        if not any(_speaks_of(rule, port) for rule in rules):
            return " ".join(str(part) for part in place)
    return None


def _speaks_of(value: Any, port: int) -> bool:
    """Whether the port's number stands anywhere in a rule, alone or inside a range."""
    match value:
        case bool():
            return False
        case int():
            return value == port
        case {"range": [int(low), int(high)]}:
            return low <= port <= high
        case dict():
            return any(_speaks_of(inner, port) for key, inner in value.items() if key != "handle")
        case list():
            return any(_speaks_of(inner, port) for inner in value)
        case _:
            return False
