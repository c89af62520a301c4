"""The supervisor: order of starting and stopping, restarts with back-off, fatal failures, deadlines and signals."""

import random
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio
import trio.testing

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.service import Policy, State
from meshnode.kernel.supervisor import BACKOFF_MAX_S, Supervisor, serve_until_signal


class Log:
    """A logger that keeps what it was told."""

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []

    def _keep(self, event: str, /, **fields: Any) -> None:
        self.records.append((event, fields))

    debug = info = warning = error = exception = _keep


class Example:
    """A service whose behaviour is a list: what happens in its first run, its second, and so on; then it just runs."""

    def __init__(
        self,
        name: str,
        history: list[str],
        *runs: Callable[[], Any],
        policy: Policy = Policy.RESTART,
        start_s: float = 0.0,
    ) -> None:
        self.name = name
        self.policy = policy
        self.started_at: list[float] = []
        self._history = history
        self._runs = list(runs)
        self._start_s = start_s

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        self.started_at.append(trio.current_time())
        await trio.sleep(self._start_s)
        self._history.append(f"+{self.name}")
        task_status.started()
        try:
            if self._runs:
                await self._runs.pop(0)()
            else:
                await trio.sleep_forever()
        finally:
            self._history.append(f"-{self.name}")


class DrainingExample(Example):
    def __init__(self, *args: Any, drain_s: float = 0.0, **more: Any) -> None:
        super().__init__(*args, **more)
        self._drain_s = drain_s

    async def drain(self) -> None:
        self._history.append(f"drain {self.name}")
        await trio.sleep(self._drain_s)
        self._history.append(f"drained {self.name}")


def fail_after(seconds: float, error: BaseException) -> Callable[[], Any]:
    async def fail() -> None:
        await trio.sleep(seconds)
        raise error

    return fail


async def fail_now(error: BaseException) -> None:
    raise error


