"""A member that floods: `meshnode up` as any other agent, which besides sends valid statements of its own without end.

    python -m scripts.benchmarks.flooding_member up --data-dir FOLDER ...

Its key is the one with which it joined, so every statement is believed. Each says that it has moved: of all that one
may truly say of itself, that costs others most (a signature, a new view, a durable route, an event, a telling on). It
begins when FOLDER.flood appears with an order, and leaves what it sent in FOLDER.flooded. What it does to others is
measured by the junk benchmark.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from meshnode.cli.main import run
from meshnode.kernel.driver import Driver
from protocol.ids import NodeId
from protocol.membership.view import addresses_of, alive_of
from protocol.node import Node
from protocol.wire.messages import Alive, Gossip, Tunnel, ViewReply

BATCHES_PER_S: Final = 50
POLL_S: Final = 0.05
PER_DATAGRAM: Final = 6
"""Statements of a datagram: as many as fit."""

MOVED: Final = b"\x7f\0\0\1\0\x09"
"""Where it says to be every other time, besides where it is: 127.0.0.1:9."""


class Order(msgspec.Struct):
    """How to flood. `through`: packets, tunnels or links; `rate`: messages a second, of all victims together."""

    through: str
    rate: float
    seconds: float
    per_message: int


class Sent(msgspec.Struct):
    """What was sent."""

    messages: int
    statements: int  # different ones; each went to every victim
    victims: int


class Flood:
    """One flood. It reaches into a driver as only the driver's own module would: this program is an attacker."""

    def __init__(self, driver: Driver, order: Order) -> None:
        self._driver, self._order = driver, order
        self._node: Node = driver.node
        own = alive_of(self._node.membership.view.known[self._node.me])
        self._own, self._incarnation = own, own.incarnation
        self._places: Sequence[list[bytes]] = (own.addresses, [*own.addresses, MOVED])
        self.victims = [peer for peer in self._node.membership.view.up if peer != self._node.me]
        self.sent = Sent(0, 0, len(self.victims))

    def _statements(self, count: int) -> list[bytes]:
        made = []
        for _ in range(count):
            self._incarnation += 1
            own, places = self._own, self._places[self._incarnation % 2]
            body = Alive(own.signer, own.boot, self._incarnation, own.version_min, own.version_max, places)
            made.append(self._node.codec.sign(self._node.me, body).blob)
        self.sent.statements += count
        return made

    def _send(self, peer: NodeId, blobs: list[bytes]) -> None:
        encode = msgspec.msgpack.encode
        links: Any = self._driver._links
        match self._order.through:
            case "packets":
                address = addresses_of(alive_of(self._node.membership.view.known[peer]))[0]
                data = self._node.datagrams.seal(peer, [Gossip(blobs)])
                assert data is not None, "the peer's boot is not known"
                self._driver._sockets.send(address, data)
            case "tunnels":
                links.send(peer, encode(Tunnel([Gossip(blobs)])))
            case "links":
                links.send(peer, encode(ViewReply(blobs, [])))
            case other:
                raise ValueError(f"a flood goes through packets, tunnels or links, not {other!r}")
        self.sent.messages += 1

    async def run(self) -> None:
        """Flood for the time ordered, at the rate as far as this processor lets it."""
        began = trio.current_time()
        while (passed := trio.current_time() - began) < self._order.seconds:
            while self.sent.messages < self._order.rate * passed:
                blobs = self._statements(self._order.per_message)
                for peer in self.victims:
                    self._send(peer, blobs)
                await trio.lowlevel.checkpoint()
            await trio.sleep(1 / BATCHES_PER_S)


def flood_when_told(folder: Path) -> None:
    """From now on, a driver that runs in this process waits for an order and floods."""
    original: Any = Driver.run

    async def obey(driver: Driver) -> None:
        asked, told = folder.with_suffix(".flood"), folder.with_suffix(".flooded")
        while not asked.exists():  # noqa: ASYNC110 -- another process makes it
            await trio.sleep(POLL_S)
        flood = Flood(driver, msgspec.json.decode(asked.read_bytes(), type=Order))
        await flood.run()
        fresh = folder.with_suffix(".sent")
        fresh.write_bytes(msgspec.json.encode(flood.sent))
        fresh.replace(told)

    async def flooding(self: Driver, *more: Any, **options: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, self)
            await original(self, *more, **options)

    Driver.run = flooding  # type: ignore[method-assign]  # this program is an attacker


if __name__ == "__main__":
    flood_when_told(Path(sys.argv[sys.argv.index("--data-dir") + 1]))
    sys.exit(run(sys.argv[1:]))
