"""The peers' UDP socket: both families on one port, words for a port that is taken, losses counted and never raised."""

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
import trio

from meshnode.kernel.datagrams import BATCH_MAX, DatagramSocket, open_datagrams
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.ids import Address


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


class Inbox:
    """Everything received, and a way to wait for it."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, Address]] = []
        self._more = trio.Event()

    def receive(self, data: bytes, source: Address) -> None:
        self.got.append((data, source))
        self._more.set()

    async def until(self, count: int) -> None:
        with trio.fail_after(5):
            while len(self.got) < count:
                self._more = trio.Event()
                await self._more.wait()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_datagrams_go_there_and_back(host: str, nursery: trio.Nursery) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    a, b = open_datagrams(host, 0), open_datagrams(host, 0)
    inbox = Inbox()
    nursery.start_soon(b.run, inbox.receive)
    for number in range(3 * BATCH_MAX):
        a.send(Address(host, b.port), b"%d" % number)
    await inbox.until(3 * BATCH_MAX)
    assert inbox.got[0] == (b"0", Address(host, a.port))
    assert (a.sent_bytes, b.received_bytes, a.unsent) == (sum(len(d) for d, _ in inbox.got),) * 2 + (0,)
    a.close()
    b.close()


async def test_both_families_share_a_port(nursery: trio.Nursery) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    both = open_datagrams("", 0)
    inbox = Inbox()
    nursery.start_soon(both.run, inbox.receive)
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.sendto(host.encode(), (host, both.port))
    await inbox.until(2)
    assert sorted((data, source.host) for data, source in inbox.got) == [(b"127.0.0.1", "127.0.0.1"), (b"::1", "::1")]
    both.close()


def test_a_port_that_is_taken() -> None:
    first = open_datagrams("127.0.0.1", 0)
    with pytest.raises(MeshError) as caught:
        open_datagrams("127.0.0.1", first.port)
    assert caught.value.code is ErrorCode.PORT_IN_USE
    assert str(first.port) in caught.value.message
    assert "--peer-port" in caught.value.message
    assert f"UDP port {first.port}" in caught.value.message
    assert f"(process {os.getpid()})" in caught.value.message
    # All addresses: the IPv6 half that could be bound is given back.
    with pytest.raises(MeshError):
        open_datagrams("", first.port)
    port = first.port
    first.close()
    open_datagrams("127.0.0.1", port).close()


def test_a_port_whose_tcp_side_is_taken_is_of_no_use() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(MeshError, match=str(port)) as caught:
            open_datagrams("127.0.0.1", port)
        assert f"(process {os.getpid()})" in caught.value.message
    assert caught.value.code is ErrorCode.PORT_IN_USE
    assert f"TCP port {port}" in caught.value.message


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(MeshError) as caught:
        open_datagrams("192.0.2.1", 0)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert "192.0.2.1" in caught.value.message
    assert "--peer-host" in caught.value.message


async def test_what_cannot_be_sent_is_counted() -> None:
    bound = open_datagrams("127.0.0.1", 0)
    bound.send(Address("::1", 9), b"another family")
    bound.send(Address("127.0.0.1", 0), b"no port")
    bound.send(Address("127.0.0.1", 9), bytes(70_000))
    assert (bound.unsent, bound.sent_bytes) == (3, 0)
    bound.close()


async def test_an_oversized_datagram_is_seen_as_oversized_and_does_no_harm(nursery: trio.Nursery) -> None:
    bound, inbox = open_datagrams("127.0.0.1", 0), Inbox()
    nursery.start_soon(bound.run, inbox.receive)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for size in (60_000, 0, 1201, 1200):
            sock.sendto(bytes(size), ("127.0.0.1", bound.port))
    await inbox.until(4)
    assert [len(data) for data, _ in inbox.got] == [1500, 0, 1201, 1200]
    bound.close()


async def test_nobody_there_does_not_end_receiving(nursery: trio.Nursery) -> None:
    """An ICMP "port unreachable" of an earlier send surfaces at a later call on the same socket."""
    bound, inbox = open_datagrams("127.0.0.1", 0), Inbox()
    nursery.start_soon(bound.run, inbox.receive)
    closed = open_datagrams("127.0.0.1", 0)
    nowhere = closed.port
    closed.close()
    for _ in range(5):
        bound.send(Address("127.0.0.1", nowhere), b"x")
        await trio.testing.wait_all_tasks_blocked()
    bound.send(Address("127.0.0.1", bound.port), b"still here")
    await inbox.until(1)
    assert inbox.got[0][0] == b"still here"
    bound.close()


async def first_source(receiver: DatagramSocket) -> Address:
    """Where the next datagram came from."""
    sources: list[Address] = []
    with trio.fail_after(5.0):
        async with trio.open_nursery() as nursery:

            def receive(data: bytes, source: Address) -> None:
                sources.append(source)
                nursery.cancel_scope.cancel()

            nursery.start_soon(receiver.run, receive)
    return sources[0]


def link_local() -> str | None:
    """A link-local address of this machine with the number of its interface."""
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for raw, index, _, scope, flags, _ in (line.split() for line in lines):
        if scope == "20" and not int(flags, 16) & 0x40:
            return f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(raw))}%{int(index, 16)}"
    return None


async def test_a_link_local_source_can_be_answered() -> None:
    here = link_local()
    if here is None:
        pytest.skip("this machine has no link-local IPv6 address")
    with closing(open_datagrams(here, 0)) as one, closing(open_datagrams(here, 0)) as other:
        one.send(Address(here, other.port), b"hello")
        source = await first_source(other)
        assert source == Address(here, one.port)
        other.send(source, b"and back")
        assert await first_source(one) == Address(here, other.port)
