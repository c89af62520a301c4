"""Calls over the links: drives the call machine, waits for answers, and runs the handlers of peers' requests.

Ids, deadlines, cancellation and limits are the machine's (protocol.rpc); links are the pool's. What is decided here is
only who waits for what in this process, and what a failing handler looks like to the caller.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeVar, assert_never

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.kernel.logs import Logger
from protocol.effects import CancelTimer, CloseLink, LinkLost, LinkOpened, SendFrame, SetTimer, TimerFired
from protocol.ids import NodeId
from protocol.rpc.events import (
    CallAbandoned,
    CallFailed,
    CallRequested,
    CallSucceeded,
    InvocationDone,
    InvocationEnded,
    InvocationFailed,
    Invoke,
    RpcEffect,
    RpcInput,
    RpcReceived,
    Withdraw,
)
from protocol.rpc.machine import RPC_TIMER, RpcMachine, RpcParams

T = TypeVar("T")

_FRAME_OVERHEAD_BYTES: Final = 256
_UNREADABLE: Final = (msgspec.MsgspecError, RecursionError, ValueError)
"""What msgspec raises for bytes that are not what they should be."""


class CallTransport(Protocol):
    """What calls need of the links."""

    async def ready(self, node_id: NodeId, size: int) -> None:
        """Wait until the link stands and has room; nothing happens between its return and the next await."""
        ...

    async def wait_for_room(self, node_id: NodeId, size: int) -> None:
        """Wait until the queue to that node has room."""
        ...

    def enqueue_rpc(self, node_id: NodeId, payload: bytes) -> None:
        """Queue a frame of channel 1."""
        ...

    def close_link(self, node_id: NodeId, reason: str) -> None:
        """The peer broke the protocol."""
        ...

    def spawn(self, function: Callable[..., Any], *args: object) -> None:
        """Start a task that lives no longer than the links."""
        ...


class _Waiter:
    def __init__(self) -> None:
        self.event = trio.Event()
        self.outcome: CallSucceeded | CallFailed | None = None


class Calls:
    """See the module."""

    def __init__(
        self,
        *,
        transport: CallTransport,
        params: RpcParams,
        waiting_max: int,
        logger: Logger,
    ) -> None:
        self._transport = transport
        self._methods: Mapping[str, PeerMethod[Any]] = {}
        self._params = params
        self._waiting_max = waiting_max
        self._log = logger
        self._machine = RpcMachine(params=params)
        self._next_call = 1
        self._waiters: dict[int, _Waiter] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._slots: dict[NodeId, trio.Semaphore] = {}
        self._waiting = 0
        self._timer_at: float | None = None
        self._timer_moved = trio.Event()

    # ---- calling ----------------------------------------------------------------------------------------------------

    async def call(self, node_id: NodeId, method: str, params: object, returns: type[T], *, timeout_s: float) -> T:
        """See Links.call."""
        answer = await self.call_bytes(node_id, method, msgspec.msgpack.encode(params), timeout_s=timeout_s)
        try:
            return msgspec.msgpack.decode(answer, type=returns)
        except _UNREADABLE as error:
            raise MeshError(
                ErrorCode.PROTOCOL_VIOLATION,
                f"Node {node_id} answered {method} in a form unknown here: {error}. Update the older of the two.",
                detail={"node_id": node_id, "method": method},
            ) from error

    async def call_bytes(self, node_id: NodeId, method: str, body: bytes, *, timeout_s: float) -> bytes:
        """The same with bytes both ways."""
        deadline = trio.current_time() + timeout_s
        slots = self._slots.get(node_id)
        if slots is None:
            slots = self._slots[node_id] = trio.Semaphore(self._params.pending_max)
        if self._waiting >= self._waiting_max:
            raise MeshError(
                ErrorCode.OVERLOADED,
                f"{self._waiting} calls of this node wait for others already. Try again later.",
                retryable=True,
            )
        self._waiting += 1
        acquired = False
        try:
            with trio.move_on_at(deadline) as patience:
                await slots.acquire()
                acquired = True
                await self._transport.ready(node_id, len(body) + _FRAME_OVERHEAD_BYTES)
            if patience.cancelled_caught:
                raise MeshError(
                    ErrorCode.TIMEOUT,
                    f"{method} was not even sent to node {node_id} within {timeout_s:g} s: "
                    + ("the link did not open or is too slow." if acquired else "too many calls to it are open."),
                    retryable=True,
                    detail={"node_id": node_id, "method": method},
                )
            return await self._exchange(node_id, method, body, deadline)
        finally:
            self._waiting -= 1
            if acquired:
                slots.release()

    async def _exchange(self, node_id: NodeId, method: str, body: bytes, deadline: float) -> bytes:
        call, waiter = self._next_call, _Waiter()
        self._next_call += 1
        self._waiters[call] = waiter
        try:
            self._handle(CallRequested(call, node_id, method, body, deadline))
            await waiter.event.wait()
        finally:
            del self._waiters[call]
            if waiter.outcome is None:
                self._handle(CallAbandoned(call))
        outcome = waiter.outcome
        assert outcome is not None
        if isinstance(outcome, CallSucceeded):
            return outcome.body
        raise _error_of(outcome, node_id, method)

    # ---- what the pool says -----------------------------------------------------------------------------------------

    def link_opened(self, peer: NodeId, boot: int) -> None:
        """A link stands: calls may be made on it."""
        self._handle(LinkOpened(peer, boot))

    def link_lost(self, peer: NodeId, reason: str) -> None:
        """Every call with that peer fails, and every handler that works for it is cancelled."""
        self._handle(LinkLost(peer, reason))

    def received(self, peer: NodeId, payload: bytes) -> None:
        """A frame of channel 1."""
        self._handle(RpcReceived(peer, payload))

    def is_busy(self, peer: NodeId) -> bool:
        """Whether a call is open in either direction."""
        return self._machine.is_busy(peer)

    @property
    def open_invocations(self) -> int:
        """Handlers of peers' requests that have not ended."""
        return self._machine.open_invocations

    # ---- driving the machine ----------------------------------------------------------------------------------------

    def _handle(self, event: RpcInput) -> None:
        for effect in self._machine.handle(event, trio.current_time()):
            self._perform(effect)

    def _perform(self, effect: RpcEffect) -> None:
        match effect:
            case SendFrame(to, data):
                self._transport.enqueue_rpc(to, data)
            case CallSucceeded() | CallFailed():
                waiter = self._waiters.get(effect.call)
                if waiter is not None:
                    waiter.outcome = effect
                    waiter.event.set()
            case Invoke():
                scope = self._scopes[effect.invocation] = trio.CancelScope()
                self._transport.spawn(self._serve, effect, scope)
            case Withdraw(invocation):
                scope_or_none = self._scopes.get(invocation)
                if scope_or_none is not None:
                    scope_or_none.cancel()
            case CloseLink(to, reason):
                self._transport.close_link(to, reason)
            case SetTimer(_, at):
                self._timer_at = at
                self._timer_moved.set()
            case CancelTimer():
                self._timer_at = None
                self._timer_moved.set()
            case _:
                assert_never(effect)

    async def run(self, methods: Mapping[str, PeerMethod[Any]]) -> None:
        """Answer with `methods`, and fire the machine's timer when it is due. Runs as long as the links do."""
        self._methods = methods
        while True:
            self._timer_moved = trio.Event()
            if self._timer_at is None:
                await self._timer_moved.wait()
            elif self._timer_at <= trio.current_time():
                self._timer_at = None
                self._handle(TimerFired(RPC_TIMER))
                await trio.lowlevel.checkpoint()
            else:
                with trio.move_on_at(self._timer_at):
                    await self._timer_moved.wait()

    # ---- serving ----------------------------------------------------------------------------------------------------

    async def _serve(self, invoke: Invoke, scope: trio.CancelScope) -> None:
        result: RpcInput = InvocationEnded(invoke.invocation)
        try:
            with scope:
                result = await self._run_handler(invoke)
        finally:
            del self._scopes[invoke.invocation]
            self._handle(result)

    async def _run_handler(self, invoke: Invoke) -> InvocationDone | InvocationFailed:
        try:
            body = await self._answer(invoke)
        except MeshError as error:
            return _failed(invoke.invocation, error)
        except Exception as error:  # noqa: BLE001 -- the peer-handler boundary: one bad request must not stop the node
            self._log.exception(
                "a peer's call failed", method=invoke.method, peer=invoke.peer, kind=type(error).__name__
            )
            message = f"The node failed while doing {invoke.method!r}. Its log says why."
            return InvocationFailed(invoke.invocation, ErrorCode.INTERNAL.value, message, False)
        # An answer that the peer is too slow to take waits here, and holds one of the peer's own slots meanwhile.
        await self._transport.wait_for_room(invoke.peer, len(body) + _FRAME_OVERHEAD_BYTES)
        return InvocationDone(invoke.invocation, body)

    async def _answer(self, invoke: Invoke) -> bytes:
        method = self._methods.get(invoke.method)
        if method is None:
            raise MeshError(
                ErrorCode.UNKNOWN_METHOD,
                f"This node has no method {invoke.method!r}. Its meshnode is older, or lacks that part.",
                detail={"method": invoke.method},
            )
        try:
            params = msgspec.msgpack.decode(invoke.body, type=method.params)
        except _UNREADABLE as error:
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                f"The parameters of {invoke.method!r} cannot be read: {error}.",
                detail={"method": invoke.method},
            ) from error
        return msgspec.msgpack.encode(await method.handle(invoke.peer, params))


def _failed(invocation: int, error: MeshError) -> InvocationFailed:
    try:
        detail = msgspec.json.encode(error.detail) if error.detail else b""
    except (TypeError, ValueError, OverflowError):
        # It should have been JSON data; the error itself matters more.
        detail = b""
    return InvocationFailed(invocation, error.code.value, error.message, error.retryable, detail)


def _error_of(failure: CallFailed, node_id: NodeId, method: str) -> MeshError:
    try:
        code = ErrorCode(failure.code)
    except ValueError:
        # A newer peer may have codes that this node lacks.
        code = ErrorCode.INTERNAL
    detail: dict[str, object] = {}
    if failure.detail:
        try:
            detail = msgspec.json.decode(failure.detail, type=dict[str, object])
        except _UNREADABLE:
            detail = {}
    detail |= {"node_id": node_id, "method": method}
    return MeshError(code, failure.message, retryable=failure.retryable, detail=detail)
