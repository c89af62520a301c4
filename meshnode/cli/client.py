"""Asks the agent of this machine through its local API.

Its job: one HTTP connection by the standard library alone (a command must answer in a quarter of a second), errors as
MeshError with the agent's own words, and care for secrets: the token and join URLs go to nobody but the agent's user.
Where the agent is, `session` finds out; what answers look like, `render` knows.
"""

import contextlib
import http.client
import json
import os
import select
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from meshnode.cli.frames import ServerEvent, read_events
from meshnode.kernel.errors import ErrorCode, MeshError

HOST: Final = "127.0.0.1"
ANSWER_TIMEOUT_S: Final = 15.0
STREAM_SILENCE_MAX_S: Final = 60.0
ANSWER_BYTES_MAX: Final = 256 * 1024 * 1024
PAGES_MAX: Final = 1_000
PAGE_ITEMS: Final = 500
_TOKEN_BYTES_MAX: Final = 256
_LISTENER_TIMEOUT_S: Final = 1.0

_CODE_OF_STATUS: Final = {
    400: ErrorCode.BAD_REQUEST,
    401: ErrorCode.UNAUTHORIZED,
    403: ErrorCode.FORBIDDEN,
    404: ErrorCode.NOT_FOUND,
    409: ErrorCode.CONFLICT,
    421: ErrorCode.MISDIRECTED,
    429: ErrorCode.RATE_LIMITED,
    503: ErrorCode.UNAVAILABLE,
    504: ErrorCode.TIMEOUT,
}


