"""The UDP socket of the peers' port: what comes in can be answered, also at a link-local address."""

import socket
from contextlib import closing

import pytest
import trio

from meshnode.kernel.datagrams import DatagramSocket, open_datagrams
from protocol.ids import Address


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


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_datagram_arrives_with_its_source(host: str) -> None:
    with closing(open_datagrams(host, 0)) as one, closing(open_datagrams(host, 0)) as other:
        one.send(Address(host, other.port), b"hello")
        assert await first_source(other) == Address(host, one.port)


def link_local() -> str | None:
    """A link-local address of this machine with the number of its interface."""
    try:
        lines = open("/proc/net/if_inet6", encoding="ascii").read().splitlines()
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
