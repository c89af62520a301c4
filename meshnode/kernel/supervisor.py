"""Starts the services in order, keeps them running, and stops them in reverse.

Its job: one task for each service; a FATAL service that fails ends the agent with its error, a RESTART service comes
back after a pause that grows. One of the three places where any exception may be caught: what happened is logged whole
and shown in `snapshot`. It leaves what a service does to the service, and what a signal is to `serve_until_signal`.

A service is stopped by cancelling its `run`; one that has `drain` is asked to finish first. Whatever must not be cut
off shields itself, with a deadline of its own.
"""

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from meshnode.kernel.errors import ErrorCode, MeshError, only
from meshnode.kernel.logs import Logger
from meshnode.kernel.service import AgentHealth, Draining, Policy, Service, ServiceHealth, State

START_LIMIT_S: Final = 30.0
STOP_LIMIT_S: Final = 10.0
BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 60.0
BACKOFF_RESET_S: Final = 60.0
"""A service that ran for so long has recovered: its next failure begins with a short pause again."""

_ERROR_CHARS_MAX: Final = 500


class Chance(Protocol):
    """The part of random.Random that the pauses draw from."""

    def uniform(self, a: float, b: float, /) -> float: ...


@dataclass(slots=True, eq=False)
class _Record:
    """One service's life. `settled` is set once it has started or failed to, `ended` once its task is over."""

    service: Service
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    settled: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    state: State = State.WAITING
    since: float = 0.0
    restarts: int = 0
    failures_in_a_row: int = 0
    last_error: str | None = None
    retry_at: float | None = None

    def enter(self, state: State) -> None:
        self.state = state
        self.since = trio.current_time()
        self.retry_at = None


class _Started:
    """The task_status given to a service; a class of its own because a service is started again and again."""

    def __init__(self, record: _Record) -> None:
        self._record = record

    def started(self, value: Any = None) -> None:
        if self._record.state is State.STARTING:
            self._record.enter(State.RUNNING)
        self._record.settled.set()


