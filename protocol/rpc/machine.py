"""The call machine: one per node, for all its peers and both directions.

It numbers requests, holds what is pending, keeps deadlines, carries cancellation across and refuses what exceeds the
limits. It neither opens links (a call is requested once a link stands) nor runs handlers (`Invoke` asks for that).

A call ends exactly once, whatever arrives late: by the answer, by its deadline, by the link's end, or because its
caller left. Whether the peer did the work is unknown in all cases but the first; the machine never asks twice.
"""

import heapq
from dataclasses import dataclass, field
from typing import Final, assert_never

from protocol.effects import CloseLink, LinkLost, LinkOpened, SendFrame, SetTimer, TimerFired, TimerKey
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
from protocol.rpc.messages import (
    DEADLINE_MS_MAX,
    ERROR_CODE_BYTES_MAX,
    ERROR_DETAIL_BYTES_MAX,
    ERROR_MESSAGE_CHARS_MAX,
    METHOD_BYTES_MAX,
    RPC_BODY_BYTES_MAX,
    Cancel,
    Failure,
    Reply,
    Request,
    RpcMessage,
    decode_rpc,
    encode_rpc,
)
from protocol.wire.frames import RemoteProtocolError

RPC_TIMER: Final[TimerKey] = ("rpc",)
_STALE_TIMERS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class RpcParams:
    """Limits per peer. Both sides are built with the same: a caller that keeps to them is never refused for them."""

    pending_max: int = 128
    serving_max: int = 128
    serving_bytes_max: int = 32 * 1024 * 1024
    # Withdrawn handlers that have not ended yet hold slots too, but a well-behaved caller cannot know of them.
    withdrawn_max: int = 128


@dataclass(slots=True)
class _Pending:
    call: int
    peer: NodeId
    id: int
    deadline: float


@dataclass(slots=True)
class _Serving:
    invocation: int
    peer: NodeId
    id: int
    deadline: float
    body_bytes: int


@dataclass(slots=True)
class _Peer:
    last_sent_id: int = 0
    last_seen_id: int = 0
    pending: dict[int, _Pending] = field(default_factory=dict)
    serving: dict[int, _Serving] = field(default_factory=dict)
    serving_bytes: int = 0
    withdrawn: int = 0


