"""How a subsystem says which HTTP requests it answers, and how a request finds its route.

A subsystem's `routes.py` returns a list of `Route`; a handler takes an `ApiRequest` and returns a msgspec struct,
a list of them, a `Reply`, `Content`, a `ByteStream`, an `EventStream` or None (204). Its job here is the table
and the match. It leaves admission to `api.guard` and calling the handler to `api.application`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec

from meshnode.api.callers import Caller
from meshnode.kernel.errors import ErrorCode, MeshError

path_segments_max: Final = 32
METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})

Query = TypeVar("Query")
Body = TypeVar("Body")

AsgiReceive = Callable[[], Awaitable[Any]]
AsgiSend = Callable[[Any], Awaitable[None]]
AsgiApp = Callable[[Any, AsgiReceive, AsgiSend], Awaitable[None]]


@dataclass(eq=False, slots=True)
class ApiRequest(Generic[Query, Body]):
    """One request, decoded: what a handler gets. `query` and `body` have the types the route declared."""

    method: str
    path: str
    params: Mapping[str, str]
    """The values of the path's `{names}`, percent-decoded."""
    query: Query
    body: Body
    caller: Caller
    request_id: str
    headers: Mapping[bytes, bytes]
    """Header names in lower case. What arrived twice is here once, joined by a comma."""
    local_only: bool = False
    """`?scope=local`: answer for this node alone."""
    limit: int | None = None
    cursor: str | None = None
    chunks: AsyncIterator[bytes] | None = None
    """The raw body piece by piece; only where the route asked for `raw_body`. Raises MeshError(TOO_LARGE) past the
    route's limit and (TIMEOUT) when the client sends too slowly."""

    def header(self, name: str) -> str | None:
        """A header's value, or None."""
        value = self.headers.get(name.lower().encode("latin-1"))
        return None if value is None else value.decode("latin-1")


