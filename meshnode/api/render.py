"""Answers as bytes: JSON without what is absent, errors in one form, and the headers every answer has.

Its job is bytes and headers only. Sending them is `api.application`'s.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from meshnode.kernel.errors import ErrorCode, MeshError, http_status

Headers = list[tuple[bytes, bytes]]

JSON: Final = (b"content-type", b"application/json")
PAGE_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    b"connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_FIXED: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_DATA_POLICY: Final = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_NO_STORE: Final = (b"cache-control", b"no-store")
_encoder: Final = msgspec.json.Encoder()
_NULL: Final = b"null"


class RefusalError(MeshError):
    """A MeshError that knows its HTTP status and headers, for what only HTTP has a word for."""

    def __init__(
        self,
        status: int,
        code: ErrorCode,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        retryable: bool = False,
        detail: Mapping[str, object] | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(code, message, retryable=retryable, detail=detail)
        self.status = status
        self.headers = dict(headers or {})
        self.reason = reason or code.value


def encode(value: Any) -> bytes:
    """JSON of structs, lists and plain values. A struct's field that is None is left out; a None inside a map or
    list is data of the caller's and stays.
    """
    encoded = _encoder.encode(value)
    # Most answers hold no null at all, and looking is far cheaper than walking.
    return _encoder.encode(_without_none(value)) if _NULL in encoded else encoded


def _without_none(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        fields = {
            name: _without_none(inner)
            for attribute, name in zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True)
            if (inner := getattr(value, attribute)) is not None and inner is not msgspec.UNSET
        }
        return {config.tag_field: config.tag, **fields} if config.tag_field is not None else fields
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value


class ErrorAnswer(msgspec.Struct, frozen=True):
    """Every error of the native API."""

    error: str
    code: str
    retryable: bool
    detail: dict[str, Any] | None = None


def error_status(error: MeshError) -> int:
    """The HTTP status of an error."""
    return error.status if isinstance(error, RefusalError) else http_status(error.code)


def native_error_body(error: MeshError, _status: int, _request_id: str) -> object:
    """An error as the native API says it."""
    return ErrorAnswer(error.message, error.code.value, error.retryable, error.detail or None)


def internal_error(request_id: str) -> MeshError:
    """What a caller is told of a fault of ours: that it is one, and where to look. Never what it was."""
    return MeshError(
        ErrorCode.INTERNAL,
        f"Something went wrong inside this agent. Its log says more under request id {request_id} "
        "(`meshnode logs`); please report it if it happens again.",
        detail={"request_id": request_id},
    )


def head(
    request_id: str, *, extra: Iterable[tuple[bytes, bytes]] = (), policy: bytes | None = None, store: bool = False
) -> Headers:
    """The headers every answer has, and `extra`. `policy` is the Content-Security-Policy of a page."""
    headers: Headers = [(b"x-request-id", request_id.encode("ascii")), *_FIXED]
    headers.append(_DATA_POLICY if policy is None else (b"content-security-policy", policy))
    if not store:
        headers.append(_NO_STORE)
    headers.extend(extra)
    return headers


def text_headers(headers: Mapping[str, str]) -> Headers:
    """Headers given as text, as bytes. What a header may not hold is replaced, so that no value can end a line."""
    return [
        (
            name.lower().encode("ascii"),
            "".join(c if c.isprintable() else "?" for c in value).encode("latin-1", "replace"),
        )
        for name, value in headers.items()
    ]
