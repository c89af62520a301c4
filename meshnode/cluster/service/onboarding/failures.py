"""Why a join failed, in words: one reason per address, one error for the person.

It only words what `joiner` met.
"""

import errno
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.ids import Address


@dataclass(frozen=True, slots=True)
class Failure:
    """What came of one address."""

    address: Address
    code: ErrorCode
    reason: str


# The most telling comes first: what a machine of the mesh says about the invitation beats that others were not there.
_TELLING: Final = (
    ErrorCode.TOKEN_USED,
    ErrorCode.TOKEN_EXPIRED,
    ErrorCode.EVICTED,
    ErrorCode.TOKEN_INVALID,
    ErrorCode.RATE_LIMITED,
    ErrorCode.INCOMPATIBLE_VERSION,
    ErrorCode.JOIN_REFUSED,
    ErrorCode.BAD_SIGNATURE,
    ErrorCode.PIN_MISMATCH,
    ErrorCode.PROTOCOL_VIOLATION,
    ErrorCode.FRAME_TOO_LARGE,
    ErrorCode.TIMEOUT,
    ErrorCode.UNREACHABLE,
)
_RETRYABLE: Final = (ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT, ErrorCode.RATE_LIMITED)

_ADVICE: Final = {
    ErrorCode.PIN_MISMATCH: "Nothing was sent to it. If the address may have changed hands, ask for a new invitation; "
    "if not, somebody may be in between: do not go on over this network.",
    ErrorCode.UNREACHABLE: "The inviting machine listens only while an invitation is valid (10 minutes by default). "
    "Check that it is on, on the same network, and that no firewall is in between; or ask for a new invitation.",
    ErrorCode.TIMEOUT: "Try again with the same URL: if the invitation was used up by this attempt, it still counts "
    "for this machine.",
    ErrorCode.PROTOCOL_VIOLATION: "Check the address, and that both machines have the same version of meshnode.",
}


def join_failed(failures: Sequence[Failure]) -> MeshError:
    """One error for all addresses. Its code is that of the most telling failure; its message names every address."""
    if not failures:
        return MeshError(ErrorCode.UNREACHABLE, "The join URL names no address. Copy the whole URL again.")
    code = min((failure.code for failure in failures), key=_telling)
    if len(failures) == 1 and code not in (ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT):
        reasons = f"{failures[0].address}: {failures[0].reason}"
    else:
        reasons = "No machine let this one in. " + "; ".join(f"{one.address}: {one.reason}" for one in failures)
    ended = reasons if reasons.endswith("?") else reasons.rstrip(".") + "."
    message = f"{ended} {_ADVICE.get(code, '')}".strip()
    return MeshError(
        code,
        message,
        retryable=code in _RETRYABLE,
        detail={"tried": [{"address": str(one.address), "reason": one.reason} for one in failures]},
    )


def described(error: BaseException, *, connected: bool) -> MeshError:
    """What went wrong with one address, as words that follow "ADDRESS: ". A MeshError stays what it is."""
    if isinstance(error, MeshError):
        return error
    return MeshError(ErrorCode.UNREACHABLE, _reason(error, connected), retryable=True)


def _reason(error: BaseException, connected: bool) -> str:
    if isinstance(error, trio.TooSlowError):
        return "it said nothing in time" if connected else "no answer (switched off, or a firewall in between)"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return "what answers there does not speak TLS 1.3 (is it meshnode?)"
        if isinstance(cause, OSError) and cause.errno is not None:
            return _os_reason(cause)
        group = cause.exceptions if isinstance(cause, BaseExceptionGroup) else ()
        cause = group[0] if group else cause.__cause__ or cause.__context__
    return "the connection broke" if connected else "it cannot be reached"


def _os_reason(error: OSError) -> str:
    match error.errno:
        case errno.ECONNREFUSED:
            return "connection refused (nothing listens there now)"
        case errno.EHOSTUNREACH | errno.ENETUNREACH:
            return "no route to it from this network"
        case errno.ECONNRESET | errno.EPIPE:
            return "it closed the connection"
        case _:
            return (error.strerror or "it cannot be reached").lower()


def _telling(code: ErrorCode) -> int:
    return _TELLING.index(code) if code in _TELLING else len(_TELLING)
