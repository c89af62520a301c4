"""The landing page behind a join URL: a tiny, strict HTTP/1.1 server for three GETs, on bytes.

`/join/<token-id>` explains what this is and how to join; the command itself is made in the browser, from the part of
the address behind `#`, which no request contains. Sockets, deadlines and rates are the listener's business.
"""

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Final

from meshnode.cluster.service.onboarding.invitations import Invitation, Invitations
from meshnode.kernel.errors import ErrorCode
from protocol.trust.join_url import JoinUrlError, parse_token

REQUEST_BYTES_MAX: Final = 8 * 1024
HEADERS_MAX: Final = 64

_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]{0,511}) HTTP/1\.([01])")
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):[ \t]*([\x20-\x7e\x80-\xff\t]*)")
_PLACE: Final = re.compile(r"\{\{ (\w+) \}\}")

_TEXT: Final = "text/plain; charset=utf-8"
_HTML: Final = "text/html; charset=utf-8"
_ASSETS: Final[Mapping[str, tuple[str, str]]] = {
    "/join/assets/landing.js": ("landing.js", "text/javascript; charset=utf-8"),
    "/join/assets/landing.css": ("landing.css", "text/css; charset=utf-8"),
}
_REASONS: Final[Mapping[int, str]] = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    410: "Gone",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
}
INSTALL_COMMAND: Final = "pipx install ."  # in a clone: the name on PyPI is not ours
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_SECURITY_HEADERS: Final = (
    f"Content-Security-Policy: {CONTENT_SECURITY_POLICY}",
    "Referrer-Policy: no-referrer",
    "X-Content-Type-Options: nosniff",
    "X-Frame-Options: DENY",
    "Cross-Origin-Opener-Policy: same-origin",
    "Cross-Origin-Resource-Policy: same-origin",
    "Permissions-Policy: clipboard-write=(self)",
    "Cache-Control: no-store",
)


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What little of a request matters here."""

    method: str
    path: str


def parse_request(head: bytes) -> HttpRequest | int:
    """The request, or the status that refuses it. `head` ends with the empty line; a body is refused."""
    lines = head[:-4].split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        return 400
    if len(lines) - 1 > HEADERS_MAX:
        return 431
    hosts = 0
    for line in lines[1:]:
        header = _HEADER.fullmatch(line)
        if header is None:
            return 400
        name, value = header[1].lower(), header[2].strip()
        hosts += name == b"host"
        if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            return 400
    if hosts != 1 and (match[3] == b"1" or hosts > 1):
        return 400
    return HttpRequest(match[1].decode("ascii"), match[2].decode("ascii").partition("?")[0])


@dataclass(frozen=True, slots=True)
class Page:
    """What is shown for an address, without the words of any protocol."""

    status: int
    media_type: str
    body: bytes


class LandingPages:
    """Answers requests. Reads its files once, when it is made."""

    def __init__(
        self, *, invitations: Invitations, inviter: Callable[[], str], install_command: str = INSTALL_COMMAND
    ) -> None:
        """`inviter` tells this node's name; `install_command` is what installs meshnode on a machine that has pipx."""
        static = resources.files("meshnode.cluster.service.onboarding").joinpath("static")
        self._page = static.joinpath("landing.html").read_text(encoding="utf-8")
        self._gone = static.joinpath("gone.html").read_text(encoding="utf-8")
        self._assets = {path: (static.joinpath(name).read_bytes(), kind) for path, (name, kind) in _ASSETS.items()}
        self._invitations = invitations
        self._inviter = inviter
        self._install_command = install_command

    def answer(self, head: bytes, *, limited: bool = False) -> bytes:
        """The whole response to a request head. Never raises; says nothing that the URL's reader may not know."""
        if limited:
            return _plain(429, "Too many requests from this address. Try again in a minute.")
        request = parse_request(head)
        if isinstance(request, int):
            return _plain(request, "This port answers only the address that 'meshnode invite' printed.")
        if request.method not in ("GET", "HEAD"):
            return _plain(405, "Only GET is answered here.", "Allow: GET, HEAD")
        page = self.page(request.path)
        response = _response(page.status, page.body, page.media_type)
        return response if request.method == "GET" else response[: response.index(b"\r\n\r\n") + 4]

    def page(self, path: str) -> Page:
        """What a GET of this path shows, on this port and on the local API alike."""
        asset = self._assets.get(path)
        if asset is not None:
            return Page(200, asset[1], asset[0])
        if not path.startswith("/join/"):
            return Page(404, _TEXT, b"There is nothing here. Open the whole address that 'meshnode invite' printed.\n")
        try:
            invitation = self._invitations.find(parse_token(path.removeprefix("/join/")))
        except JoinUrlError:
            invitation = None
        if invitation is None or invitation.state != "open":
            return self._refuse(invitation)
        minutes = max(1, round(invitation.remaining_s / 60))
        page = _fill(
            self._page,
            inviter=self._inviter(),
            token=invitation.token,
            minutes=f"{minutes} minute{'s' if minutes != 1 else ''}",
            role="an administrator" if invitation.role == "admin" else "a member",
            install=self._install_command,
        )
        return Page(200, _HTML, page.encode("utf-8"))

    def _refuse(self, invitation: Invitation | None) -> Page:
        if invitation is None:
            why = "This address has a typing error, or the invitation was never made by this machine."
        else:
            error = self._invitations.refusal(invitation.token_id)
            # Who used it is told to whoever speaks the join protocol, not to every reader of the page.
            why = "This invitation was used already." if error.code is ErrorCode.TOKEN_USED else error.message
        page = _fill(self._gone, why=why, inviter=self._inviter())
        return Page(410, _HTML, page.encode("utf-8"))


def refuse_large() -> bytes:
    """The answer to a request head that never ends."""
    return _plain(431, "The request is too large.")


def _fill(page: str, **values: str) -> str:
    return _PLACE.sub(lambda match: html.escape(values[match[1]]), page)


def _plain(status: int, text: str, *headers: str) -> bytes:
    return _response(status, (text + "\n").encode("utf-8"), _TEXT, *headers)


def _response(status: int, body: bytes, kind: str, *headers: str) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *_SECURITY_HEADERS,
        *headers,
    ]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body
