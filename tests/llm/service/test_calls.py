"""Streams between stages: life is shown both ways, and silence is an end of its own."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import trio
from trio.testing import MockClock

from meshnode.kernel.links import BulkStream
from meshnode.llm.service.calls import PULSE_S, SILENT_S, attend
from protocol.ids import NodeId
from protocol.sharding.frames import PULSE, Frame, Kind, pack

PEER = NodeId("p" * 32)


class Wire:
    """What comes from a peer, as a bulk stream gives it out; and what was sent to it, and when."""

    def __init__(self) -> None:
        self.peer = PEER
        self.come, self._coming = trio.open_memory_channel[bytes](100)
        self.sent: list[tuple[float, bytes]] = []
        self.taken: list[int] = []

    async def receive_some(self, bytes_max: int) -> bytes:
        try:
            return await self._coming.receive()
        except trio.EndOfChannel:
            return b""

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append((trio.current_time(), data))

    async def take(self, frame: Frame) -> None:
        self.taken.append(frame.kind)

    async def attended(self, **more: Callable[[], Awaitable[None]] | Callable[[], None]) -> str:
        stream = cast(BulkStream, self)
        options: dict[str, Any] = more
        return await attend(stream, self.take, bytes_max=lambda: 100, send=self.send, **options)


async def test_silence_ends_a_stream_that_never_broke(autojump_clock: MockClock) -> None:
    wire = Wire()
    words = await wire.attended()
    assert words == f"Node {PEER} has shown no life for {SILENT_S:g} s."
    assert SILENT_S <= trio.current_time() < SILENT_S + 0.2
    assert {data for _, data in wire.sent} == {PULSE}
    assert len(wire.sent) == int(SILENT_S / PULSE_S) + 1


async def test_pulses_keep_it_and_are_nobodys_frames(autojump_clock: MockClock) -> None:
    wire = Wire()
    pulses: list[float] = []
    async with trio.open_nursery() as nursery:

        async def talk() -> None:
            for _ in range(20):
                await wire.come.send(PULSE)
                await trio.sleep(SILENT_S - 0.1)
            await wire.come.send(pack(Kind.CANCEL, b"x") + PULSE)
            wire.come.close()

        nursery.start_soon(talk)
        words = await wire.attended(pulsed=lambda: pulses.append(trio.current_time()))
    assert words == "the other side ended the stream"
    assert wire.taken == [Kind.CANCEL]
    assert len(pulses) == 21


async def test_who_still_loads_shows_life_and_expects_none(autojump_clock: MockClock) -> None:
    wire = Wire()

    async def begin() -> None:
        await trio.sleep(60.0)

    wire.come.send_nowait(PULSE)
    wire.come.close()
    assert await wire.attended(begin=begin) == "the other side ended the stream"
    assert len(wire.sent) >= 60 / PULSE_S