class RpcMachine:
    """See the module. Every input returns the effects in the order to perform them."""

    def __init__(self, *, params: RpcParams | None = None) -> None:
        self._params = params if params is not None else RpcParams()
        self._peers: dict[NodeId, _Peer] = {}
        self._calls: dict[int, _Pending] = {}
        self._invocations: dict[int, _Serving] = {}
        self._withdrawn: dict[int, tuple[NodeId, _Peer]] = {}
        self._next_invocation = 1
        self._timers: list[tuple[float, bool, int]] = []
        self._timer_at: float | None = None
        self.late_replies = 0

    @property
    def pending_calls(self) -> int:
        """Calls of this node that wait for an answer."""
        return len(self._calls)

    @property
    def open_invocations(self) -> int:
        """Requests of peers whose handlers have not ended."""
        return len(self._invocations) + len(self._withdrawn)

    def is_busy(self, peer: NodeId) -> bool:
        """Whether a call in either direction is open with this peer."""
        state = self._peers.get(peer)
        return state is not None and bool(state.pending or state.serving)

    def handle(self, event: RpcInput, now: float) -> list[RpcEffect]:
        """Take one input at monotonic time `now`; return what to do. Never raises for anything a peer sent."""
        effects: list[RpcEffect] = []
        match event:
            case CallRequested():
                self._request(event, now, effects)
            case CallAbandoned(call):
                self._abandon(call, effects)
            case RpcReceived(peer, payload):
                self._receive(peer, payload, now, effects)
            case InvocationDone(invocation, body):
                self._answer(invocation, body, effects)
            case InvocationFailed():
                self._fail_invocation(event, effects)
            case InvocationEnded(invocation):
                self._end(invocation)
            case LinkOpened(peer):
                self._forget(peer, "the link was replaced", effects)
                self._peers[peer] = _Peer()
            case LinkLost(peer, reason):
                self._forget(peer, reason, effects)
            case TimerFired():
                self._timer_at = None
                self._expire(now, effects)
            case _:
                assert_never(event)
        self._rearm(effects)
        return effects

    # ---- calls of this node ---------------------------------------------------------------------------------------

    def _request(self, event: CallRequested, now: float, effects: list[RpcEffect]) -> None:
        peer = self._peers.get(event.peer)
        if peer is None:
            effects.append(_local_failure(event.call, "unreachable", "There is no link to that node.", retryable=True))
            return
        if len(event.method.encode()) > METHOD_BYTES_MAX or len(event.body) > RPC_BODY_BYTES_MAX:
            message = f"A call carries at most {RPC_BODY_BYTES_MAX} bytes, not {len(event.body)}; use a bulk stream."
            effects.append(_local_failure(event.call, "too_large", message, retryable=False))
            return
        if len(peer.pending) >= self._params.pending_max:
            message = f"{self._params.pending_max} calls to that node are open already. Wait for some to end."
            effects.append(_local_failure(event.call, "overloaded", message, retryable=True))
            return
        if event.deadline <= now:
            effects.append(_local_failure(event.call, "timeout", "The deadline had passed already.", retryable=True))
            return
        peer.last_sent_id += 1
        pending = _Pending(event.call, event.peer, peer.last_sent_id, event.deadline)
        peer.pending[pending.id] = pending
        self._calls[event.call] = pending
        heapq.heappush(self._timers, (pending.deadline, False, pending.call))
        remaining_ms = min(DEADLINE_MS_MAX, int((event.deadline - now) * 1000))
        _send(effects, event.peer, Request(pending.id, event.method, remaining_ms, event.body))

    def _abandon(self, call: int, effects: list[RpcEffect]) -> None:
        pending = self._drop_call(call)
        if pending is not None:
            _send(effects, pending.peer, Cancel(pending.id))

    def _drop_call(self, call: int) -> _Pending | None:
        pending = self._calls.pop(call, None)
        if pending is not None:
            del self._peers[pending.peer].pending[pending.id]
        return pending

    # ---- what peers send -------------------------------------------------------------------------------------------

    def _receive(self, peer: NodeId, payload: bytes, now: float, effects: list[RpcEffect]) -> None:
        state = self._peers.get(peer)
        if state is None:
            return
        try:
            message = decode_rpc(payload)
            match message:
                case Request():
                    self._serve(peer, state, message, now, effects)
                case Reply():
                    pending = self._match(state, message.id)
                    if pending is not None:
                        effects.append(CallSucceeded(pending.call, message.body))
                case Failure():
                    pending = self._match(state, message.id)
                    if pending is not None:
                        effects.append(_peer_failure(pending.call, message))
                case Cancel():
                    serving = state.serving.get(message.id)
                    if serving is not None:
                        self._withdraw(serving, effects)
                case _:
                    assert_never(message)
        except RemoteProtocolError as error:
            effects.append(CloseLink(peer, f"it broke the protocol: {error}"))

    def _match(self, state: _Peer, id: int) -> _Pending | None:
        """The call that an answer belongs to. An answer after the deadline or a cancellation is late, not wrong."""
        pending = state.pending.get(id)
        if pending is not None:
            self._drop_call(pending.call)
            return pending
        if id > state.last_sent_id:
            raise RemoteProtocolError(f"an answer to request {id}, which was never sent")
        self.late_replies += 1
        return None

    def _serve(self, peer: NodeId, state: _Peer, request: Request, now: float, effects: list[RpcEffect]) -> None:
        if request.id <= state.last_seen_id:
            raise RemoteProtocolError(f"request id {request.id} after {state.last_seen_id}")
        state.last_seen_id = request.id
        params = self._params
        if (
            len(state.serving) >= params.serving_max
            or state.serving_bytes + len(request.body) > params.serving_bytes_max
            or state.withdrawn >= params.withdrawn_max
        ):
            message = "This node is already serving as many calls of yours as it will. Try again later."
            _send(effects, peer, Failure(request.id, "overloaded", message, True))
            return
        invocation = self._next_invocation
        self._next_invocation += 1
        deadline = now + request.remaining_ms / 1000
        serving = _Serving(invocation, peer, request.id, deadline, len(request.body))
        state.serving[request.id] = serving
        state.serving_bytes += serving.body_bytes
        self._invocations[invocation] = serving
        heapq.heappush(self._timers, (deadline, True, invocation))
        effects.append(Invoke(invocation, peer, request.method, request.body, deadline))

    # ---- handlers of this node ---------------------------------------------------------------------------------------

    def _drop_invocation(self, invocation: int) -> _Serving | None:
        serving = self._invocations.pop(invocation, None)
        if serving is not None:
            state = self._peers[serving.peer]
            del state.serving[serving.id]
            state.serving_bytes -= serving.body_bytes
        return serving

    def _withdraw(self, serving: _Serving, effects: list[RpcEffect]) -> None:
        state = self._peers[serving.peer]
        self._drop_invocation(serving.invocation)
        self._withdrawn[serving.invocation] = (serving.peer, state)
        state.withdrawn += 1
        effects.append(Withdraw(serving.invocation))

    def _end(self, invocation: int) -> None:
        self._drop_invocation(invocation)
        withdrawn = self._withdrawn.pop(invocation, None)
        if withdrawn is not None:
            withdrawn[1].withdrawn -= 1

    def _answer(self, invocation: int, body: bytes, effects: list[RpcEffect]) -> None:
        serving = self._drop_invocation(invocation)
        if serving is None:
            self._end(invocation)
        elif len(body) > RPC_BODY_BYTES_MAX:
            message = f"The answer has {len(body)} bytes; a call carries at most {RPC_BODY_BYTES_MAX}. Ask for less."
            _send(effects, serving.peer, Failure(serving.id, "too_large", message, False))
        else:
            _send(effects, serving.peer, Reply(serving.id, body))

    def _fail_invocation(self, event: InvocationFailed, effects: list[RpcEffect]) -> None:
        serving = self._drop_invocation(event.invocation)
        if serving is None:
            self._end(event.invocation)
            return
        detail = event.detail if len(event.detail) <= ERROR_DETAIL_BYTES_MAX else b""
        code, message = event.code[:ERROR_CODE_BYTES_MAX], event.message[:ERROR_MESSAGE_CHARS_MAX]
        _send(effects, serving.peer, Failure(serving.id, code, message, event.retryable, detail))

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _forget(self, peer: NodeId, reason: str, effects: list[RpcEffect]) -> None:
        state = self._peers.get(peer)
        if state is None:
            return
        for pending in list(state.pending.values()):
            self._drop_call(pending.call)
            message = f"The link to that node was lost ({reason}); the call may or may not have been done."
            effects.append(_local_failure(pending.call, "unreachable", message, retryable=True))
        for serving in list(state.serving.values()):
            self._withdraw(serving, effects)
        # Withdrawn handlers keep counting against their old state, which goes with them.
        del self._peers[peer]

    def _expire(self, now: float, effects: list[RpcEffect]) -> None:
        while self._timers and self._timers[0][0] <= now:
            _, is_invocation, number = heapq.heappop(self._timers)
            if is_invocation:
                serving = self._invocations.get(number)
                if serving is not None:
                    message = "The call did not end before its deadline."
                    self._withdraw(serving, effects)
                    _send(effects, serving.peer, Failure(serving.id, "timeout", message, True))
            else:
                pending = self._drop_call(number)
                if pending is not None:
                    message = "The node did not answer in time; the call may or may not have been done."
                    effects.append(_local_failure(number, "timeout", message, retryable=True))
                    _send(effects, pending.peer, Cancel(pending.id))

    def _rearm(self, effects: list[RpcEffect]) -> None:
        """Keep one timer set to the earliest deadline that still matters."""
        live = len(self._calls) + len(self._invocations)
        if len(self._timers) > 2 * live + _STALE_TIMERS_MAX:
            # Calls that ended leave their deadlines behind; without this, a minute's worth would pile up.
            self._timers = [t for t in self._timers if t[2] in (self._invocations if t[1] else self._calls)]
            heapq.heapify(self._timers)
        if not self._timers or not live:
            return
        at = self._timers[0][0]
        if self._timer_at is None or at < self._timer_at:
            self._timer_at = at
            effects.append(SetTimer(RPC_TIMER, at))


def _send(effects: list[RpcEffect], peer: NodeId, message: RpcMessage) -> None:
    effects.append(SendFrame(peer, encode_rpc(message)))


def _local_failure(call: int, code: str, message: str, *, retryable: bool) -> CallFailed:
    return CallFailed(call, code, message, retryable)


def _peer_failure(call: int, failure: Failure) -> CallFailed:
    return CallFailed(call, failure.code, failure.message, failure.retryable, detail=bytes(failure.detail))
