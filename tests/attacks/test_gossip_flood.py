"""Case 9: a flood of junk datagrams, of every kind that a node must tell apart, beside a member's real ones.

The strict figure (50,000 a second on one core, heartbeats on time) is scripts/bench's; here the bounds leave room for a
busy machine, and the attack is seen to work when the cheap tests that stand before the cryptography are taken away.
"""

import random
import statistics
import time
from collections.abc import Iterable
from contextlib import closing
from typing import Final

import pytest
import trio

from meshnode.kernel.datagrams import DatagramSocket, open_datagrams
from meshnode.kernel.driver import Driver
from protocol.effects import Persist
from protocol.ids import Address, NodeId
from protocol.node import Node
from protocol.wire.crypto import SodiumSuite
from protocol.wire.datagram import DatagramCodec, Opened
from protocol.wire.messages import Ack, Ping
from tests.protocol.trust.parts import public_key
from tests.protocol.wire import by_hand
from tests.protocol.wire.hubs import GOSSIP_KEY, Hubs, settled, suite
from tests.support.recording_log import RecordingLog

JUNK: Final = 50_000
BURST: Final = 100
JUNK_US_MAX: Final = 20.0
BUSY_MACHINE: Final = 3.0  # so much slower may a machine be that runs other tests at the same time
HERE: Final = Address("127.0.0.1", 9)


def junk(mesh: Hubs, count: int) -> list[bytes]:
    """Noise, another mesh, another version, strangers, unknown keys, former boots, and the dearest: forged ones."""
    chance = random.Random(9)
    mesh_id, sender = by_hand.mesh_bytes(mesh.root.public_key), by_hand.node_bytes(public_key("a"))
    boot = mesh["a"].boot

    def head(key: bytes = GOSSIP_KEY.key_id, who: bytes = sender, epoch: int = boot, version: int = 1) -> bytes:
        return by_hand.header(mesh_id, key, who, epoch, chance.getrandbits(40), version)

    kinds = [
        lambda: chance.randbytes(27),
        lambda: by_hand.header(bytes(16), GOSSIP_KEY.key_id, sender, boot, 1),
        lambda: head(version=9),
        lambda: head(who=chance.randbytes(20)),
        lambda: head(key=chance.randbytes(4)),
        lambda: head(epoch=0),
        lambda: head(),
        lambda: head(epoch=boot + 5),
    ]
    return [kinds[n % len(kinds)]() + chance.randbytes(chance.choice((17, 60, 400, 1173))) for n in range(count)]


def cost_us(codec: DatagramCodec, datagrams: list[bytes]) -> float:
    """Microseconds per datagram, the median over batches: what else runs on the machine disturbs some of them."""
    batches = []
    for at in range(0, len(datagrams), 1000):
        begun = time.perf_counter()
        for data in datagrams[at : at + 1000]:
            codec.open(data, HERE)
        batches.append((time.perf_counter() - begun) * 1e6 / len(datagrams[at : at + 1000]))
    return statistics.median(batches)


@pytest.mark.parametrize("defended", [True, False])
def test_case_09_junk_costs_a_few_microseconds(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = settled("a", "b")
    codec = mesh["b"].live.datagrams
    if not defended:
        # As if each datagram proved its sender by a signature, which is checked before anything else.
        check, public = SodiumSuite.verify, public_key("a")
        own, first = suite("b", mesh.root), DatagramCodec.open
        signature = suite("a", mesh.root).sign(b"", b"something else")

        def signed_first(self: DatagramCodec, data: bytes, source: Address) -> object:
            check(own, public, b"", data[27:], signature)
            return first(self, data, source)

        monkeypatch.setattr(DatagramCodec, "open", signed_first)
    flood = junk(mesh, JUNK if defended else 5_000)
    measured = cost_us(codec, flood)
    print(f"{measured:.1f} us per junk datagram")
    assert (measured <= JUNK_US_MAX * BUSY_MACHINE) if defended else (measured > JUNK_US_MAX)
    assert {"size", "other_mesh", "version", "stranger", "unknown_key", "replay", "forged"} >= set(codec.drops)
    assert sum(codec.drops.values()) == len(flood)
    ping = codec.open(mesh.seal("a", "b", Ping(1, bytes(8))), HERE)
    assert isinstance(ping, Opened)


class NoLinks:
    """Where nobody is linked, frames go nowhere."""

    def send(self, node_id: NodeId, payload: bytes) -> None:
        """Drop it."""

    def cut(self, node_id: NodeId, reason: str) -> None:
        """Nothing stands."""


async def no_disk(changes: Iterable[Persist]) -> None:
    """Everything is durable at once."""
    await trio.lowlevel.checkpoint()


def agent(node: Node, sockets: DatagramSocket) -> Driver:
    """What runs a hub in the agent."""
    return Driver(node=node, sockets=sockets, links=NoLinks(), store=no_disk, log=RecordingLog())


async def acks_of(sockets: DatagramSocket, codec: DatagramCodec, into: trio.MemorySendChannel[int]) -> None:
    """Read for the member that pings; give out the numbers of the Acks."""

    def receive(data: bytes, source: Address) -> None:
        opened = codec.open(data, source)
        if isinstance(opened, Opened):
            for message in opened.messages:
                if isinstance(message, Ack):
                    into.send_nowait(message.probe)

    await sockets.run(receive)


@pytest.mark.serial
async def test_case_09_a_flooded_agent_still_answers() -> None:
    """Through the real socket and driver: bursts of junk on the loopback, each with one ping behind it."""
    mesh = Hubs("a", "b")
    flood = junk(mesh, 5_000)
    victim, member = mesh.build("b"), mesh.build("a").datagrams
    member.learn_boot(mesh["b"].node_id, victim.boot)
    member._keys.start(0.0, 0.0)  # type: ignore[attr-defined] # the keyring of a hub that is never started itself
    answered = 0
    slowest = 0.0
    with closing(open_datagrams("127.0.0.1", 0)) as served, closing(open_datagrams("127.0.0.1", 0)) as own:
        target = Address("127.0.0.1", served.port)
        numbers, acks = trio.open_memory_channel[int](100)
        begun = time.perf_counter()
        async with trio.open_nursery() as nursery:
            await nursery.start(agent(victim, served).run, ())
            nursery.start_soon(acks_of, own, member, numbers)
            for burst in range(JUNK // BURST):
                for data in flood[burst * BURST % len(flood) :][:BURST]:
                    own.send(target, data)
                ping = member.seal(mesh["b"].node_id, [Ping(burst, bytes(8))])
                assert ping is not None
                asked = time.perf_counter()
                own.send(target, ping)
                with trio.move_on_after(1.0):
                    assert await acks.receive() == burst
                    answered += 1
                slowest = max(slowest, time.perf_counter() - asked)
            nursery.cancel_scope.cancel()
        rate = JUNK / (time.perf_counter() - begun)
    print(f"{rate:.0f} junk datagrams a second, slowest answer after {slowest * 1000:.1f} ms")
    assert answered >= 0.99 * JUNK // BURST  # a full buffer of the kernel may cost one
    assert sum(victim.datagrams.drops.values()) >= 0.9 * JUNK
    assert rate > 50_000 / (4 * BUSY_MACHINE)
