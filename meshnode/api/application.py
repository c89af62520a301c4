"""The ASGI application of the local API: guard, route, handler, answer.

Its job is the path of one request through the house, and that whatever happens on it becomes one answer with one
request id. It is the HTTP boundary: the one place in the API that catches everything.

Routes are called straight from here. Quart answers only what `api.pages` mounts: its own dispatch costs more than
the rest of a small request together.
"""

import itertools
import secrets
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, Final, cast
from urllib.parse import parse_qsl, urlencode

import trio

from meshnode.api.bodies import BodyReader, ClientGoneError, Decoder
from meshnode.api.guard import SAFE_METHODS, Admission, Asked, Guard, body_limit, cors_headers, preflight_headers
from meshnode.api.limits import ApiLimits
from meshnode.api.peer import Peer
from meshnode.api.render import (
    JSON,
    PAGE_POLICY,
    Headers,
    RefusalError,
    encode,
    error_status,
    head,
    internal_error,
    native_error_body,
    text_headers,
)
from meshnode.api.routing import (
    ApiRequest,
    AsgiReceive,
    AsgiSend,
    ByteStream,
    Content,
    Match,
    Reply,
    Route,
    Router,
    Work,
)
from meshnode.api.sse import EventStream, OpenStreams, StreamPump
from meshnode.kernel.errors import ErrorCode, MeshError, only
from meshnode.kernel.logs import LOG_CONTEXT, Logger
from meshnode.kernel.metrics import Metrics

UNKNOWN_PEER: Final = Peer(None)
_CLIENT_GONE_STATUS: Final = 499
"""What the log shows for a request whose client left before the answer; it is never sent."""


class _TooSlowReaderError(Exception):
    """An HTTP/2 client gave no room for more of the answer in time."""


class Exchange:
    """One request and its answer as they pass through: what is known of it, and whether the head has left."""

    __slots__ = ("asked", "cors_origin", "match", "request_id", "scope", "send", "started_at", "status")

    def __init__(self, scope: Any, send: AsgiSend, request_id: str, started_at: float) -> None:
        headers: dict[bytes, bytes] = {}
        repeated: set[bytes] = set()
        for name, value in scope["headers"]:
            key = name.lower()
            if key in headers:
                repeated.add(key)
                # Cookies of HTTP/2 come in several headers, joined like this (RFC 9113, 8.2.3).
                headers[key] += (b"; " if key == b"cookie" else b", ") + value
            else:
                headers[key] = value
        self.scope = scope
        self.send = send
        self.request_id = request_id
        self.started_at = started_at
        self.status = 0
        self.cors_origin: bytes | None = None
        self.match = Match(None, {})
        peer = (scope.get("state") or {}).get("peer", UNKNOWN_PEER)
        self.asked = Asked(scope["method"], headers, frozenset(repeated), peer)


