"""What a client sends, decoded: path, query and body into the types a route declared.

Its job is that bad input becomes a 400 that names the field, a large one a 413 before it is held, and a slow one
a 408. It leaves admission to the guard.
"""

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec
import trio

from meshnode.api.guard import too_large
from meshnode.api.limits import ApiLimits
from meshnode.api.render import RefusalError
from meshnode.api.routing import Route
from meshnode.kernel.errors import ErrorCode, MeshError

query_fields_max: Final = 64
query_bytes_max: Final = 8192
page_items_max: Final = 1000
cursor_chars_max: Final = 512
_AT_PATH: Final = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING: Final = re.compile(r"missing required field `(?P<name>[^`]+)`")
_UNKNOWN: Final = re.compile(r"unknown field `(?P<name>[^`]+)`")


class ClientGoneError(Exception):
    """The client closed the connection while its body was still expected."""


class BodyReader:
    """Reads one request's body, at least at the rate the limits ask for; a patient one waits."""

    def __init__(
        self, receive: Callable[[], Awaitable[Any]], limits: ApiLimits, bytes_max: int, *, is_patient: bool = False
    ) -> None:
        self._receive = receive
        self._limits = limits
        self._bytes_max = bytes_max
        self._is_patient = is_patient
        self._received = 0
        self._waited_s = 0.0
        self._finished = False

    def __aiter__(self) -> "BodyReader":
        return self

    async def __anext__(self) -> bytes:
        """The next piece of the body. Raises MeshError(TOO_LARGE | TIMEOUT), or ClientGoneError.

        Only waiting for the client counts against the deadline, not the time a handler takes in between. Not a
        generator, because a handler may stop reading in the middle.
        """
        while not self._finished:
            budget = self._limits.body_grace_s + self._received / self._limits.body_rate_min - self._waited_s
            began = trio.current_time()
            event: Any = None
            with trio.move_on_after(math.inf if self._is_patient else max(0.0, budget)):
                event = await self._receive()
            self._waited_s += trio.current_time() - began
            if event is None:
                raise RefusalError(
                    408,
                    ErrorCode.TIMEOUT,
                    "The body of the request came too slowly. Send it again on a better connection.",
                    headers={"Connection": "close"},
                    retryable=True,
                    reason="slow_body",
                )
            if event["type"] == "http.disconnect":
                raise ClientGoneError
            data: bytes = event.get("body", b"")
            self._received += len(data)
            if self._received > self._bytes_max:
                raise too_large(self._bytes_max)
            self._finished = not event.get("more_body", False)
            if data:
                return data
        raise StopAsyncIteration

    async def whole(self) -> bytes:
        """The whole body."""
        pieces = [piece async for piece in self]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@dataclass(frozen=True, slots=True)
class CommonQuery:
    """The query names every list and mesh-wide route shares."""

    local_only: bool = False
    limit: int | None = None
    cursor: str | None = None


class Decoder:
    """Decodes the query and body of one route. Made once per route, since msgspec compiles its types."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._json = msgspec.json.Decoder(route.request) if route.request is not None else None
        self._lists: frozenset[str] = frozenset()
        self._names: frozenset[str] = frozenset()
        if route.query is not None:
            fields = msgspec.structs.fields(route.query)
            self._names = frozenset(field.encode_name for field in fields)
            self._lists = frozenset(
                field.encode_name for field in fields if getattr(field.type, "__origin__", field.type) in (list, tuple)
            )

    def query(self, raw: bytes) -> tuple[Any, CommonQuery]:
        """The route's own query struct (None without one) and the shared names. Raises MeshError(BAD_REQUEST)."""
        if not raw and self._route.query is None:
            return None, CommonQuery()
        values = self._query_values(raw)
        common = self._common(values)
        if self._route.query is None:
            self._refuse_unknown(values)
            return None, common
        if not self._route.allow_unknown:
            self._refuse_unknown(values)
        try:
            return msgspec.convert(values, self._route.query, strict=False), common
        except msgspec.ValidationError as error:
            raise _bad_field(error, "query") from None

    def _query_values(self, raw: bytes) -> dict[str, Any]:
        if len(raw) > query_bytes_max:
            raise MeshError(ErrorCode.BAD_REQUEST, f"The query is longer than {query_bytes_max} bytes.")
        try:
            pairs = parse_qsl(
                raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=query_fields_max
            )
        except (UnicodeDecodeError, ValueError):
            raise MeshError(
                ErrorCode.BAD_REQUEST, f"The query is not percent-encoded UTF-8 with at most {query_fields_max} names."
            ) from None
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in self._lists:
                values.setdefault(name, []).append(value)
            elif name in values:
                raise _field_error(name, f"The query has `{name}` twice.")
            else:
                values[name] = value
        return values

    def _common(self, values: dict[str, Any]) -> CommonQuery:
        local_only, limit, cursor = False, None, None
        if self._route.mesh_wide and "scope" in values and "scope" not in self._names:
            scope = values.pop("scope")
            if scope not in {"local", "mesh"}:
                raise _field_error("scope", "The query's `scope` is either `local` or `mesh`.")
            local_only = scope == "local"
        if self._route.paginated:
            text = values.pop("limit", None) if "limit" not in self._names else None
            if text is not None:
                if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= page_items_max):
                    raise _field_error("limit", f"The query's `limit` is a number from 1 to {page_items_max}.")
                limit = int(text)
            cursor = values.pop("cursor", None) if "cursor" not in self._names else None
            if cursor is not None and len(cursor) > cursor_chars_max:
                raise _field_error("cursor", "The query's `cursor` is not one that this agent gave out.")
        return CommonQuery(local_only, limit, cursor)

    def _refuse_unknown(self, values: Mapping[str, Any]) -> None:
        if self._route.allow_unknown:
            return
        for name in values:
            if name not in self._names:
                known = sorted(
                    self._names
                    | ({"scope"} if self._route.mesh_wide else set())
                    | ({"limit", "cursor"} if self._route.paginated else set())
                )
                hint = f" It knows {', '.join(known)}." if known else " It takes none."
                raise _field_error(name, f"This path does not know the query name `{name[:64]}`.{hint}")

    def body(self, data: bytes, content_type: bytes) -> Any:
        """The JSON body as the declared type. Raises MeshError(BAD_REQUEST) naming the field, or 415."""
        if self._json is None:
            return None
        media_type = content_type.partition(b";")[0].strip().lower()
        if data and media_type != b"application/json":
            raise RefusalError(
                415,
                ErrorCode.UNSUPPORTED_MEDIA_TYPE,
                "This path takes a JSON body: send it with `Content-Type: application/json`.",
            )
        try:
            return self._json.decode(data or b"{}")
        except msgspec.ValidationError as error:
            raise _bad_field(error, "body") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MeshError(ErrorCode.BAD_REQUEST, f"The body is not valid JSON: {_plain(error)}.") from None


def _bad_field(error: msgspec.ValidationError, where: str) -> MeshError:
    text = str(error)
    at = _AT_PATH.search(text)
    path = at["path"] if at is not None else ""
    inner = _MISSING.search(text) or _UNKNOWN.search(text)
    if inner is not None:
        path = f"{path}.{inner['name']}" if path else inner["name"]
    what = text[: at.start()] if at is not None else text
    field = f" field `{path}`" if path else ""
    return MeshError(
        ErrorCode.BAD_REQUEST, f"The {where}{field}: {what[:1].lower()}{what[1:]}.", detail={"field": path or where}
    )


def _field_error(field: str, message: str) -> MeshError:
    return MeshError(ErrorCode.BAD_REQUEST, message, detail={"field": field[:64]})


def _plain(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