class AgentClient:
    """One connection to the agent. Every method raises MeshError: AGENT_NOT_RUNNING (with `how_to_start` in its
    message), TIMEOUT, UNAVAILABLE, or the agent's own error.
    """

    def __init__(
        self,
        port: int,
        *,
        token_path: Path,
        token: str | None = None,
        how_to_start: str = "`meshnode up`",
        peer_uid: Callable[[Any], int | None] | None = None,
    ) -> None:
        """`token`: what the caller brought along for an agent of another user, whom they thereby trust; without it
        the own user's file is read once the agent asks for a token, where the agent says it is or at `token_path`.
        `peer_uid` tells the user at the other end of a connected socket; None: the kernel is asked.
        """
        self._port = port
        self._token_path = token_path
        self._given_token = token
        self._how_to_start = how_to_start
        self._peer_uid = peer_uid or _peer_uid
        self._connection: http.client.HTTPConnection | None = None
        self._authorization: str | None = None

    def get(self, path: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """The decoded JSON of an answer; None for 204."""
        return _decoded(*self._ask("GET", path, None, timeout_s))

    def get_text(self, path: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
        """An answer that is no JSON."""
        return self._ask("GET", path, None, timeout_s)[1].decode("utf-8", "replace")

    def get_any_status(self, path: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """The JSON of an answer that may be an error in form but is an answer in content, such as health."""
        return _decoded(*self._exchange("GET", path, None, timeout_s))

    def pages(self, path: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> list[Any]:
        """A whole list, page by page."""
        found: list[Any] = []
        following: str | None = f"{path}{'&' if '?' in path else '?'}limit={PAGE_ITEMS}"
        for _ in range(PAGES_MAX):
            if following is None:
                break
            response, body = self._ask("GET", following, None, timeout_s)
            found.extend(_decoded(response, body))
            following = _next_page(response.getheader("Link"))
        return found

    def post(self, path: str, body: Any, *, timeout_s: float = ANSWER_TIMEOUT_S, secret: bool = False) -> Any:
        """Send JSON. With `secret` nothing is sent before it is certain that our user's agent would read it."""
        if secret:
            self.check_owner()
        return _decoded(*self._ask("POST", path, body, timeout_s))

    def upload(self, path: str, pieces: Iterable[bytes], *, ask_first: str, timeout_s: float) -> Any:
        """Send bytes of any length as they come; the answer's JSON. `ask_first`: a path that needs the same rights, for
        what was sent cannot be sent again. `timeout_s`: for the answer once all is sent.
        """
        self._ask("GET", ask_first, None, ANSWER_TIMEOUT_S)
        sock = self._connected(timeout_s).sock

        def sent() -> Iterator[bytes]:
            for piece in pieces:
                if select.select([sock], [], [], 0)[0]:
                    raise BrokenPipeError  # an answer before the end is a refusal
                yield piece

        response = self._send_once("POST", path, sent(), timeout_s, {"Content-Type": "application/octet-stream"})
        try:
            raw = response.read(ANSWER_BYTES_MAX)
        except (OSError, http.client.HTTPException) as error:
            raise self._trouble(error, timeout_s) from error
        if response.status >= 400:
            self.close()
            raise _error_of(response, raw)
        return _decoded(response, raw)

    def put(self, path: str, body: Any, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Replace what is at `path`; the answer's JSON."""
        return _decoded(*self._ask("PUT", path, body, timeout_s))

    def patch(self, path: str, body: Any, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Send JSON that changes what is at `path`."""
        return _decoded(*self._ask("PATCH", path, body, timeout_s))

    def delete(self, path: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Delete what is at `path`."""
        return _decoded(*self._ask("DELETE", path, None, timeout_s))

    def events(self, path: str, *, after: str = "") -> Generator[ServerEvent, None, None]:
        """Server-sent events as they come, heartbeats included (name "", no data). Ends when the agent stops.

        `after`: the id of the last event that was seen, to go on from there.
        """
        return self._stream("GET", path, None, after)

    def post_events(self, path: str, body: Any) -> Generator[ServerEvent, None, None]:
        """The events that a request is answered with. Closing the generator tells the agent to stop."""
        return self._stream("POST", path, body)

    def _stream(self, method: str, path: str, body: Any, after: str = "") -> Generator[ServerEvent, None, None]:
        response = self._send(method, path, body, STREAM_SILENCE_MAX_S, {"Last-Event-ID": after} if after else {})
        if response.status != 200:
            raise _error_of(response, response.read(ANSWER_BYTES_MAX))
        try:
            yield from read_events(response)
        except (OSError, http.client.HTTPException) as error:
            raise self._trouble(error, STREAM_SILENCE_MAX_S) from error
        finally:
            self.close()

    def check_owner(self) -> None:
        """Raise MeshError(FORBIDDEN) if another user's process holds the agent's port.

        While an agent is down, anybody on this machine can listen on its port and wait for secrets. The answer to a
        harmless question makes sure that the connection was accepted: only then does the kernel know by whom.
        """
        if sys.platform != "linux" or self._given_token is not None:
            return
        self._exchange("GET", "/healthz", None, ANSWER_TIMEOUT_S)
        connection = self._connected(ANSWER_TIMEOUT_S)
        uid = self._peer_uid(connection.sock)
        if uid is None or uid not in self._trusted_uids():
            who = "A process whose user is unknown" if uid is None else f"A process of user id {uid}"
            raise MeshError(
                ErrorCode.FORBIDDEN,
                f"{who} answers on {HOST}:{self._port}, so no secret is sent there. If that is your agent, name its "
                "data folder with --data-dir, or run this as its user. With a token of that user's agent "
                "(--token-file) it is trusted.",
            )

    def close(self) -> None:
        """End the connection; the next question opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, method: str, path: str, body: Any, timeout_s: float) -> tuple[http.client.HTTPResponse, bytes]:
        response, raw = self._exchange(method, path, body, timeout_s)
        if response.status >= 400:
            raise _error_of(response, raw)
        return response, raw

    def _exchange(self, method: str, path: str, body: Any, timeout_s: float) -> tuple[http.client.HTTPResponse, bytes]:
        response = self._send(method, path, body, timeout_s)
        try:
            return response, response.read(ANSWER_BYTES_MAX)
        except (OSError, http.client.HTTPException) as error:
            raise self._trouble(error, timeout_s) from error

    def _send(
        self, method: str, path: str, body: Any, timeout_s: float, more: Mapping[str, str] = {}
    ) -> http.client.HTTPResponse:
        response = self._send_once(method, path, body, timeout_s, more)
        if response.status != 401 or self._authorization is not None:
            return response
        refused = _error_of(response, response.read(ANSWER_BYTES_MAX))
        # Who refuses a request does not read its body, and ends the connection after it.
        self.close()
        token = self._given_token
        if token is None:
            token = _read_token(self._token_file(refused))
        if token is None:
            raise refused
        self.check_owner()
        self._authorization = f"Bearer {token}"
        return self._send_once(method, path, body, timeout_s, more)

    def _token_file(self, refused: MeshError) -> Path:
        """Where the agent says its token is: only a file of that name, and where `check_owner` can tell who says so."""
        said = refused.detail.get("token_file")
        if sys.platform == "linux" and isinstance(said, str) and Path(said).name == self._token_path.name:
            return Path(said)
        return self._token_path

    def _send_once(
        self, method: str, path: str, body: Any, timeout_s: float, more: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        headers = {"Accept": "*/*", **more}
        if self._authorization is not None:
            headers["Authorization"] = self._authorization
        content: Any = None
        if isinstance(body, Iterator):
            content = body
        elif body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            connection = self._connected(timeout_s)
            try:
                connection.request(method, path, content, headers)
            except (BrokenPipeError, ConnectionResetError):
                if not isinstance(body, Iterator):
                    raise
                # Whoever refuses what is being sent ends the connection; why can still be read.
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._trouble(error, timeout_s) from error
        if response.getheader("X-Request-Id") is None:
            self.close()
            raise MeshError(
                ErrorCode.UNAVAILABLE,
                f"What answers on {HOST}:{self._port} is no meshnode agent. Name the agent's port with --api-port.",
            )
        return response

    def _connected(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(HOST, self._port, timeout=timeout_s)
        if self._connection.sock is None:
            self._connection.connect()
        self._connection.sock.settimeout(timeout_s)
        return self._connection

    def _trouble(self, error: Exception, timeout_s: float) -> MeshError:
        self.close()
        place = f"{HOST}:{self._port}"
        if not isinstance(error, TimeoutError) and (why := self._nobody_listens()) is not None:
            # A connection may also end because the agent just did, or never began: this machine lacks 127.0.0.1.
            reason = "" if isinstance(why, ConnectionRefusedError) else f" ({why.strerror or why})"
            return MeshError(
                ErrorCode.AGENT_NOT_RUNNING,
                f"no agent is running on {place}{reason}: start one with {self._how_to_start}",
                retryable=True,
                detail={"port": self._port},
            )
        if isinstance(error, TimeoutError):
            return MeshError(
                ErrorCode.TIMEOUT,
                f"The agent on {place} did not answer within {timeout_s:g} s. `meshnode logs` may say why.",
                retryable=True,
            )
        what = str(error) or type(error).__name__
        return MeshError(
            ErrorCode.UNAVAILABLE, f"The agent on {place} ended the connection ({what}). Try again.", retryable=True
        )

    def _nobody_listens(self) -> OSError | None:
        """Why no connection to the agent's port can be made now; None if one can."""
        try:
            with socket.create_connection((HOST, self._port), timeout=_LISTENER_TIMEOUT_S):
                return None
        except TimeoutError:
            return None  # somebody may be there and busy
        except OSError as error:
            return error

    def _trusted_uids(self) -> set[int]:
        trusted = {0, os.geteuid()}
        with contextlib.suppress(OSError):
            # Root, say, may ask an agent that runs as a user of its own, in that user's data folder.
            trusted.add(self._token_path.parent.stat().st_uid)
        return trusted


def _read_token(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(_TOKEN_BYTES_MAX).decode("ascii", "replace").strip() or None
    except OSError:
        return None


def _peer_uid(connected: Any) -> int | None:
    from meshnode.api.peer import peer_of  # Only for what is secret, so that the other commands start faster.

    return peer_of(connected).uid


def _decoded(response: http.client.HTTPResponse, body: bytes) -> Any:
    if not body:
        return None
    try:
        return json.loads(body)
    except ValueError as error:
        raise MeshError(
            ErrorCode.UNAVAILABLE,
            "The agent's answer is not JSON. Install one version of meshnode, and start the agent again.",
        ) from error


def _error_of(response: http.client.HTTPResponse, body: bytes) -> MeshError:
    """The agent's error as it said it; for an answer in another form, the nearest code."""
    nearest = _CODE_OF_STATUS.get(response.status, ErrorCode.INTERNAL)
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("error"), str):
        return MeshError(
            nearest, f"The agent answered {response.status} {response.reason} only; `meshnode logs` may say why."
        )
    code = str(said.get("code", ""))
    detail = said.get("detail")
    return MeshError(
        ErrorCode(code) if code in set(ErrorCode) else nearest,
        said["error"],
        retryable=said.get("retryable") is True,
        detail=detail if isinstance(detail, dict) else None,
    )


def _next_page(link: str | None) -> str | None:
    """The target of `rel="next"` (RFC 8288), which our API gives as a path."""
    for part in (link or "").split(","):
        target, _, parameters = part.strip().partition(">")
        if target.startswith("</") and 'rel="next"' in parameters:
            return target[1:]
    return None