class ApiApplication:
    """Answers the requests of one server. Constructed once; holds no state of any request."""

    def __init__(
        self,
        router: Router,
        guard: Guard,
        limits: ApiLimits,
        streams: OpenStreams,
        metrics: Metrics,
        log: Logger,
        clock: Callable[[], float] = trio.current_time,
        *,
        log_requests: bool = False,
    ) -> None:
        self._router = router
        self._guard = guard
        self._limits = limits
        self._streams = streams
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._decoders = {route: Decoder(route) for route in router.routes if route.handler is not None}
        self._log_requests = log_requests
        self._in_flight = 0
        boot = secrets.token_hex(4)
        self._ids = (f"{boot}-{number:x}" for number in itertools.count(1))
        metrics.track("meshnode_api_streams_open", lambda: float(streams.count))

    async def __call__(self, scope: Any, receive: AsgiReceive, send: AsgiSend) -> None:
        """ASGI. HTTP only: a WebSocket or lifespan scope is left unanswered, which the server takes as refusal."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, send, next(self._ids), self._clock())
        restore = LOG_CONTEXT.set({"request_id": exchange.request_id})
        try:
            await self._answer(exchange, receive)
        except Exception as error:  # noqa: BLE001 -- the HTTP boundary
            cause = only(error)
            if isinstance(cause, ClientGoneError | _TooSlowReaderError):
                # Nobody is there to be told.
                exchange.status = exchange.status or _CLIENT_GONE_STATUS
            else:
                await self._answer_error(exchange, self.as_mesh_error(cause))
        finally:
            LOG_CONTEXT.reset(restore)
            self._record(exchange)

    def as_mesh_error(self, error: Exception) -> MeshError:
        """An error as it may be told. One we did not expect is logged with its traceback and told as `internal`."""
        if isinstance(error, MeshError):
            return error
        self._metrics.count("fabric_panics_total")
        context = LOG_CONTEXT.get() or {}
        self._log.error("unexpected error while answering", exc_info=error)
        return internal_error(context.get("request_id", "unknown"))

    async def _answer(self, exchange: Exchange, receive: AsgiReceive) -> None:
        asked, guard = exchange.asked, self._guard
        # Host and Origin first: until they are right, nothing about the path is said either.
        guard.check_host(asked)
        bad_path: MeshError | None = None
        try:
            exchange.match = self._router.resolve(asked.method, exchange.scope["raw_path"])
        except MeshError as error:
            bad_path = error
        if asked.method == "OPTIONS":
            exchange.cors_origin = guard.check_origin(asked, exchange.match)
            await self._answer_options(exchange)
            return
        admission = guard.admit(asked, exchange.match)
        exchange.cors_origin = admission.cors_origin
        route = exchange.match.route
        if bad_path is not None:
            raise bad_path
        if route is None:
            raise _no_route(exchange)
        limit = self._limits.streams_max if route.streams else self._limits.requests_max
        if (self._streams.count if route.streams else self._in_flight) >= limit:
            raise RefusalError(
                503,
                ErrorCode.UNAVAILABLE,
                "The agent is answering as many requests as it allows at once. Try again in a moment.",
                headers={"Retry-After": "1"},
                retryable=True,
                reason="busy",
            )
        if route.streams:
            await self._handle(exchange, route, admission, receive)
            return
        self._in_flight += 1
        try:
            await self._handle(exchange, route, admission, receive)
        finally:
            self._in_flight -= 1

    async def _handle(self, exchange: Exchange, route: Route, admission: Admission, receive: AsgiReceive) -> None:
        if route.asgi is not None:
            await route.asgi(exchange.scope, receive, self._page_send(exchange))
            return
        request = await self._decoded(exchange, route, admission, receive)
        assert route.handler is not None
        result = await route.handler(request)
        if isinstance(result, Work):
            result = await self._worked(result, receive)
        match result:
            case EventStream():
                await self._answer_stream(exchange, result, receive)
            case Content():
                extra = [(b"content-type", result.media_type.encode("ascii")), *text_headers(result.headers)]
                await self._send_whole(exchange, result.status, result.body, extra)
            case ByteStream():
                await self._answer_bytes(exchange, result)
            case Reply():
                extra = text_headers(result.headers)
                if result.next_cursor is not None:
                    extra.append((b"link", _next_link(exchange, result.next_cursor)))
                if result.unreachable:
                    extra += text_headers({"Meshnode-Unreachable": ", ".join(result.unreachable)})
                status = result.status or route.status
                await self._send_json(exchange, status, result.body, extra)
            case _:
                await self._send_json(exchange, route.status, result, ())

    async def _worked(self, work: Work, receive: AsgiReceive) -> Any:
        """What the work comes to. Raises ClientGoneError when the client left before."""
        result: Any = None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            result = await work.answer()
            nursery.cancel_scope.cancel()
        if gone and result is None:
            raise ClientGoneError
        return result

    async def _decoded(
        self, exchange: Exchange, route: Route, admission: Admission, receive: AsgiReceive
    ) -> ApiRequest[Any, Any]:
        decoder = self._decoders[route]
        headers = exchange.asked.headers
        query, common = decoder.query(exchange.scope["query_string"])
        reader: BodyReader | None = None
        body = None
        if route.raw_body or route.request is not None:
            limit = body_limit(exchange.match, self._limits)
            reader = BodyReader(receive, self._limits, limit, is_patient=route.is_patient)
            if not route.raw_body:
                body = decoder.body(await reader.whole(), headers.get(b"content-type", b""))
        return ApiRequest(
            method=exchange.asked.method,
            path=exchange.scope["path"],
            params=exchange.match.params,
            query=query,
            body=body,
            caller=admission.caller,
            request_id=exchange.request_id,
            headers=headers,
            local_only=common.local_only,
            limit=common.limit,
            cursor=common.cursor,
            chunks=reader if route.raw_body else None,
        )

    async def _answer_options(self, exchange: Exchange) -> None:
        allowed = exchange.match.allowed
        if not allowed:
            raise _no_route(exchange)
        methods = ", ".join(allowed)
        extra = {"Allow": methods}
        if exchange.cors_origin is not None:
            extra |= preflight_headers(methods)
        await self._send_whole(exchange, 204, b"", text_headers(extra))

    async def _answer_error(self, exchange: Exchange, error: MeshError) -> None:
        if exchange.status:
            # The head has left: all that can be done is to end early, which the client sees as a broken answer.
            raise error
        status = error_status(error)
        extra = [JSON, *text_headers(error.headers)] if isinstance(error, RefusalError) else [JSON]
        if isinstance(error, RefusalError):
            self._metrics.count("meshnode_api_refused_total", reason=error.reason)
        render = exchange.match.error_body or native_error_body
        try:
            await self._send_whole(exchange, status, encode(render(error, status, exchange.request_id)), extra)
        except _TooSlowReaderError:
            return

    async def _answer_stream(self, exchange: Exchange, stream: EventStream, receive: AsgiReceive) -> None:
        if exchange.asked.method == "HEAD":
            await stream.source.aclose()
            await self._send_whole(exchange, 200, b"", [(b"content-type", stream.media_type.encode("ascii"))])
            return
        pump = StreamPump(stream, self._streams, self._limits, self.as_mesh_error)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.produce)
            # What can be done before the first piece is there would delay it afterwards.
            nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
            extra = [
                (b"content-type", stream.media_type.encode("ascii")),
                (b"x-accel-buffering", b"no"),
                *text_headers(stream.headers),
            ]
            if not await pump.begun() and pump.failure is not None:
                raise pump.failure
            await self._start(exchange, 200, extra)
            while piece := await pump.next_piece():
                await self._send_part(exchange, piece, more=True)
            await self._send_part(exchange, b"", more=False)
            nursery.cancel_scope.cancel()
        if not exchange.status:
            raise ClientGoneError

    async def _answer_bytes(self, exchange: Exchange, stream: ByteStream) -> None:
        extra = [(b"content-type", stream.media_type.encode("ascii")), *text_headers(stream.headers)]
        if stream.length is not None:
            extra.append((b"content-length", b"%d" % stream.length))
        async with AsyncExitStack() as closing:
            if hasattr(stream.chunks, "aclose"):
                await closing.enter_async_context(aclosing(cast(Any, stream.chunks)))
            await self._start(exchange, stream.status, extra)
            if exchange.asked.method != "HEAD":
                async for piece in stream.chunks:
                    await self._send_part(exchange, piece, more=True)
            await self._send_part(exchange, b"", more=False)

    async def _send_json(
        self, exchange: Exchange, status: int, value: Any, extra: Sequence[tuple[bytes, bytes]]
    ) -> None:
        if value is None:
            await self._send_whole(exchange, 204 if status == 200 else status, b"", extra)
        else:
            await self._send_whole(exchange, status, encode(value), [JSON, *extra])

    async def _send_whole(
        self, exchange: Exchange, status: int, body: bytes, extra: Sequence[tuple[bytes, bytes]]
    ) -> None:
        length = [] if status == 204 else [(b"content-length", b"%d" % len(body))]
        await self._start(exchange, status, [*extra, *length])
        await self._send_part(exchange, body, more=False)

    async def _start(self, exchange: Exchange, status: int, extra: Sequence[tuple[bytes, bytes]]) -> None:
        headers = head(exchange.request_id, extra=extra)
        if exchange.cors_origin is not None:
            headers += cors_headers(exchange.cors_origin)
        exchange.status = status
        await exchange.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_part(self, exchange: Exchange, body: bytes, *, more: bool) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": more}
        if exchange.scope["http_version"] != "2":
            # On HTTP/1.1 the connection itself has a deadline on what it sends.
            await exchange.send(message)
            return
        piece_max = self._limits.send_piece_bytes_max
        for start in range(0, max(1, len(body)), piece_max):
            last = start + piece_max >= len(body)
            part = {**message, "body": body[start : start + piece_max], "more_body": more or not last}
            with trio.move_on_after(self._limits.send_deadline_s) as sending:
                await exchange.send(part)
            if sending.cancelled_caught:
                self._metrics.count("meshnode_api_connections_cut_total", reason="slow_reader")
                raise _TooSlowReaderError

    def _page_send(self, exchange: Exchange) -> AsgiSend:
        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                ours = head(exchange.request_id, policy=PAGE_POLICY)
                names = {name for name, _ in ours}
                theirs: Headers = [(n, v) for n, v in message["headers"] if n.lower() not in names]
                message = {**message, "headers": ours + theirs}
            await exchange.send(message)

        return send

    def _record(self, exchange: Exchange) -> None:
        status, method = exchange.status, exchange.asked.method
        took_s = self._clock() - exchange.started_at
        self._metrics.count("meshnode_api_requests_total", status=str(status))
        if exchange.match.route is None or not exchange.match.route.streams:
            self._metrics.observe("meshnode_api_request_seconds", took_s)
        quiet = status < 400 and method in SAFE_METHODS and not self._log_requests
        tell = self._log.debug if quiet else self._log.info
        tell(
            "request",
            request_id=exchange.request_id,
            method=method,
            path=exchange.scope["path"],
            status=status,
            uid=exchange.asked.peer.uid,
            took_ms=round(took_s * 1000, 2),
        )


def _no_route(exchange: Exchange) -> MeshError:
    path, allowed = exchange.scope["path"][:128], exchange.match.allowed
    if allowed:
        methods = ", ".join(allowed)
        return RefusalError(
            405,
            ErrorCode.METHOD_NOT_ALLOWED,
            f"{exchange.asked.method} is not possible here; this path has {methods}.",
            headers={"Allow": methods},
        )
    return MeshError(ErrorCode.NOT_FOUND, f"There is nothing at {path}. GET /openapi.json lists every path.")


def _next_link(exchange: Exchange, cursor: str) -> bytes:
    kept = [pair for pair in parse_qsl(exchange.scope["query_string"].decode("ascii")) if pair[0] != "cursor"]
    query = urlencode([*kept, ("cursor", cursor)])
    return b'<%s?%s>; rel="next"' % (exchange.scope["raw_path"], query.encode("ascii"))


async def _cancel_when_gone(receive: AsgiReceive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
