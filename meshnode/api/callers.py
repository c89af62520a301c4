"""Who calls the local API, and what they show for it: the token file, one-time login codes, browser sessions.

Its job is to make, keep and compare these secrets. Which of them a request needs is `api.guard`'s decision.
"""

import hashlib
import hmac
import os
import secrets
import stat
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from meshnode.api.limits import ApiLimits
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import SecretSet

TOKEN_PREFIX: Final = "mnt_"
TOKEN_FILE: Final = "api-token"
_token_bytes: Final = 32
_code_bytes: Final = 32
login_codes_max: Final = 16
_token_file_bytes_max: Final = 256


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling. `user`: the agent's own user or root, known by the socket; `token`: whoever holds the token;
    `session`: a browser that came in by a login link; `public`: nobody in particular, on a public route.
    """

    kind: Literal["user", "token", "session", "public"]
    uid: int | None


class ApiToken:
    """The bearer token of the local API. Only its digest is kept for comparing."""

    def __init__(self, token: str, secrets_known: SecretSet, *, path: str = "") -> None:
        """`path`: the file that holds the token, for those who may read it."""
        secrets_known.hide(token)
        self.path: Final = path
        self._digest = hashlib.sha256(token.encode()).digest()

    def matches(self, offered: str) -> bool:
        """Compare in constant time; digests, so that not even the length shows."""
        return hmac.compare_digest(hashlib.sha256(offered.encode("utf-8", "surrogateescape")).digest(), self._digest)


def load_or_create_token(data_dir: Path) -> str:
    """The token in DATA/api-token, made (0600) if there is none.

    Raises MeshError(STORAGE_FAILED) when the file cannot be read or written, is not a plain file of this user, or
    holds no token. Others' permissions on it are taken away.
    """
    path = data_dir / TOKEN_FILE
    try:
        return _read_token(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _token_error(path, f"cannot be read ({error.strerror})") from error
    token = TOKEN_PREFIX + secrets.token_urlsafe(_token_bytes)
    fresh = path.with_name(f"{TOKEN_FILE}.{secrets.token_hex(4)}.new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, token.encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise _token_error(path, f"cannot be written ({error.strerror})") from error
    return token


def _read_token(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise _token_error(path, "is not a plain file")
        if sys.platform != "win32":
            if info.st_uid != os.getuid():
                raise _token_error(path, f"belongs to another user (uid {info.st_uid})")
            if stat.S_IMODE(info.st_mode) & 0o077:
                os.fchmod(descriptor, 0o600)
        token = os.read(descriptor, _token_file_bytes_max).decode("ascii", "replace").strip()
    finally:
        os.close(descriptor)
    if not token.startswith(TOKEN_PREFIX) or len(token) < len(TOKEN_PREFIX) + _token_bytes:
        raise _token_error(path, "holds no token")
    return token


def _token_error(path: Path, what: str) -> MeshError:
    return MeshError(
        ErrorCode.STORAGE_FAILED,
        f"The token file {path} {what}. Mend it, or delete it and start the agent again: it makes a new one.",
    )


class BrowserSessions:
    """Login codes and the sessions they open. Kept in memory only: a restart logs browsers out.

    A cookie does not tell one port of a host from another, so the agent's port is in the cookie's name; a
    session is worth as much as the token and lasts `session_ttl_s`.
    """

    def __init__(self, limits: ApiLimits, port: int, secrets_known: SecretSet, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._secrets = secrets_known
        self._clock = clock
        self._codes: OrderedDict[bytes, float] = OrderedDict()
        self._sessions: OrderedDict[bytes, float] = OrderedDict()
        self.cookie_name = f"meshnode_session_{port}"

    def mint_code(self) -> str:
        """A login code, good once within `login_code_ttl_s`. Only the latest `login_codes_max` are kept."""
        code = secrets.token_urlsafe(_code_bytes)
        self._secrets.hide(code)
        self._codes[_digest(code)] = self._clock() + self._limits.login_code_ttl_s
        while len(self._codes) > login_codes_max:
            self._codes.popitem(last=False)
        return code

    def redeem(self, code: str) -> str:
        """Turn a login code into a session; returns the `Set-Cookie` value. The code is used up by this.

        Raises MeshError(TOKEN_INVALID) for a code that is unknown, used or too old.
        """
        expires = self._codes.pop(_digest(code), None)
        if expires is None or expires <= self._clock():
            raise MeshError(
                ErrorCode.TOKEN_INVALID,
                "This login link was used already or is too old. POST /api/session/link makes a new one.",
            )
        session = secrets.token_urlsafe(_code_bytes)
        self._secrets.hide(session)
        self._sessions[_digest(session)] = self._clock() + self._limits.session_ttl_s
        while len(self._sessions) > self._limits.sessions_max:
            self._sessions.popitem(last=False)
        age = int(self._limits.session_ttl_s)
        return f"{self.cookie_name}={session}; Path=/; HttpOnly; SameSite=Strict; Max-Age={age}"

    def holds(self, cookie_header: str) -> bool:
        """Whether a `Cookie` header names a session that is open."""
        digest = self._cookie_digest(cookie_header)
        if digest is None:
            return False
        expires = self._sessions.get(digest)
        if expires is not None and expires <= self._clock():
            del self._sessions[digest]
            return False
        return expires is not None

    def end(self, cookie_header: str) -> str:
        """Close the session a `Cookie` header names, if any; returns the `Set-Cookie` that removes it."""
        digest = self._cookie_digest(cookie_header)
        if digest is not None:
            self._sessions.pop(digest, None)
        return f"{self.cookie_name}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0"

    def _cookie_digest(self, cookie_header: str) -> bytes | None:
        for part in cookie_header.split(";"):
            name, _, value = part.strip().partition("=")
            if name == self.cookie_name:
                return _digest(value)
        return None


def _digest(secret: str) -> bytes:
    # Looking a digest up in a table gives away nothing about the secret by how long it takes.
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
