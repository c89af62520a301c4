"""The driver's contract over real sockets and a real database: order, durability, timers; and two probing another."""

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshnode.kernel.database import KeyValue, kernel_migrations, open_database
from meshnode.kernel.datagrams import open_datagrams
from meshnode.kernel.driver import CANCELLED_TIMERS_MAX, HELD_MAX, Driver, Timers
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.effects import (
    CancelTimer,
    CloseLink,
    Effect,
    Persist,
    Publish,
    SendDatagram,
    SendFrame,
    SetTimer,
    TimerFired,
)
from protocol.ids import Address, NodeId
from protocol.membership.events import ContactFound, PeerMeasured, PeerUp
from protocol.node import Node
from protocol.records.store import MemoryStore
from tests.protocol.test_node import KEYS
from tests.support.hub import BOOT, MESH_ID, Mesh, address_of, roster_of, suite_of
from tests.support.recording_log import RecordingLog

NOWHERE = Address("127.0.0.1", 9)


class Wire:
    """Sockets and links in one: notes what the driver does, in order."""

    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []
        self.submit: Any = None

    def send(self, to: Any, data: bytes) -> None:
        self.done.append(("datagram" if isinstance(to, Address) else "frame", data))

    def cut(self, node_id: NodeId, reason: str) -> None:
        self.done.append(("cut", reason))

    async def run(self, receive: object) -> None:
        await trio.sleep_forever()

    def observe(self, event: object) -> None:
        self.done.append(("event", event))


class Script:
    """Stands where the hub stands: answers each input with the effects that the test wrote down for it."""

    def __init__(self) -> None:
        self.first: list[Effect] = []
        self.answers: dict[object, list[Effect]] = {}
        self.fired: list[tuple[Any, float]] = []

    def start(self, now: float, wall: float) -> list[Effect]:
        return self.first

    def handle(self, event: Any, now: float, wall: float) -> list[Effect]:
        if isinstance(event, TimerFired):
            self.fired.append((event.key, now))
            return self.answers.get(event.key, [])
        return list(self.answers.get(event, [event] if not isinstance(event, str) else []))


