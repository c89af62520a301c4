"""Who and what gets in: every check a request passes before anything of it is acted on.

Its job is to admit a request or to refuse it with an error that says why. It reads headers only, never a body,
and changes nothing but its own counters. Order matters: what protects a user's browser (Host, Origin) comes
before credentials, because in that attack the credentials are the user's own.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from meshnode.api.callers import ApiToken, BrowserSessions, Caller
from meshnode.api.limits import ApiLimits
from meshnode.api.peer import Peer
from meshnode.api.rate import TokenBuckets
from meshnode.api.render import RefusalError
from meshnode.api.routing import Match
from meshnode.kernel.errors import ErrorCode, MeshError

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_BODY_TYPES: Final = frozenset({b"application/json", b"multipart/form-data", b"application/octet-stream"})
_PROXY_HEADERS: Final = (b"forwarded", b"x-forwarded-for", b"via")
_BROWSER_HEADERS: Final = frozenset({b"origin", b"cookie", b"referer", b"accept-language"})
"""What browsers say and programs do not; older ones say no more than the language, where the page wills it so."""
_ALLOWED_BY_CORS: Final = "Authorization, Content-Type, Last-Event-ID"


@dataclass(frozen=True)
class Access:
    """The settings that say who may call."""

    require_token: bool = False
    """Ask the agent's own user for the token too."""
    allowed_origins: frozenset[str] = frozenset()
    """Origins of web clients elsewhere that may call from a browser."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the guard looks at: the request's line, its headers (names in lower case) and the connection's peer."""

    method: str
    headers: Mapping[bytes, bytes]
    repeated: frozenset[bytes]
    """Names of headers that came more than once."""
    peer: Peer


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that got in: whose it is, and the origin that must be named in the answer, if any."""

    caller: Caller
    cors_origin: bytes | None


class Guard:
    """Admits requests. One per server; `port` is the port that it listens on."""

    def __init__(
        self,
        access: Access,
        limits: ApiLimits,
        port: int,
        token: ApiToken,
        sessions: BrowserSessions,
        clock: Callable[[], float],
        own_uid: int | None = None,
    ) -> None:
        self._access = access
        self._limits = limits
        self._token = token
        self._sessions = sessions
        self._clock = clock
        self._own_uid = own_uid if own_uid is not None else _own_uid()
        names = [b"127.0.0.1", b"localhost", b"[::1]"]
        self._hosts = frozenset([b"%s:%d" % (name, port) for name in names] + (names if port == 80 else []))
        self._own_origins = frozenset(b"http://" + host for host in self._hosts)
        self._foreign_origins = frozenset(origin.encode("ascii") for origin in access.allowed_origins)
        self._rate = TokenBuckets(limits.rate_per_s, limits.rate_burst)
        self._refused = TokenBuckets(limits.refused_rate_per_s, limits.refused_burst)

    def admit(self, asked: Asked, match: Match) -> Admission:
        """Let a request in, or raise the error that refuses it."""
        self.check_host(asked)
        cors_origin = self.check_origin(asked, match)
        caller = self.identify(asked, match)
        self.check_rate(caller)
        self.check_body(asked, match)
        return Admission(caller, cors_origin)

    def check_host(self, asked: Asked) -> None:
        """Exactly our own names. Anything else means that a name of somebody else's leads here (DNS rebinding)."""
        if b"host" in asked.repeated or asked.headers.get(b"host", b"") not in self._hosts:
            raise RefusalError(
                421,
                ErrorCode.MISDIRECTED,
                "The Host header does not name this agent. Call it as http://127.0.0.1:PORT, http://localhost:PORT "
                "or http://[::1]:PORT, with its own port.",
                reason="host",
            )

    def check_origin(self, asked: Asked, match: Match) -> bytes | None:
        """No request that another site's page made. Returns an allowed foreign origin to name in the answer."""
        origin = asked.headers.get(b"origin")
        invited = origin is not None and b"origin" not in asked.repeated and origin in self._foreign_origins
        if origin is not None and not invited and (b"origin" in asked.repeated or origin not in self._own_origins):
            raise _forbidden("origin", "Requests made by another site's page are refused (Origin header).")
        site = asked.headers.get(b"sec-fetch-site", b"none")
        if (
            not invited
            and site not in {b"same-origin", b"none"}
            and not (site == b"same-site" and asked.method in SAFE_METHODS)
        ):
            raise _forbidden("fetch_site", "Requests made by another site's page are refused (Sec-Fetch-Site header).")
        if match.route is not None and match.route.get_changes and _from_browser(asked):
            raise _forbidden(
                "browser_get",
                "A browser may not use GET for this; use POST. (Programs: leave out Referer and Accept-Language.)",
            )
        if asked.headers.get(b"upgrade", b"").lower() == b"websocket":
            raise RefusalError(
                501,
                ErrorCode.NOT_IMPLEMENTED,
                "This agent has no WebSockets. Use the event streams (GET /api/events) instead.",
                headers={"Connection": "close"},
                reason="websocket",
            )
        return origin if invited else None

    def identify(self, asked: Asked, match: Match) -> Caller:
        """Who is calling; raises 401 when nothing says who, 429 when that was tried too often."""
        peer = asked.peer
        if not self._access.require_token and self._is_own(asked):
            return Caller("user", peer.uid)
        now, key = self._clock(), peer.uid
        authorization = asked.headers.get(b"authorization", b"")
        cookie = asked.headers.get(b"cookie")
        if (authorization or cookie is not None) and self._refused.empty(key, now):
            # Before anything is compared: guessing must not go faster for guessing more.
            raise _too_often(self._refused.take(key, now), "too many wrong credentials")
        scheme, _, offered = authorization.partition(b" ")
        if scheme.lower() == b"bearer" and self._token.matches(offered.strip().decode("latin-1")):
            return Caller("token", peer.uid)
        if cookie is not None and self._sessions.holds(cookie.decode("latin-1")):
            return Caller("session", peer.uid)
        if match.route is not None and match.route.public:
            return Caller("public", peer.uid)
        wait = self._refused.take(key, now)
        if wait > 0:
            raise _too_often(wait, "too many requests without valid credentials")
        raise RefusalError(
            401,
            ErrorCode.UNAUTHORIZED,
            "This agent belongs to another user, or asks everybody for its token. Send `Authorization: Bearer TOKEN`; "
            "`meshnode token` prints it to the agent's own user. Other users' commands take it from --token-file or "
            "MESHNODE_TOKEN. A browser is let in by the link that POST /api/session/link makes for who has the token.",
            headers={"WWW-Authenticate": 'Bearer realm="meshnode"'},
            # Nobody but the own user gets to know where the agent's files are.
            detail={"token_file": self._token.path} if self._token.path and self._is_own(asked) else None,
        )

    def check_rate(self, caller: Caller) -> None:
        """Not more often than anybody needs."""
        wait = self._rate.take((caller.kind, caller.uid), self._clock())
        if wait > 0:
            raise _too_often(wait, "too many requests")

    def check_body(self, asked: Asked, match: Match) -> None:
        """A body of a kind no plain form can send, and not too large, by what the headers say."""
        length = asked.headers.get(b"content-length")
        if asked.method in SAFE_METHODS or (b"transfer-encoding" not in asked.headers and length in {None, b"0"}):
            return
        media_type = asked.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type not in _BODY_TYPES:
            raise RefusalError(
                415,
                ErrorCode.UNSUPPORTED_MEDIA_TYPE,
                "Send the body as application/json, multipart/form-data or application/octet-stream, and say so in "
                "the Content-Type header.",
            )
        limit = body_limit(match, self._limits)
        if length is not None and (not length.isdigit() or len(length) > 18 or int(length) > limit):
            raise too_large(limit)

    def _is_own(self, asked: Asked) -> bool:
        uid = asked.peer.uid
        if uid is None or self._own_uid is None or uid not in {0, self._own_uid}:
            return False
        # A proxy's socket says who runs the proxy, not who calls through it.
        return not any(name in asked.headers for name in _PROXY_HEADERS)