class Supervisor:
    """Runs tiers of services. All methods belong to trio's thread; `run` may be called once."""

    def __init__(
        self,
        *,
        chance: Chance,
        logger: Logger,
        start_limit_s: float = START_LIMIT_S,
        stop_limit_s: float = STOP_LIMIT_S,
    ) -> None:
        self._tiers: tuple[tuple[_Record, ...], ...] = ()
        self._chance = chance
        self._logger = logger
        self._start_limit_s = start_limit_s
        self._stop_limit_s = stop_limit_s
        self._stop_asked = trio.Event()
        self._starting = trio.CancelScope()
        self._everything = trio.CancelScope()
        self._failure: BaseException | None = None
        self._failed_service = ""
        self._ready = False

    def stop(self) -> None:
        """Ask for a graceful stop, in reverse order and within `stop_limit_s`; again: see `stop_now`."""
        if self._stop_asked.is_set():
            self.stop_now()
        self._stop_asked.set()
        self._starting.cancel()

    def stop_now(self) -> None:
        """Cancel all services at once, in no order. What was acknowledged stays durable."""
        self._stop_asked.set()
        self._everything.cancel()

    def snapshot(self) -> AgentHealth:
        """The state of every service now, in starting order; of none before `run`."""
        now = trio.current_time()
        records = [record for tier in self._tiers for record in tier]
        services = tuple(
            ServiceHealth(
                name=record.service.name,
                policy=record.service.policy,
                state=record.state,
                since_s=round(now - record.since, 3) if record.state is not State.WAITING else 0.0,
                restarts=record.restarts,
                last_error=record.last_error,
                retry_s=None if record.retry_at is None else round(max(0.0, record.retry_at - now), 3),
            )
            for record in records
        )
        return AgentHealth(self._status({record.state for record in records}), services)

    async def run(
        self, tiers: Sequence[Sequence[Service]], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Start all tiers in order, report started, run until stopped, stop in reverse; returns after a clean stop.

        `tiers`: those that others stand on first. Services of one tier start, and stop, at the same time.

        Raises the MeshError of a FATAL service that failed, or one that names the service and what to do. A
        cancellation from outside stops everything at once, like `stop_now`.
        """
        self._tiers = tuple(tuple(_Record(service) for service in tier) for tier in tiers)
        with self._everything:
            async with trio.open_nursery() as nursery:
                with self._starting:
                    await self._start(nursery)
                if not self._stop_asked.is_set():
                    self._ready = True
                    task_status.started()
                    await self._stop_asked.wait()
                await self._stop()
        for tier in self._tiers:
            for record in tier:
                if record.state is not State.FAILED:
                    record.state = State.STOPPED
        if self._failure is not None:
            raise self._explained(self._failure) from self._failure

    # ---- starting and stopping --------------------------------------------------------------------------------------

    async def _start(self, nursery: trio.Nursery) -> None:
        for tier in self._tiers:
            for record in tier:
                nursery.start_soon(self._keep, record, name=f"service {record.service.name}")
            for record in tier:
                with trio.move_on_after(self._start_limit_s):
                    await record.settled.wait()
                    continue
                self._slow_to_start(record)

    def _slow_to_start(self, record: _Record) -> None:
        """A service that others need must not keep them waiting for ever; one that may come later, may."""
        if record.service.policy is Policy.FATAL:
            message = f"it did not start within {self._start_limit_s:g} s"
            self._fail(record, MeshError(ErrorCode.TIMEOUT, message, retryable=True))
        else:
            record.last_error = f"not started after {self._start_limit_s:g} s"
            self._logger.warning("service is slow to start", service=record.service.name)

    async def _stop(self) -> None:
        deadline = trio.current_time() + self._stop_limit_s
        for tier in reversed(self._tiers):
            async with trio.open_nursery() as nursery:
                for record in tier:
                    if record.state is not State.WAITING:
                        nursery.start_soon(self._stop_one, record, deadline)
        left = [record.service.name for tier in self._tiers for record in tier if not _is_over(record)]
        if left:
            self._logger.error("services did not stop in time", services=left, limit_s=self._stop_limit_s)
            self._everything.cancel()

    async def _stop_one(self, record: _Record, deadline: float) -> None:
        service = record.service
        if not record.ended.is_set() and record.state is State.RUNNING:
            record.enter(State.STOPPING)
            if isinstance(service, Draining):
                with trio.move_on_at(deadline):
                    await self._drain(record, service)
        record.scope.cancel()
        with trio.move_on_at(deadline):
            await record.ended.wait()

    async def _drain(self, record: _Record, service: Draining) -> None:
        try:
            await service.drain()
        except Exception as error:  # noqa: BLE001 - the supervisor is a boundary: a failed drain must not keep us here
            self._log_failure("service could not finish its work", record, error)

    # ---- one service ------------------------------------------------------------------------------------------------

    async def _keep(self, record: _Record) -> None:
        """Run the service, again after failures, until its scope is cancelled."""
        try:
            with record.scope:
                while not self._stop_asked.is_set():
                    error = await self._run_once(record)
                    if error is None or self._stop_asked.is_set():
                        return
                    if record.service.policy is Policy.FATAL:
                        self._fail(record, error)
                        return
                    await self._back_off(record)
        finally:
            if record.state is not State.FAILED:
                record.enter(State.STOPPED)
            record.settled.set()
            record.ended.set()

    async def _run_once(self, record: _Record) -> Exception | None:
        """Run the service to its end and return why it ended; None when it was stopped."""
        record.enter(State.STARTING)
        began = trio.current_time()
        error: Exception
        try:
            await record.service.run(task_status=_Started(record))
            if self._stop_asked.is_set():
                return None
            error = MeshError(ErrorCode.INTERNAL, "the service ended by itself although nobody stopped it")
        except Exception as failure:  # noqa: BLE001 - the supervisor is a boundary
            error = failure
        except BaseExceptionGroup as group:
            # A stop that met a failing cleanup arrives as one group: the failures are reported, the cancellation (or
            # KeyboardInterrupt) goes on its way.
            failures, rest = group.split(Exception)
            if failures is not None:
                self._log_failure("service failed while it was stopped", record, failures)
            if rest is not None:
                raise rest from None
            return None
        if record.scope.cancel_called or self._everything.cancel_called:
            self._log_failure("service failed while it was stopped", record, error)
            return None
        ran = trio.current_time() - began
        record.failures_in_a_row = 1 if ran >= BACKOFF_RESET_S else record.failures_in_a_row + 1
        record.last_error = _one_line(error)
        self._log_failure("service failed", record, error)
        return error

    async def _back_off(self, record: _Record) -> None:
        exponent = min(record.failures_in_a_row - 1, math.ceil(math.log2(BACKOFF_MAX_S / BACKOFF_FIRST_S)))
        longest = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0**exponent)
        # Half of the pause is drawn, so that nodes whose services fail together do not come back together.
        pause = self._chance.uniform(longest / 2, longest)
        record.enter(State.BACKING_OFF)
        record.retry_at = record.since + pause
        # The tiers above need not wait for a service that may come back later.
        record.settled.set()
        await trio.sleep(pause)
        record.restarts += 1

    def _fail(self, record: _Record, error: Exception) -> None:
        """Remember the first fatal failure and stop the agent."""
        if self._failure is None:
            self._failure, self._failed_service = error, record.service.name
            record.last_error = _one_line(error)
        record.enter(State.FAILED)
        self._stop_asked.set()
        self._starting.cancel()

    # ---- words ------------------------------------------------------------------------------------------------------

    def _status(self, states: set[State]) -> str:
        if self._failure is not None:
            return "failed"
        if self._stop_asked.is_set():
            return "stopping"
        if not self._ready:
            return "starting"
        return "ok" if states <= {State.RUNNING} else "degraded"

    def _explained(self, failure: BaseException) -> MeshError:
        cause = only(failure)
        name = self._failed_service
        if isinstance(cause, MeshError):
            return MeshError(
                cause.code,
                f"The agent stopped because its service '{name}' failed: {cause.message}",
                retryable=cause.retryable,
                detail={**cause.detail, "service": name},
            )
        return MeshError(
            ErrorCode.INTERNAL,
            f"The agent stopped because its service '{name}' failed: {_one_line(failure)}. The log has the details; "
            f"start the agent again, and report this if it comes back.",
            detail={"service": name},
        )

    def _log_failure(self, event: str, record: _Record, error: BaseException) -> None:
        # A MeshError says what happened and what to do; where in the code it was noticed helps nobody.
        foreseen = isinstance(only(error), MeshError)
        self._logger.error(
            event,
            service=record.service.name,
            policy=record.service.policy.value,
            exc_info=None if foreseen else error,
            error=_one_line(error),
        )


async def serve_until_signal(
    supervisor: Supervisor,
    tiers: Sequence[Sequence[Service]],
    *,
    logger: Logger,
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Run the supervisor; the first signal stops it gracefully, the second at once, a third kills the process.

    `on_ready` is called when all tiers have started (service managers want to know). Must run in the main thread.
    Raises as Supervisor.run.
    """
    failure: MeshError | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, supervisor, logger, signals)
        try:
            await supervisor.run(tiers, task_status=_Ready(on_ready))
        except MeshError as error:
            failure = error
        nursery.cancel_scope.cancel()
    # Raised here, since a nursery would wrap it into a group.
    if failure is not None:
        raise failure


