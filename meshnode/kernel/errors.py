"""The one error type of the agent and its closed set of codes.

Its job is to carry what went wrong, in words that say what to do next, from wherever it happened to
whichever surface renders it. It leaves rendering to the surfaces: the HTTP layer turns an error into
JSON, the command line into a line on stderr and an exit code.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, overload


class ErrorCode(StrEnum):
    """Every code an answer of this agent can carry. Clients match on the code, never on the message."""

    # What the caller sent.
    BAD_REQUEST = "bad_request"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CONFLICT = "conflict"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    USAGE = "usage"
    BAD_SETTING = "bad_setting"

    # Who the caller is, and how they reached us.
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    MISDIRECTED = "misdirected"
    RATE_LIMITED = "rate_limited"
    NOT_ADMIN = "not_admin"

    # How it went.
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    INTERNAL = "internal"
    NOT_IMPLEMENTED = "not_implemented"

    # This machine.
    DISK_FULL = "disk_full"
    STORAGE_FAILED = "storage_failed"
    DATABASE_NEWER = "database_newer"
    DATABASE_CORRUPT = "database_corrupt"
    DATA_IN_USE = "data_in_use"
    PORT_IN_USE = "port_in_use"
    AGENT_NOT_RUNNING = "agent_not_running"

    # The mesh: membership and joining.
    NOT_A_MEMBER = "not_a_member"
    ALREADY_MEMBER = "already_member"
    EVICTED = "evicted"
    JOIN_REFUSED = "join_refused"
    TOKEN_INVALID = "token_invalid"
    TOKEN_EXPIRED = "token_expired"
    TOKEN_USED = "token_used"
    PIN_MISMATCH = "pin_mismatch"
    UNKNOWN_NODE = "unknown_node"

    # The links between nodes.
    UNREACHABLE = "unreachable"
    INCOMPATIBLE_VERSION = "incompatible_version"
    FRAME_TOO_LARGE = "frame_too_large"
    PROTOCOL_VIOLATION = "protocol_violation"
    BAD_SIGNATURE = "bad_signature"
    UNKNOWN_METHOD = "unknown_method"
    OVERLOADED = "overloaded"


HTTP_STATUS: Final[Mapping[ErrorCode, int]] = MappingProxyType(
    {
        ErrorCode.BAD_REQUEST: 400,
        ErrorCode.NOT_FOUND: 404,
        ErrorCode.METHOD_NOT_ALLOWED: 405,
        ErrorCode.CONFLICT: 409,
        ErrorCode.TOO_LARGE: 413,
        ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
        ErrorCode.USAGE: 400,
        ErrorCode.BAD_SETTING: 400,
        ErrorCode.UNAUTHORIZED: 401,
        ErrorCode.FORBIDDEN: 403,
        ErrorCode.MISDIRECTED: 421,
        ErrorCode.RATE_LIMITED: 429,
        ErrorCode.NOT_ADMIN: 403,
        ErrorCode.UNAVAILABLE: 503,
        ErrorCode.TIMEOUT: 504,
        ErrorCode.INTERNAL: 500,
        ErrorCode.NOT_IMPLEMENTED: 501,
        ErrorCode.DISK_FULL: 507,
        ErrorCode.STORAGE_FAILED: 503,
        ErrorCode.DATABASE_NEWER: 503,
        ErrorCode.DATABASE_CORRUPT: 503,
        ErrorCode.DATA_IN_USE: 409,
        ErrorCode.PORT_IN_USE: 409,
        ErrorCode.AGENT_NOT_RUNNING: 503,
        ErrorCode.NOT_A_MEMBER: 409,
        ErrorCode.ALREADY_MEMBER: 409,
        ErrorCode.EVICTED: 403,
        ErrorCode.JOIN_REFUSED: 403,
        ErrorCode.TOKEN_INVALID: 403,
        ErrorCode.TOKEN_EXPIRED: 410,
        ErrorCode.TOKEN_USED: 410,
        ErrorCode.PIN_MISMATCH: 502,
        ErrorCode.UNKNOWN_NODE: 404,
        ErrorCode.UNREACHABLE: 502,
        ErrorCode.INCOMPATIBLE_VERSION: 409,
        ErrorCode.FRAME_TOO_LARGE: 413,
        ErrorCode.PROTOCOL_VIOLATION: 502,
        ErrorCode.BAD_SIGNATURE: 502,
        ErrorCode.UNKNOWN_METHOD: 502,
        ErrorCode.OVERLOADED: 503,
    }
)
"""The HTTP status of each code. A test holds that no code is missing."""

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_AGENT: Final = 3
EXIT_REFUSED: Final = 4

_EXIT_CODE: Final[Mapping[ErrorCode, int]] = MappingProxyType(
    {
        ErrorCode.USAGE: EXIT_USAGE,
        ErrorCode.BAD_SETTING: EXIT_USAGE,
        ErrorCode.AGENT_NOT_RUNNING: EXIT_NO_AGENT,
        ErrorCode.UNAUTHORIZED: EXIT_REFUSED,
        ErrorCode.FORBIDDEN: EXIT_REFUSED,
        ErrorCode.MISDIRECTED: EXIT_REFUSED,
        ErrorCode.NOT_ADMIN: EXIT_REFUSED,
        ErrorCode.EVICTED: EXIT_REFUSED,
        ErrorCode.JOIN_REFUSED: EXIT_REFUSED,
        ErrorCode.TOKEN_INVALID: EXIT_REFUSED,
        ErrorCode.TOKEN_EXPIRED: EXIT_REFUSED,
        ErrorCode.TOKEN_USED: EXIT_REFUSED,
        ErrorCode.PIN_MISMATCH: EXIT_REFUSED,
    }
)


class MeshError(Exception):
    """Something that did not work, said so that the reader knows what to do next.

    `code` is from the closed set above; `message` is for people and may change between versions;
    `retryable` says whether the same call, unchanged, may succeed later; `detail` holds values a program
    may read (it must be plain JSON data and must never hold a secret).
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        retryable: bool = False,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.detail: dict[str, object] = dict(detail) if detail is not None else {}

    def __str__(self) -> str:
        return f"{self.code.value}: {self.message}"

    def __repr__(self) -> str:
        return f"MeshError({self.code!r}, {self.message!r}, retryable={self.retryable!r}, detail={self.detail!r})"


@overload
def only(error: Exception) -> Exception: ...
@overload
def only(error: BaseException) -> BaseException: ...
def only(error: BaseException) -> BaseException:
    """The one error inside groups of one, which is what a nursery makes of it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def http_status(code: ErrorCode) -> int:
    """The HTTP status that fits `code`."""
    return HTTP_STATUS[code]


def exit_code(code: ErrorCode) -> int:
    """The command line's exit code for `code`: 1 failed, 2 wrong usage, 3 no agent running, 4 refused."""
    return _EXIT_CODE.get(code, EXIT_FAILED)