class Prepared(Supervisor):
    """A supervisor that holds the tiers that it is to run."""

    def __init__(self, prepared: Sequence[Sequence[Any]], log: Log, **limits: float) -> None:
        super().__init__(chance=random.Random(7), logger=log, **limits)
        self._prepared = prepared

    async def run(
        self, tiers: Sequence[Sequence[Any]] = (), *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await super().run(tiers or self._prepared, task_status=task_status)


def supervise(*tiers: list[Any], log: Log | None = None, **limits: float) -> Supervisor:
    return Prepared(tiers, log or Log(), **limits)


def states(supervisor: Supervisor) -> dict[str, State]:
    return {service.name: service.state for service in supervisor.snapshot().services}


async def test_tiers_start_in_order_and_stop_in_reverse(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    slow = Example("slow", history, start_s=2.0)
    supervisor = supervise([slow], [Example("b", history)], [Example("c", history)])
    async with trio.open_nursery() as nursery:
        assert supervisor.snapshot().status == "starting"
        await nursery.start(supervisor.run)
        assert history == ["+slow", "+b", "+c"]
        assert supervisor.snapshot().status == "ok"
        assert set(states(supervisor).values()) == {State.RUNNING}
        supervisor.stop()
    assert history == ["+slow", "+b", "+c", "-c", "-b", "-slow"]
    assert set(states(supervisor).values()) == {State.STOPPED}


async def test_services_of_one_tier_start_together(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    tier = [Example(name, history, start_s=2.0) for name in "abc"]
    supervisor = supervise(tier)
    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        await nursery.start(supervisor.run)
        assert trio.current_time() - began == pytest.approx(2.0)
        supervisor.stop()


async def test_a_failing_service_comes_back_with_growing_pauses(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    log = Log()
    failures = [fail_after(0.0, OSError(f"no. {number}\nsecond line")) for number in range(9)]
    flaky = Example("flaky", history, *failures)
    steady = Example("steady", history)
    supervisor = supervise([flaky], [steady], log=log)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        assert "+steady" in history
        await trio.sleep(0.2)
        snapshot = supervisor.snapshot()
        assert snapshot.status == "degraded"
        assert snapshot.services[0].state is State.BACKING_OFF
        assert snapshot.services[0].last_error == "OSError: no. 0 second line"
        assert 0 < (snapshot.services[0].retry_s or 0) <= 1.0
        assert snapshot.services[1].state is State.RUNNING
        await trio.sleep(1_000)
        snapshot = supervisor.snapshot()
        assert snapshot.status == "ok"
        assert snapshot.services[0].restarts == 9
        supervisor.stop()
    pauses = [later - earlier for earlier, later in zip(flaky.started_at, flaky.started_at[1:], strict=False)]
    for number, pause in enumerate(pauses):
        longest = min(BACKOFF_MAX_S, 2.0**number)
        assert longest / 2 <= pause <= longest, number
    assert len({round(pause, 6) for pause in pauses[6:]}) > 1, "the pauses are not drawn"
    assert [event for event, _ in log.records] == ["service failed"] * 9
    assert isinstance(log.records[0][1]["exc_info"], OSError)


async def test_a_service_that_ran_well_begins_with_a_short_pause_again(autojump_clock: trio.testing.MockClock) -> None:
    early = [fail_after(0.0, OSError()) for _ in range(6)]
    flaky = Example("flaky", [], *early, fail_after(100.0, OSError()))
    supervisor = supervise([flaky])
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await trio.sleep(1_000)
        supervisor.stop()
    assert flaky.started_at[6] - flaky.started_at[5] >= 16
    assert flaky.started_at[7] - flaky.started_at[6] <= 101


async def test_groups_of_failures_are_told_in_one_line(autojump_clock: trio.testing.MockClock) -> None:
    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_now, ValueError("one"))
            nursery.start_soon(fail_now, KeyError("two"))

    supervisor = supervise([Example("grouped", [], both)])
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await trio.sleep(0.1)
        told = supervisor.snapshot().services[0].last_error or ""
        assert sorted(told.split("; ")) == ["KeyError: 'two'", "ValueError: one"]
        supervisor.stop()


async def test_a_service_that_ends_by_itself_has_failed(autojump_clock: trio.testing.MockClock) -> None:
    supervisor = supervise([Example("short", [], trio.lowlevel.checkpoint)])
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await trio.sleep(0.1)
        assert "ended by itself" in (supervisor.snapshot().services[0].last_error or "")
        supervisor.stop()


async def test_a_fatal_failure_stops_the_others_and_is_raised(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    disk = MeshError(ErrorCode.STORAGE_FAILED, "The disk failed. Check it.", detail={"path": "/x"})

    async def in_a_nursery() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_after(5.0, disk))

    storage = Example("storage", history, in_a_nursery, policy=Policy.FATAL)
    supervisor = supervise([Example("a", history)], [storage], [Example("c", history)])
    with pytest.raises(MeshError) as caught:
        await supervisor.run()
    assert caught.value.code is ErrorCode.STORAGE_FAILED
    assert caught.value.message == (
        "The agent stopped because its service 'storage' failed: The disk failed. Check it."
    )
    assert caught.value.detail == {"path": "/x", "service": "storage"}
    assert history == ["+a", "+storage", "+c", "-storage", "-c", "-a"]
    assert supervisor.snapshot().status == "failed"
    assert states(supervisor) == {"a": State.STOPPED, "storage": State.FAILED, "c": State.STOPPED}


async def test_a_fatal_service_that_cannot_start_ends_the_start(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    broken = Example("broken", history, policy=Policy.FATAL, start_s=1_000.0)
    supervisor = supervise([Example("a", history)], [broken], [Example("c", history)], start_limit_s=30.0)
    began = trio.current_time()
    with pytest.raises(MeshError, match="'broken' failed: it did not start within 30 s") as caught:
        await supervisor.run()
    assert caught.value.code is ErrorCode.TIMEOUT
    assert history == ["+a", "-a"]
    assert trio.current_time() - began == pytest.approx(30.0)


async def test_a_slow_restartable_service_holds_up_nobody_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    supervisor = supervise([Example("slow", history, start_s=100.0)], [Example("b", history)], start_limit_s=30.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        assert history == ["+b"]
        assert supervisor.snapshot().status == "degraded"
        await trio.sleep(100)
        assert supervisor.snapshot().status == "ok"
        supervisor.stop()


async def test_draining_comes_before_cancelling_and_higher_tiers_before_lower(
    autojump_clock: trio.testing.MockClock,
) -> None:
    history: list[str] = []
    supervisor = supervise([Example("low", history)], [DrainingExample("high", history, drain_s=3.0)])
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        supervisor.stop()
        await trio.sleep(1.0)
        assert supervisor.snapshot().status == "stopping"
        assert states(supervisor) == {"low": State.RUNNING, "high": State.STOPPING}
    assert history == ["+low", "+high", "drain high", "drained high", "-high", "-low"]


async def test_the_stop_has_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    log = Log()

    async def stubborn() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(20.0, shield=True):
                await trio.sleep_forever()

    supervisor = supervise(
        [Example("low", history)],
        [DrainingExample("drains", history, drain_s=1_000.0), Example("stubborn", history, stubborn)],
        log=log,
        stop_limit_s=10.0,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        began = trio.current_time()
        supervisor.stop()
    assert trio.current_time() - began == pytest.approx(20.0)
    assert "drained drains" not in history
    assert history.index("-low") < history.index("-stubborn"), "the others waited for the stubborn one"
    assert log.records[-1] == ("services did not stop in time", {"services": ["stubborn"], "limit_s": 10.0})


async def test_a_second_stop_is_immediate(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    supervisor = supervise([Example("low", history)], [DrainingExample("high", history, drain_s=5.0)])
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        began = trio.current_time()
        supervisor.stop()
        await trio.testing.wait_all_tasks_blocked()
        supervisor.stop()
    assert trio.current_time() == began
    assert "drained high" not in history


async def test_a_stop_during_the_start_starts_nothing_more(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    supervisor = supervise([Example("a", history)], [Example("slow", history, start_s=50.0)], [Example("c", history)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        await trio.sleep(10.0)
        asked = trio.current_time()
        supervisor.stop()
    assert trio.current_time() == asked, "the stop waited for the slow start"
    assert history == ["+a", "-a"]


async def test_failures_while_stopping_are_logged_and_stop_nothing(autojump_clock: trio.testing.MockClock) -> None:
    log = Log()
    history: list[str] = []

    async def bad_cleanup() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise RuntimeError("cleanup failed")

    class BadDrain(DrainingExample):
        async def drain(self) -> None:
            raise OSError("drain failed")

    supervisor = supervise([BadDrain("a", history)], [Example("b", history, bad_cleanup)], log=log)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        supervisor.stop()
    told = {(event, fields["service"], fields["error"]) for event, fields in log.records}
    assert told == {
        ("service failed while it was stopped", "b", "RuntimeError: cleanup failed"),
        ("service could not finish its work", "a", "OSError: drain failed"),
    }
    assert set(states(supervisor).values()) == {State.STOPPED}


async def test_a_cancellation_from_outside_stops_everything(autojump_clock: trio.testing.MockClock) -> None:
    history: list[str] = []
    supervisor = supervise([Example("a", history)], [DrainingExample("b", history, drain_s=50.0)])
    with trio.move_on_after(5.0) as scope:
        await supervisor.run()
    assert scope.cancelled_caught
    assert sorted(history) == ["+a", "+b", "-a", "-b"]


async def test_one_signal_stops_gracefully_and_two_at_once(autojump_clock: trio.testing.MockClock) -> None:
    for signals, drained in ((1, True), (2, False)):
        history: list[str] = []
        log = Log()
        supervisor = supervise([DrainingExample("a", history, drain_s=5.0)])
        ready = trio.Event()

        async def send(count: int, ready: trio.Event = ready) -> None:
            await ready.wait()
            for _ in range(count):
                signal.raise_signal(signal.SIGTERM)
                await trio.sleep(1.0)

        before = signal.getsignal(signal.SIGTERM)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, signals)
            await serve_until_signal(supervisor, (), logger=log, on_ready=ready.set)
        assert ("drained a" in history) == drained
        assert len(log.records) == signals
        assert signal.getsignal(signal.SIGTERM) == before


async def test_a_fatal_failure_comes_through_bare(autojump_clock: trio.testing.MockClock) -> None:
    broken = Example("broken", [], fail_after(1.0, OSError("gone")), policy=Policy.FATAL)
    with pytest.raises(MeshError, match="'broken' failed: OSError: gone") as caught:
        await serve_until_signal(supervise([broken]), (), logger=Log())
    assert caught.value.code is ErrorCode.INTERNAL