class Bench:
    """A driver over a script, with a store that the test may hold up or break."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wire, self.script, self.log = Wire(), Script(), RecordingLog()
        self.batches: list[list[Persist]] = []
        self.gate: trio.Event | None = None
        self.failure: MeshError | None = None
        self.key_value: KeyValue | None = None
        self.driver = Driver(
            node=self.script,  # type: ignore[arg-type]  # the part of the hub that a driver uses
            sockets=self.wire,  # type: ignore[arg-type]  # the part of the sockets that a driver uses
            links=self.wire,
            store=self.store,
            now=trio.current_time,
            wall=lambda: 0.0,
            log=self.log,
        )

    async def store(self, changes: Iterable[Persist]) -> None:
        batch = list(changes)
        self.batches.append(batch)
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        assert self.key_value is not None
        await self.key_value.persist(batch)
        self.wire.done.append(("stored", [persist.key for persist in batch]))

    def effects(self, *effects: Effect) -> None:
        self.driver._perform(effects)

    def names(self) -> list[object]:
        return [value for _, value in self.wire.done]


@asynccontextmanager
async def bench(folder: Path) -> AsyncIterator[Bench]:
    async with open_database(folder / "db", kernel_migrations(), wall=0.0) as database:
        made = Bench(folder)
        made.key_value = KeyValue(database)
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: made.driver.run([made.wire.observe], task_status=task_status))
            yield made
            nursery.cancel_scope.cancel()


def put(key: bytes, value: bytes | None = b"v") -> Persist:
    return Persist("m", key, value)


def datagram(data: bytes, *, ahead: bool = False) -> SendDatagram:
    return SendDatagram(NOWHERE, data, ahead)


NODE = Mesh(1).id(0)


async def test_without_a_persist_everything_happens_at_once_and_in_order(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.effects(datagram(b"1"), Publish("2"), SendFrame(NODE, b"3"), CloseLink(NODE, "4"), datagram(b"5", ahead=True))
        assert b.names() == [b"1", "2", b"3", "4", b"5"]


async def test_nothing_behind_a_persist_happens_before_it_is_durable(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.gate = trio.Event()
        b.effects(
            datagram(b"before"), put(b"a"), datagram(b"behind"), datagram(b"ahead", ahead=True), Publish("behind"),
            SendFrame(NODE, b"frame"), CloseLink(NODE, "cut"), put(b"b"), Publish("last"),
        )  # fmt: skip
        await trio.testing.wait_all_tasks_blocked()
        b.effects(datagram(b"later"), datagram(b"ahead too", ahead=True))
        # An evicted node is cut off at once, however long the disk takes.
        assert b.names() == [b"before", b"ahead", "cut", b"ahead too"]
        b.gate.set()
        await b.driver.flushed()
        assert b.names()[4:] == [[b"a", b"b"], b"behind", "behind", b"frame", "last", b"later"]
        assert b.key_value is not None
        assert b.key_value.load_all("m") == {b"a": b"v", b"b": b"v"}


async def test_what_comes_while_the_disk_works_goes_into_one_batch(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.gate = trio.Event()
        b.effects(put(b"0"))
        await trio.testing.wait_all_tasks_blocked()
        for number in range(1, 50):
            b.effects(put(b"%d" % number), Publish(number))
        b.gate.set()
        await b.driver.flushed()
        assert [len(batch) for batch in b.batches] == [1, 49]
        assert [value for kind, value in b.wire.done if kind == "event"] == list(range(1, 50))


async def test_a_delete_and_a_rewrite_keep_their_order(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.effects(put(b"a", b"1"), put(b"a", b"2"), put(b"b"), put(b"b", None), put(b"c", None), put(b"c", b"3"))
        await b.driver.flushed()
        assert b.key_value is not None
        assert b.key_value.load_all("m") == {b"a": b"2", b"c": b"3"}


async def test_what_an_observer_causes_stands_behind_the_rest(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.script.answers["cause"] = [put(b"caused"), datagram(b"caused")]

        def observer(event: object) -> None:
            if event == "news":
                b.driver.submit("cause")  # type: ignore[arg-type]  # the script's own input

        b.driver._observers = [observer, b.wire.observe]
        b.effects(put(b"a"), Publish("news"), datagram(b"rest"))
        await b.driver.flushed()
        assert b.names() == [[b"a"], "news", b"rest"]
        await b.driver.flushed()
        assert b.names() == [[b"a"], "news", b"rest", [b"caused"], b"caused"]


async def test_a_failing_store_ends_the_driver_and_releases_nothing(tmp_path: Path) -> None:
    broken = MeshError(ErrorCode.STORAGE_FAILED, "the disk is gone; replace it")
    b = Bench(tmp_path)
    b.failure = broken
    b.script.first = [put(b"a"), datagram(b"behind"), Publish("behind")]
    with pytest.raises(BaseExceptionGroup) as caught, trio.fail_after(5):
        await b.driver.run([b.wire.observe])
    only: BaseException = caught.value
    while isinstance(only, BaseExceptionGroup):
        (only,) = only.exceptions
    assert only is broken
    assert b.wire.done == []


async def test_sends_that_wait_for_a_hanging_disk_are_bounded_and_persists_are_not_lost(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.gate = trio.Event()
        b.effects(put(b"first"), *[datagram(b"x")] * (HELD_MAX + 100), put(b"last"))
        assert b.driver.dropped == 101
        b.gate.set()
        await b.driver.flushed()
        assert b.names()[0] == [b"first", b"last"]
        assert b.names().count(b"x") == HELD_MAX - 1


async def test_a_full_disk_is_waited_out(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Over a store that is no database: a thread that writes and a clock that jumps would race."""
    made, tries = Bench(tmp_path), 0

    async def store(changes: Iterable[Persist]) -> None:
        nonlocal tries
        await trio.lowlevel.checkpoint()
        tries += 1
        if tries < 4:
            raise MeshError(ErrorCode.DISK_FULL, "The disk is full. Free some space.")
        made.wire.done.append(("stored", [persist.key for persist in changes]))

    made.driver._store = store
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: made.driver.run([made.wire.observe], task_status=task_status))
        made.effects(put(b"a"), datagram(b"behind"), datagram(b"ahead", ahead=True))
        await made.driver.flushed()
        nursery.cancel_scope.cancel()
    assert made.names() == [b"ahead", [b"a"], b"behind"]
    assert tries == 4


async def test_an_effect_that_only_the_hub_may_see_is_a_defect(tmp_path: Path) -> None:
    from protocol.effects import Send

    with pytest.raises(TypeError, match="cannot perform"):
        Bench(tmp_path).effects(Send(NODE, ()))


# ---- timers --------------------------------------------------------------------------------------------------------


async def run_timers(tmp_path: Path, seconds: float, *effects: Effect) -> Bench:
    made = Bench(tmp_path)
    made.script.first = list(effects)
    with trio.move_on_after(seconds):
        await made.driver.run([made.wire.observe])
    return made