Handler = Callable[[ApiRequest[Any, Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Reply:
    """A JSON answer with more to say than its body: status, headers, the next page, nodes not reached."""

    body: Any = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    next_cursor: str | None = None
    unreachable: Sequence[str] = ()
    """Ids of the nodes that should have been asked and could not be."""


@dataclass(frozen=True, slots=True)
class Content:
    """An answer that is not JSON, whole."""

    body: bytes
    media_type: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ByteStream:
    """An answer that is not JSON, piece by piece; `length` in bytes when known. `chunks` is closed at the end."""

    chunks: AsyncIterator[bytes]
    media_type: str
    length: int | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """An answer that takes its time and is of use to nobody else: `answer` is cancelled when the client leaves."""

    answer: Callable[[], Awaitable[Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Route:
    """One method on one path. `path` has `{name}` for one segment and, at its end only, `{name...}` for the rest."""

    method: str
    path: str
    summary: str
    handler: Handler | None = None
    asgi: AsgiApp | None = None
    """An ASGI application that answers instead of a handler, behind the same guard."""
    request: Any = None
    """The type of the JSON body; None when the route takes none."""
    query: type[msgspec.Struct] | None = None
    response: Any = None
    """The type of the answer, for the description; None for 204, `EventStream`, `Content` and so on."""
    events: Mapping[str, Any] = field(default_factory=dict)
    """For an event stream: the name of each event and the type of its data."""
    media: tuple[str, ...] = ()
    """For the description, where `response` does not tell it: the media types in which the answer may come."""
    status: int = 200
    also_status: int | None = None
    """Another status that comes with an answer of the same type."""
    public: bool = False
    """Answered without credentials. Host, Origin and every limit still hold."""
    get_changes: bool = False
    """A GET that changes something, kept for clients that know it as one: refused to every browser."""
    raw_body: bool = False
    is_patient: bool = False
    """A raw body may come as slowly as its source makes it: its sender is waited for while the connection lasts."""
    body_bytes_max: int | None = None
    streams: bool = False
    """Answers with an event stream, and so counts as a stream rather than as a request in flight."""
    paginated: bool = False
    mesh_wide: bool = False
    allow_unknown: bool = False
    """Accept unknown fields of the body and unknown query names, for foreign interfaces that demand it."""
    errors: tuple[ErrorCode, ...] = ()
    tag: str = "agent"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"{self.method} {self.path}: not a method a route can have")
        if (self.handler is None) == (self.asgi is None):
            raise ValueError(f"{self.method} {self.path}: needs a handler or an ASGI application, and not both")
        if self.get_changes and self.method != "GET":
            raise ValueError(f"{self.method} {self.path}: get_changes is for GET")
        if not self.path.startswith("/") or ("..." in self.path and not self.path.endswith("...}")):
            raise ValueError(f"{self.method} {self.path}: a rest parameter may only end a path")
        if self.request is not None and not self.allow_unknown:
            _require_closed(self.request, f"{self.method} {self.path}")

    @property
    def segments(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")[1:])

    @property
    def param_names(self) -> tuple[str, ...]:
        return tuple(part.strip("{}").removesuffix("...") for part in self.segments if part.startswith("{"))


ErrorBody = Callable[[MeshError, int, str], object]
"""Renders an error (with its HTTP status and the request's id) as the JSON body a surface's clients expect."""


@dataclass(frozen=True)
class Mount:
    """The routes of one subsystem or surface; a surface says how its clients expect errors under its prefix."""

    routes: Sequence[Route]
    prefix: str = "/"
    error_body: ErrorBody | None = None


@dataclass(slots=True)
class Match:
    """Where a request leads: a route and its parameters; or, without a route, the methods the path does have."""

    route: Route | None
    params: Mapping[str, str]
    allowed: tuple[str, ...] = ()
    error_body: ErrorBody | None = None


class _Branch:
    __slots__ = ("children", "ends", "param", "rest")

    def __init__(self) -> None:
        self.children: dict[str, _Branch] = {}
        self.param: _Branch | None = None
        self.ends: dict[str, Route] = {}
        self.rest: dict[str, Route] = {}


class Router:
    """Every route there is. Literal segments win over parameters, parameters over the rest of a path."""

    def __init__(self, mounts: Iterable[Mount]) -> None:
        self._root = _Branch()
        self._exact: dict[bytes, dict[str, Match]] = {}
        self._mounts = tuple(mounts)
        self.routes: tuple[Route, ...] = tuple(route for mount in self._mounts for route in mount.routes)
        for mount in self._mounts:
            for route in mount.routes:
                self._add(route)

    def _add(self, route: Route) -> None:
        branch = self._root
        ends: dict[str, Route] | None = None
        for segment in route.segments:
            if segment.endswith("...}"):
                ends = branch.rest
            elif segment.startswith("{"):
                branch.param = branch.param or _Branch()
                branch = branch.param
            else:
                branch = branch.children.setdefault(segment, _Branch())
        ends = branch.ends if ends is None else ends
        if route.method in ends:
            raise ValueError(f"{route.method} {route.path}: another route answers this already")
        ends[route.method] = route
        if not route.param_names:
            match = Match(route, {}, error_body=self._error_body(route.path))
            self._exact.setdefault(route.path.encode("ascii"), {})[route.method] = match

    def resolve(self, method: str, raw_path: bytes) -> Match:
        """Find the route of a request. `raw_path` is as it arrived, percent-encoded; HEAD is answered as GET.

        Raises MeshError(BAD_REQUEST) for a path that is not one: not absolute, too many segments, not UTF-8, or
        with control characters in it.
        """
        wanted = "GET" if method == "HEAD" else method
        exact = self._exact.get(raw_path)
        if exact is not None and wanted in exact and not (method == "HEAD" and _changes(exact[wanted].route)):
            return exact[wanted]
        segments = _segments(raw_path)
        error_body = self._error_body("/" + "/".join(segments))
        found = _walk(self._root, segments, 0, [])
        if found is None:
            return Match(None, {}, error_body=error_body)
        ends, values = found
        route = ends.get(wanted)
        if route is None or (method == "HEAD" and _changes(route)):
            allowed = {"OPTIONS", *ends} | ({"HEAD"} if "GET" in ends and not _changes(ends["GET"]) else set())
            return Match(None, {}, tuple(sorted(allowed)), error_body)
        return Match(route, dict(zip(route.param_names, values, strict=True)), error_body=error_body)

    def _error_body(self, path: str) -> ErrorBody | None:
        best: Mount | None = None
        for mount in self._mounts:
            inside = path == mount.prefix or path.startswith(mount.prefix.rstrip("/") + "/")
            if mount.error_body is not None and inside and (best is None or len(mount.prefix) > len(best.prefix)):
                best = mount
        return None if best is None else best.error_body


def _changes(route: Route | None) -> bool:
    return route is not None and route.get_changes


def _walk(
    branch: _Branch, segments: list[str], at: int, values: list[str]
) -> tuple[dict[str, Route], list[str]] | None:
    if at == len(segments):
        return (branch.ends, values) if branch.ends else None
    child = branch.children.get(segments[at])
    found = _walk(child, segments, at + 1, values) if child is not None else None
    if found is None and branch.param is not None and segments[at]:
        found = _walk(branch.param, segments, at + 1, [*values, segments[at]])
    if found is None and branch.rest:
        return branch.rest, [*values, "/".join(segments[at:])]
    return found


def _segments(raw_path: bytes) -> list[str]:
    if not raw_path.startswith(b"/"):
        raise MeshError(ErrorCode.BAD_REQUEST, "The request's target must be a path that begins with a slash.")
    parts = raw_path[1:].split(b"/")
    if len(parts) > path_segments_max:
        raise MeshError(ErrorCode.BAD_REQUEST, f"The path has more than {path_segments_max} segments.")
    segments = []
    for part in parts:
        try:
            segment = (unquote_to_bytes(part) if b"%" in part else part).decode("utf-8")
        except UnicodeDecodeError:
            raise MeshError(ErrorCode.BAD_REQUEST, "The path is not percent-encoded UTF-8.") from None
        if not segment.isprintable():
            raise MeshError(ErrorCode.BAD_REQUEST, "The path contains characters that are not printable.")
        segments.append(segment)
    return segments


def _require_closed(body: Any, where: str) -> None:
    """A body that accepts unknown fields hides a caller's typing errors: refuse to mount it."""
    if isinstance(body, type) and issubclass(body, msgspec.Struct) and not body.__struct_config__.forbid_unknown_fields:
        raise ValueError(f"{where}: {body.__name__} must be declared with forbid_unknown_fields=True")
