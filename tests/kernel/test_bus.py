"""The event bus: order, bounds, dropping the slow, resuming, and never holding up the publisher."""

from dataclasses import dataclass

import pytest
import trio

from meshnode.kernel import bus as bus_module
from meshnode.kernel.bus import Dropped, Event, EventBus
from meshnode.kernel.errors import ErrorCode, MeshError


@dataclass(frozen=True)
class Happened:
    number: int


@dataclass(frozen=True)
class Other:
    number: int


def numbers(batch: list[Event | Dropped]) -> list[int]:
    return [item.payload.number for item in batch if isinstance(item, Event) and isinstance(item.payload, Happened)]


async def test_events_arrive_in_order_with_rising_ids_and_only_of_the_types_asked_for() -> None:
    bus = EventBus(epoch="e")
    with bus.subscribe([Happened]) as subscription:
        for number in range(3):
            bus.publish(Happened(number))
            bus.publish(Other(number))
        batch = await subscription.batch()
    assert numbers(batch) == [0, 1, 2]
    assert [item.id for item in batch if isinstance(item, Event)] == [1, 3, 5]
    assert bus.subscriber_count == 0


async def test_a_waiting_subscriber_wakes(autojump_clock: trio.testing.MockClock) -> None:
    bus = EventBus(epoch="e")
    got: list[int] = []

    async def watch(task_status: trio.TaskStatus[None]) -> None:
        with bus.subscribe([Happened]) as subscription:
            task_status.started()
            async for item in subscription:
                got.extend(numbers([item]))

    async with trio.open_nursery() as nursery:
        await nursery.start(watch)
        bus.publish(Happened(1))
        await trio.sleep(1)
        bus.publish(Happened(2))
        await trio.sleep(1)
        bus.close()
    assert got == [1, 2]


async def test_a_slow_subscriber_is_dropped_with_a_last_word_and_others_are_not() -> None:
    bus = EventBus(epoch="e")
    with bus.subscribe([Happened], max_buffer=3) as slow, bus.subscribe([Happened], max_buffer=100) as quick:
        first = bus.publish(Happened(0))
        assert numbers(await slow.batch()) == [0]
        for number in range(1, 11):
            bus.publish(Happened(number))
        assert await slow.batch() == [Dropped(lost=4, last_id=first.id)]
        assert await slow.batch() == []
        assert slow.over
        assert numbers(await quick.batch()) == list(range(11))


async def test_what_waits_is_bounded_whatever_is_published() -> None:
    bus = EventBus(epoch="e", ring_events=10)
    with bus.subscribe([Happened], max_buffer=5) as subscription:
        for number in range(10_000):
            bus.publish(Happened(number))
        batch = await subscription.batch()
    assert len(batch) == 1
    assert isinstance(batch[0], Dropped)


async def test_coalescing_keeps_the_latest_of_each_thing() -> None:
    bus = EventBus(epoch="e")

    def about(payload: object) -> int:
        assert isinstance(payload, Happened)
        return payload.number % 2

    with bus.subscribe([Happened], max_buffer=2, coalesce=about) as subscription:
        for number in range(100):
            bus.publish(Happened(number))
        assert numbers(await subscription.batch()) == [98, 99]
        bus.publish(Happened(100))
        assert numbers(await subscription.batch()) == [100]


@pytest.mark.parametrize(
    ("after", "expected", "missed"),
    [(None, [], False), (5, [], False), (3, [4, 5], False), (2, [3, 4, 5], False), (1, [], True), (99, [], True)],
)
async def test_resuming(after: int | None, expected: list[int], missed: bool) -> None:
    bus = EventBus(epoch="e", ring_events=3)
    for number in range(1, 6):
        bus.publish(Happened(number))
    with bus.subscribe([Happened], after=after) as subscription:
        assert subscription.missed is missed
        bus.publish(Happened(6))
        assert numbers(await subscription.batch()) == [*expected, 6]


async def test_resuming_with_more_to_catch_up_than_fits_counts_as_missed() -> None:
    bus = EventBus(epoch="e", ring_events=100)
    for number in range(50):
        bus.publish(Happened(number))
    with bus.subscribe([Happened], max_buffer=10, after=0) as subscription:
        assert subscription.missed
        assert not subscription.over


async def test_closing_lets_queued_events_out_first() -> None:
    bus = EventBus(epoch="e")
    with bus.subscribe([Happened]) as subscription:
        bus.publish(Happened(1))
        bus.close()
        bus.publish(Happened(2))
        assert [numbers([item]) async for item in subscription] == [[1]]
    with bus.subscribe([Happened]) as late:
        assert await late.batch() == []


async def test_subscribers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_module, "subscribers_max", 1)
    bus = EventBus(epoch="e")
    with bus.subscribe([Happened]):
        with pytest.raises(MeshError) as caught, bus.subscribe([Happened]):
            pass
        assert caught.value.code is ErrorCode.UNAVAILABLE
        assert bus.subscriber_count == 1