async def test_timers_fire_on_time_move_and_are_forgotten(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    began = trio.current_time()
    made = await run_timers(
        tmp_path, 10.0,
        SetTimer(("m", "late"), began + 3), SetTimer(("m", "soon"), began + 1), SetTimer(("m", "moved"), began + 1),
        SetTimer(("m", "moved"), began + 2), SetTimer(("m", "gone"), began + 1), CancelTimer(("m", "gone")),
        CancelTimer(("m", "never there")), SetTimer(("m", "past"), began - 5),
    )  # fmt: skip
    assert [(key[1], round(at - began, 6)) for key, at in made.script.fired] == [
        ("past", 0), ("soon", 1), ("moved", 2), ("late", 3),
    ]  # fmt: skip


async def test_a_timer_cancelled_by_another_that_is_due_with_it_does_not_fire(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = Bench(tmp_path)
    at = trio.current_time() + 1
    made.script.first = [SetTimer(("m", 1), at), SetTimer(("m", 2), at), SetTimer(("m", 3), at)]
    made.script.answers[("m", 1)] = [CancelTimer(("m", 2)), SetTimer(("m", 3), at + 1)]
    with trio.move_on_after(5):
        await made.driver.run([made.wire.observe])
    assert [key for key, _ in made.script.fired] == [("m", 1), ("m", 3)]
    assert made.script.fired[1][1] == pytest.approx(at + 1)


async def test_a_timer_behind_a_persist_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.gate = trio.Event()
        b.effects(put(b"a"), SetTimer(("m", "now"), trio.current_time()))
        with trio.fail_after(5):
            while not b.script.fired:
                await trio.lowlevel.checkpoint()
        b.gate.set()


@given(
    st.lists(st.tuples(st.sampled_from(["set", "cancel", "take"]), st.integers(0, 5), st.floats(0, 100)), max_size=200)
)
def test_timers_are_what_a_dictionary_says(steps: list[tuple[str, int, float]]) -> None:
    timers, model = Timers(), dict[Any, float]()
    for what, number, at in steps:
        key = ("m", number)
        if what == "set":
            timers.set(key, at)
            model[key] = at
        elif what == "cancel":
            timers.cancel(key)
            model.pop(key, None)
        else:
            due = {k for k, v in model.items() if v <= at}
            taken = timers.take(at)
            assert (taken is None) is (not due)
            if taken is not None:
                assert model[taken] == min(model.values())
                del model[taken]
        assert timers.next_at() == min(model.values(), default=None)
        assert len(timers) == len(model)


def test_replaced_timers_do_not_pile_up() -> None:
    timers = Timers()
    for number in range(5 * CANCELLED_TIMERS_MAX):
        timers.set(("m", number % 3), 1e6 - number)
    assert len(timers._heap) <= 2 * 3 + CANCELLED_TIMERS_MAX
    order = [timers.take(1e9) for _ in range(4)]
    assert order[3] is None
    assert len(set(order)) == 4


# ---- the real thing ------------------------------------------------------------------------------------------------


async def test_two_drivers_find_and_probe_each_other(tmp_path: Path) -> None:
    """Hubs, sockets and databases are the agent's own; the links, which have tests of their own, are a short wire."""
    mesh, events = Mesh(2), dict[int, list[object]]()
    drivers: list[Driver] = []
    watching: list[Callable[[object], None]] = []
    measured = trio.Event()

    class Links:
        def __init__(self, index: int) -> None:
            self.index = index

        def send(self, node_id: NodeId, payload: bytes) -> None:
            from protocol.effects import FrameReceived, LinkOpened

            there = drivers[1 - self.index]
            there.submit(LinkOpened(mesh.id(self.index), BOOT))
            there.submit(FrameReceived(mesh.id(self.index), payload))

        def cut(self, node_id: NodeId, reason: str) -> None:
            raise AssertionError(reason)

    async with trio.open_nursery() as nursery:
        for index in range(2):
            sockets = open_datagrams("127.0.0.1", 0)
            nursery.start_soon(_close_at_end, sockets)
            folder = tmp_path / str(index)
            folder.mkdir()
            database = await nursery.start(_database, folder)
            hub = Node(
                me=mesh.id(index), mesh_id=MESH_ID, boot=BOOT, founder=index == 0, suite=suite_of(index),
                rng=random.Random(index), roster=roster_of(range(2)), durable={"keys": KEYS}, collections=[],
                record_store=MemoryStore(), addresses=(Address("127.0.0.1", sockets.port),),
            )  # fmt: skip
            events[index] = []

            def observe(event: object, index: int = index) -> None:
                events[index].append(event)
                if all(any(isinstance(e, PeerMeasured) for e in told) for told in events.values()) and len(events) == 2:
                    measured.set()

            watching.append(observe)
            drivers.append(
                Driver(node=hub, sockets=sockets, links=Links(index), store=KeyValue(database).persist,
                       log=RecordingLog())
            )  # fmt: skip
        for driver, observer in zip(drivers, watching, strict=True):
            await nursery.start(driver.run, [observer])
        there = drivers[1].node.membership.addresses(mesh.id(1))
        await drivers[0].submit_durably(ContactFound(mesh.id(1), there[0]))
        with trio.fail_after(10):
            await measured.wait()
        for index in range(2):
            assert [event.peer for event in events[index] if isinstance(event, PeerUp)] == [mesh.id(1 - index)]
            rtts = [event.rtt_s for event in events[index] if isinstance(event, PeerMeasured) and not event.tunnelled]
            assert rtts != []
            assert all(0 < rtt < 1 for rtt in rtts)
        nursery.cancel_scope.cancel()
    assert address_of(0) != address_of(1)


async def _database(folder: Path, *, task_status: trio.TaskStatus[Any]) -> None:
    async with open_database(folder / "db", kernel_migrations(), wall=0.0) as database:
        task_status.started(database)
        await trio.sleep_forever()


async def _close_at_end(sockets: Any) -> None:
    try:
        await trio.sleep_forever()
    finally:
        sockets.close()
