"""What the call machine is told and what it asks for, beside the inputs and effects that all machines share."""

from dataclasses import dataclass

from protocol.effects import CancelTimer, CloseLink, LinkLost, LinkOpened, SendFrame, SetTimer, TimerFired
from protocol.ids import NodeId

# ---- inputs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallRequested:
    """A local caller wants `method` of a peer done by monotonic time `deadline`. `call` is the caller's own number."""

    call: int
    peer: NodeId
    method: str
    body: bytes
    deadline: float


@dataclass(frozen=True, slots=True)
class CallAbandoned:
    """The local caller went away: no result is wanted."""

    call: int


@dataclass(frozen=True, slots=True)
class RpcReceived:
    """One frame of channel 1 from a peer."""

    peer: NodeId
    payload: bytes


@dataclass(frozen=True, slots=True)
class InvocationDone:
    """The handler of an invocation returned."""

    invocation: int
    body: bytes


@dataclass(frozen=True, slots=True)
class InvocationFailed:
    """The handler of an invocation failed."""

    invocation: int
    code: str
    message: str
    retryable: bool
    detail: bytes = b""


@dataclass(frozen=True, slots=True)
class InvocationEnded:
    """The handler of a withdrawn invocation has come to its end; only now is its slot free."""

    invocation: int


RpcInput = (
    CallRequested
    | CallAbandoned
    | RpcReceived
    | InvocationDone
    | InvocationFailed
    | InvocationEnded
    | LinkOpened
    | LinkLost
    | TimerFired
)

# ---- effects ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallSucceeded:
    """The answer to a call."""

    call: int
    body: bytes


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call came to nothing: the peer said so, or this node did and the peer may have done it all the same."""

    call: int
    code: str
    message: str
    retryable: bool
    detail: bytes = b""


@dataclass(frozen=True, slots=True)
class Invoke:
    """Run the handler of `method` and tell the machine how it went, by monotonic time `deadline` at the latest."""

    invocation: int
    peer: NodeId
    method: str
    body: bytes
    deadline: float


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Cancel that handler: nobody waits for it any more. Answered by InvocationEnded once it is over."""

    invocation: int


RpcEffect = CallSucceeded | CallFailed | Invoke | Withdraw | SendFrame | CloseLink | SetTimer | CancelTimer
"""SendFrame means channel 1 here."""
