"""Which addresses are told to peers: a table of hosts, and a real network namespace whose addresses change."""

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import trio

from meshnode.kernel.addresses import (
    AddressWatcher,
    Advice,
    InterfaceAddress,
    advertised,
    interface_class,
    parse_advice,
    read_interfaces,
)
from protocol.ids import Address, pack_address
from protocol.wire.limits import ADDRESSES_PER_NODE_MAX
from tests.support.recording_log import RecordingLog

ROOT = Path(__file__).resolve().parents[2]
PORT = 4893


def on(interface: str, *hosts: str, default: bool = False, temporary: bool = False) -> list[InterfaceAddress]:
    return [InterfaceAddress(interface, host, default, temporary) for host in hosts]


LO = on("lo", "127.0.0.1", "::1")
LAN = on("eth0", "192.168.1.5", "2001:db8::5", "fd00::5", "fe80::5%eth0", default=True)
WIFI = on("wlan0", "192.168.2.5")
DOCKER = on("docker0", "172.17.0.1")
BRIDGE = on("br-0a1b2c3d4e5f", "172.18.0.1")
VPN = on("tailscale0", "100.64.0.7", default=True)


@pytest.mark.parametrize(
    ("interfaces", "bound", "expected"),
    [
        ([*LO, *LAN], [], ["192.168.1.5", "fd00::5", "2001:db8::5"]),
        (
            [*DOCKER, *VPN, *BRIDGE, *WIFI, *LAN, *LO],
            [],
            ["192.168.1.5", "fd00::5", "2001:db8::5", "192.168.2.5", "172.18.0.1", "172.17.0.1", "100.64.0.7"],
        ),
        # A bridge that has the default route is the card's stand-in, not a container's.
        ([*on("eth1", "10.1.0.1"), *on("br0", "10.0.0.1", default=True)], [], ["10.0.0.1", "10.1.0.1"]),
        ([*LO, *LAN], ["0.0.0.0"], ["192.168.1.5"]),
        ([*LO, *LAN], ["::"], ["fd00::5", "2001:db8::5"]),
        ([*LO, *LAN], ["127.0.0.1"], ["127.0.0.1"]),
        ([*LO, *LAN], ["::1", "127.0.0.1"], ["::1", "127.0.0.1"]),
        ([*LO, *LAN, *WIFI], ["192.168.2.5"], ["192.168.2.5"]),
        # IPv6 only.
        ([*LO, *on("eth0", "2001:db8::9", "fe80::9%eth0", default=True)], [], ["2001:db8::9"]),
        # Nothing but link-local: better than nothing.
        ([*LO, *on("eth0", "fe80::9%eth0", "169.254.7.7")], [], ["169.254.7.7", "fe80::9%eth0"]),
        (LO, [], ["127.0.0.1", "::1"]),
        ([], [], ["127.0.0.1"]),
        ([], ["::"], ["::1"]),
        # An address that stands on the loopback interface without being one is as good as any.
        ([*LO, *on("lo", "10.9.9.9")], [], ["10.9.9.9"]),
        # Privacy addresses come after the lasting one.
        (
            [*on("eth0", "2001:db8::aaaa", temporary=True, default=True), *on("eth0", "2001:db8::f", default=True)],
            [],
            ["2001:db8::f", "2001:db8::aaaa"],
        ),
    ],
)
def test_best_first(interfaces: list[InterfaceAddress], bound: list[str], expected: list[str]) -> None:
    assert advertised(interfaces, bound=bound, port=PORT) == tuple(Address(host, PORT) for host in expected)


def test_one_card_with_many_addresses_does_not_hide_the_next() -> None:
    many = on("eth0", *(f"2001:db8::{n:x}" for n in range(1, 30)), default=True)
    found = [address.host for address in advertised([*many, *WIFI, *VPN], bound=[], port=PORT)]
    assert len(found) == ADDRESSES_PER_NODE_MAX
    assert found[4:6] == ["192.168.2.5", "100.64.0.7"]


def test_what_the_owner_said_comes_first_and_nothing_twice() -> None:
    first = [Address("203.0.113.9", 14_893), Address("192.168.1.5", PORT)]
    found = advertised(LAN, bound=[], port=PORT, first=first)
    assert found[:2] == tuple(first)
    assert len(found) == len(set(found)) == 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("eth0", 0),
        ("enp0s31f6", 0),
        ("wlp2s0", 0),
        ("br0", 0),
        ("bond0", 0),
        ("docker0", 1),
        ("br-0a1b2c", 1),
        ("veth12ab", 1),
        ("virbr0", 1),
        ("tun0", 2),
        ("wg0", 2),
        ("tailscale0", 2),
        ("utun3", 2),
    ],
)
def test_kinds_of_interfaces(name: str, kind: int) -> None:
    assert interface_class(name) == kind


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("home.example", Advice("home.example")),
        ("home.example:1234", Advice("home.example", 1234)),
        ("203.0.113.9", Advice("203.0.113.9")),
        ("[2001:db8::1]:99", Advice("2001:db8::1", 99)),
        ("[2001:db8::1]", Advice("2001:db8::1")),
        ("2001:db8::1", Advice("2001:db8::1")),
    ],
)
def test_advice_is_read(text: str, advice: Advice) -> None:
    assert parse_advice(text) == advice