class _Ready:
    """A task_status that calls a function."""

    def __init__(self, on_ready: Callable[[], None]) -> None:
        self._on_ready = on_ready

    def started(self, value: Any = None) -> None:
        self._on_ready()


async def _watch_signals(
    supervisor: Supervisor,
    logger: Logger,
    signals: Sequence[signal.Signals],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    with trio.open_signal_receiver(*signals) as received:
        task_status.started()
        first = await anext(received)
        logger.info("stopping; a second signal stops at once", signal=signal.Signals(first).name)
        supervisor.stop()
        second = await anext(received)
        logger.warning("stopping at once", signal=signal.Signals(second).name)
        supervisor.stop_now()
    # Here the signals have their usual effect again: a third one ends a process that hangs.


def _is_over(record: _Record) -> bool:
    return record.state is State.WAITING or record.ended.is_set()


def _one_line(error: BaseException) -> str:
    """The error for health and logs: the innermost messages, on one line, bounded."""
    cause = only(error)
    if isinstance(cause, BaseExceptionGroup):
        text = "; ".join(_one_line(one) for one in cause.exceptions)
    else:
        text = cause.message if isinstance(cause, MeshError) else f"{type(cause).__name__}: {cause}"
    return " ".join(text.split())[:_ERROR_CHARS_MAX]