def body_limit(match: Match, limits: ApiLimits) -> int:
    """How many bytes a body of this route may have."""
    if match.route is None or match.route.body_bytes_max is None:
        return limits.body_bytes_max
    return match.route.body_bytes_max


def too_large(limit: int) -> MeshError:
    return RefusalError(
        413,
        ErrorCode.TOO_LARGE,
        f"The body is larger than the {limit} bytes this path accepts. Send less at once.",
        headers={"Connection": "close"},
        detail={"bytes_max": limit},
    )


def cors_headers(origin: bytes) -> list[tuple[bytes, bytes]]:
    """What an answer to a web client elsewhere needs to be readable there. Cookies are never allowed along."""
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", b"X-Request-Id, Link, Meshnode-Unreachable, Retry-After"),
        (b"vary", b"Origin"),
    ]


def preflight_headers(methods: str) -> dict[str, str]:
    """What a browser asks before a request from an allowed origin."""
    return {
        "Access-Control-Allow-Methods": methods,
        "Access-Control-Allow-Headers": _ALLOWED_BY_CORS,
        "Access-Control-Max-Age": "600",
    }


def _from_browser(asked: Asked) -> bool:
    return any(name in _BROWSER_HEADERS or name.startswith(b"sec-fetch-") for name in asked.headers)


def _forbidden(reason: str, message: str) -> RefusalError:
    hint = " Add the origin to `api.allowed_origins` if you run a web client there." if reason == "origin" else ""
    return RefusalError(403, ErrorCode.FORBIDDEN, message + hint, reason=reason)


def _too_often(wait_s: float, what: str) -> RefusalError:
    return RefusalError(
        429,
        ErrorCode.RATE_LIMITED,
        f"Refused: {what}. Try again in {max(1, math.ceil(wait_s))} s.",
        headers={"Retry-After": str(max(1, math.ceil(wait_s)))},
        retryable=True,
    )


def _own_uid() -> int | None:
    if sys.platform == "win32":
        return None
    import os

    return os.getuid()
