"""Discovery: real multicast on loopback, and networks of the test's own where multicast fails, floods or lies."""

import itertools
import random
import socket
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.kernel.clock import SystemClock
from meshnode.kernel.discovery import (
    JITTER,
    PACKETS_PER_S_MAX,
    REMEMBERED_MAX,
    REPORT_INTERVAL_S,
    Discovered,
    Discovery,
    DiscoveryParameters,
    Interface,
    MulticastSocket,
    multicast_interfaces,
)
from protocol.ids import Address, MeshId, NodeId, mesh_id_of, node_id_of
from protocol.wire.announcement import Announcement, decode_announcement, encode_announcement
from tests.support.recording_log import RecordingLog

MESH = mesh_id_of(bytes(32))
ME, OTHER = node_id_of(b"a" * 32), node_id_of(b"b" * 32)
CARDS = [Interface("eth0", 2), Interface("wlan0", 3)]


class Air:
    """A network of the test's own. `broken` interfaces refuse to send; `packets` arrive in order."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, str, bytes]] = []
        self.joined: list[list[str]] = []
        self.broken: set[str] = set()
        self.opened = 0
        self.closed = 0
        self.arrive, self._arriving = trio.open_memory_channel[tuple[bytes, str]](10_000)

    def open(self, group: str, port: int) -> "Air":
        self.opened += 1
        return self

    def join(self, interfaces: list[Interface]) -> None:
        self.joined.append([interface.name for interface in interfaces])

    async def send(self, data: bytes, interface: Interface) -> None:
        await trio.lowlevel.checkpoint()
        if interface.name in self.broken:
            raise OSError(101, "Network is unreachable")
        self.sent.append((trio.current_time(), interface.name, data))

    async def receive(self) -> tuple[bytes, str]:
        return await self._arriving.receive()

    def close(self) -> None:
        self.closed += 1


def discovery(
    air: Air,
    heard: Callable[[Discovered], None],
    log: RecordingLog,
    *,
    interfaces: Callable[[str], list[Interface]] = lambda _: CARDS,
) -> Discovery:
    return Discovery(
        mesh_id=MESH,
        node_id=ME,
        peer_port=4893,
        bound_host="",
        heard=heard,
        clock=SystemClock(),
        chance=random.Random(7),
        logger=log,
        params=DiscoveryParameters(group_ipv6=""),
        interfaces=interfaces,
        open_multicast=air.open,
    )


def packet(node: NodeId = OTHER, mesh: MeshId = MESH, port: int = 5_000) -> bytes:
    return encode_announcement(Announcement(mesh, node, port))


async def test_announced_at_once_and_then_every_half_minute_on_every_card(autojump_clock: MockClock) -> None:
    air = Air()
    with trio.move_on_after(300):
        await discovery(air, lambda _: None, RecordingLog()).run()
    for card in ("eth0", "wlan0"):
        times = [at for at, name, _ in air.sent if name == card]
        assert times[0] <= 1.0
        pauses = [later - sooner for sooner, later in itertools.pairwise(times)]
        assert len(pauses) >= 8
        assert all(30 * (1 - JITTER) <= pause <= 30 * (1 + JITTER) for pause in pauses)
        assert len({round(pause, 3) for pause in pauses}) > 1
    assert decode_announcement(air.sent[0][2]) == Announcement(MESH, ME, 4893)
    assert (air.opened, air.closed) == (1, 1)


async def test_a_new_card_is_joined_and_a_broken_one_keeps_nobody_silent(autojump_clock: MockClock) -> None:
    air, log = Air(), RecordingLog()
    air.broken = {"eth0"}
    cards = [CARDS[0]]
    with trio.move_on_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(discovery(air, lambda _: None, log, interfaces=lambda _: list(cards)).run)
            await trio.sleep(50)
            assert air.sent == []
            cards.append(CARDS[1])
    assert {name for _, name, _ in air.sent} == {"wlan0"}
    assert air.joined[-1] == ["eth0", "wlan0"]
    assert len(log.at("info")) == 1


async def test_without_multicast_there_is_one_line_in_the_log(autojump_clock: MockClock) -> None:
    log, tries = RecordingLog(), 0

    def refuse(group: str, port: int) -> Air:
        nonlocal tries
        tries += 1
        raise PermissionError(1, "Operation not permitted")

    air = Air()
    air.open = refuse  # type: ignore[method-assign]  # this network has no sockets at all
    with trio.move_on_after(300):
        await discovery(air, lambda _: None, log).run()
    assert tries >= 8
    assert len(log.records) == 1


async def test_others_are_reported_and_nothing_else_is(autojump_clock: MockClock) -> None:
    air, heard = Air(), list[Discovered]()
    foreign = mesh_id_of(b"x" * 32)
    made = discovery(air, heard.append, RecordingLog())
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        for data, host in (
            (packet(), "192.0.2.7"),
            (packet(mesh=foreign, port=6_000), "fe80::7%2"),
            (packet(ME), "192.0.2.1"),
            (b"junk", "192.0.2.9"),
            (packet() + bytes(100), "192.0.2.9"),
        ):
            await air.arrive.send((data, host))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert heard == [
        Discovered(MESH, OTHER, Address("192.0.2.7", 5_000)),
        Discovered(foreign, OTHER, Address("fe80::7%2", 6_000)),
    ]
    assert made.dropped_packets == 2
    assert all(name in ("eth0", "wlan0") for _, name, _ in air.sent)


async def test_a_chatty_node_is_reported_now_and_then(mock_clock: MockClock) -> None:
    air, heard = Air(), list[Discovered]()
    async with trio.open_nursery() as nursery:
        await nursery.start(discovery(air, heard.append, RecordingLog()).run)
        for _ in range(3):
            for _ in range(10):
                await air.arrive.send((packet(), "192.0.2.7"))
            await wait_all_tasks_blocked()
            mock_clock.jump(REPORT_INTERVAL_S)
        nursery.cancel_scope.cancel()
    assert len(heard) == 3


async def test_a_flood_is_thrown_away_and_answered_by_nothing(mock_clock: MockClock) -> None:
    air, heard = Air(), list[Discovered]()
    made = discovery(air, heard.append, RecordingLog())
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        await wait_all_tasks_blocked()
        for number in range(5_000):
            await air.arrive.send((packet(node_id_of(number.to_bytes(32, "big"))), "192.0.2.66"))
        await wait_all_tasks_blocked()
        assert len(heard) == PACKETS_PER_S_MAX
        assert made.dropped_packets == 5_000 - PACKETS_PER_S_MAX
        mock_clock.jump(1.5)
        await air.arrive.send((packet(), "192.0.2.7"))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert heard[-1].node_id == OTHER
    # Its own announcement, once on each card, and nothing because of the flood.
    assert len(air.sent) == 2


async def test_what_is_remembered_is_bounded(mock_clock: MockClock) -> None:
    air, heard = Air(), list[Discovered]()
    made = discovery(air, heard.append, RecordingLog())
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        for second in range(15):
            for number in range(PACKETS_PER_S_MAX):
                key = (second * 1_000 + number).to_bytes(32, "big")
                await air.arrive.send((packet(node_id_of(key)), "192.0.2.66"))
            await wait_all_tasks_blocked()
            mock_clock.jump(1.01)
        nursery.cancel_scope.cancel()
    assert len(heard) == 15 * PACKETS_PER_S_MAX > REMEMBERED_MAX
    assert len(made._reported) <= REMEMBERED_MAX


@pytest.mark.parametrize("group", ["192.168.1.1", "ff02::1", "nonsense"])
def test_a_group_must_be_one(group: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        DiscoveryParameters(group=group)


def test_bound_to_loopback_only_loopback_is_used() -> None:
    assert [interface.source for interface in multicast_interfaces("127.0.0.5")] == ["127.0.0.5"]
    assert multicast_interfaces("203.0.113.77") == []
    assert multicast_interfaces("") != []


async def test_two_agents_on_this_machine_hear_each_other_over_loopback() -> None:
    """Real sockets. The group is one of its own, so that an agent of this machine is not disturbed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    params = DiscoveryParameters(group="239.255.76.12", group_ipv6="", port=port, interval_s=0.05)
    send, receive = trio.open_memory_channel[tuple[NodeId, Discovered]](100)

    def agent(node: NodeId, peer_port: int) -> Discovery:
        return Discovery(
            mesh_id=MESH,
            node_id=node,
            peer_port=peer_port,
            bound_host="127.0.0.1",
            heard=lambda found: send.send_nowait((node, found)),
            clock=SystemClock(),
            chance=random.Random(1),
            logger=RecordingLog(),
            params=params,
        )

    found: dict[NodeId, Discovered] = {}
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent(ME, 1_111).run)
            nursery.start_soon(agent(OTHER, 2_222).run)
            while len(found) < 2:
                hearer, discovered = await receive.receive()
                found[hearer] = discovered
            nursery.cancel_scope.cancel()
    assert found == {
        ME: Discovered(MESH, OTHER, Address("127.0.0.1", 2_222)),
        OTHER: Discovered(MESH, ME, Address("127.0.0.1", 1_111)),
    }


async def test_the_socket_hears_nothing_that_is_not_sent_to_the_group() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lo = multicast_interfaces("127.0.0.1")
    group = MulticastSocket("239.255.76.13", port)
    try:
        group.join(lo)
        group.join(lo)  # again, as every half minute
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"unicast", ("127.0.0.1", port))
        await group.send(b"multicast", lo[0])
        with trio.fail_after(5):
            assert await group.receive() == (b"multicast", "127.0.0.1")
    finally:
        group.close()