@pytest.mark.parametrize("text", ["a:b:c", "host:0", "host:65536", "[::1", "::1]:80", "", "host:"])
def test_wrong_advice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_advice(text)


def test_deprecated_addresses_and_default_routes_are_seen(tmp_path: Path) -> None:
    here = read_interfaces()
    assert any(entry.host == "127.0.0.1" for entry in here)
    victim = next((entry for entry in here if entry.host == "::1"), None)
    if victim is None:
        pytest.skip("IPv6 is switched off on this machine")
    (tmp_path / "net").mkdir()
    (tmp_path / "net/if_inet6").write_text(f"{1:032x} 01 80 10 20       lo\n")
    (tmp_path / "net/route").write_text("Iface Destination ...\nlo\t00000000\t0\t3\t0\t0\t0\t00000000\t0\t0\t0\n")
    changed = read_interfaces(tmp_path)
    assert all(entry.host != "::1" for entry in changed)
    assert all(entry.has_default_route for entry in changed if entry.interface == "lo")
    assert not any(entry.has_default_route for entry in changed if entry.interface != "lo")


class Wakeups:
    """Wakes the watcher when the test says so."""

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[None](1)

    async def __call__(self) -> AsyncGenerator[None, None]:
        async for _ in self.receive:
            yield


async def test_a_change_is_told_once() -> None:
    interfaces = [*LO, *LAN]
    told: list[tuple[Address, ...]] = []
    wakeups = Wakeups()
    watcher = AddressWatcher(
        bound_host="",
        port=PORT,
        advertise=["203.0.113.9:1"],
        logger=RecordingLog(),
        read=lambda: list(interfaces),
        wakeups=wakeups.__call__,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(watcher.run, told.append)
        await wakeups.send.send(None)
        await trio.testing.wait_all_tasks_blocked()
        assert [len(addresses) for addresses in told] == [4]
        interfaces += WIFI
        await wakeups.send.send(None)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [len(addresses) for addresses in told] == [4, 5]
    assert watcher.current == told[-1]
    assert told[0][0] == Address("203.0.113.9", 1)


async def test_interfaces_that_cannot_be_read_change_nothing() -> None:
    def fail() -> list[InterfaceAddress]:
        raise PermissionError("not here")

    log = RecordingLog()
    watcher = AddressWatcher(bound_host="", port=PORT, advertise=[], logger=log, read=fail)
    assert await watcher.refresh() == ()
    assert len(log.at("warning")) == 1


async def test_this_machine_has_addresses_that_fit_the_wire() -> None:
    watcher = AddressWatcher(bound_host="localhost", port=PORT, advertise=[], logger=RecordingLog())
    assert {address.host for address in await watcher.refresh()} <= {"127.0.0.1", "::1"}
    watcher = AddressWatcher(bound_host="", port=PORT, advertise=[], logger=RecordingLog())
    found = await watcher.refresh()
    assert 1 <= len(found) <= ADDRESSES_PER_NODE_MAX
    assert all(len(pack_address(address)) in (6, 18) for address in found)


_IN_A_NAMESPACE = """
import subprocess, sys, trio
from meshnode.kernel.addresses import AddressWatcher
from tests.support.recording_log import RecordingLog

def ip(*words):
    subprocess.run(["ip", *words], check=True)

async def main():
    send, receive = trio.open_memory_channel(100)
    watcher = AddressWatcher(bound_host="", port=1, advertise=[], logger=RecordingLog())
    async with trio.open_nursery() as nursery:
        await nursery.start(watcher.run, send.send_nowait)
        with trio.fail_after(20):
            assert {a.host for a in await receive.receive()} <= {"127.0.0.1", "::1"}
            ip("link", "set", "lo", "up")
            ip("addr", "add", "fd00:7::1/128", "dev", "lo")
            while [a.host for a in watcher.current] != ["fd00:7::1"]:
                await receive.receive()
            ip("addr", "add", "10.7.7.7/32", "dev", "lo")
            while [a.host for a in watcher.current] != ["10.7.7.7", "fd00:7::1"]:
                await receive.receive()
            ip("addr", "del", "fd00:7::1/128", "dev", "lo")
            while [a.host for a in watcher.current] != ["10.7.7.7"]:
                await receive.receive()
        nursery.cancel_scope.cancel()

started = trio.run(main)
print("seen")
"""


def test_changes_of_a_real_network_are_heard() -> None:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("unshare and ip make the network of this test")
    inside = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system does not let its users make network namespaces")
    done = subprocess.run(
        [*inside, sys.executable, "-c", _IN_A_NAMESPACE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.stdout == "seen\n", done.stderr
