"""The one-time join URL: building it, and reading what a person pasted, with errors that name the part that is wrong.

    http://HOST:4894/join/<token-id>#<secret>.<pin>[.<more addresses>]

The part after `#` never travels: no browser and no HTTP client sends it. Each part carries a few check bytes of its
own, so that a typing error is told apart from a used invitation or an impostor. What is done with the parts is
protocol.trust.join's business.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from protocol.ids import Address, pack_address, unpack_address

ONBOARDING_PORT: Final = 4894
TOKEN_ID_BYTES: Final = 8
SECRET_BYTES: Final = 16
PIN_BYTES: Final = 32
ALTERNATES_MAX: Final = 8
JOIN_URL_CHARS_MAX: Final = 1024

_TOKEN_CHECK_BYTES: Final = 2
_SECRET_CHECK_BYTES: Final = 2
_PIN_CHECK_BYTES: Final = 1
_ALTERNATES_CHECK_BYTES: Final = 1

TOKEN_CHARS: Final = 16
SECRET_CHARS: Final = 24
PIN_CHARS: Final = 44

Part = Literal["url", "scheme", "host", "port", "path", "token", "fragment", "secret", "pin", "addresses"]

_SHAPE: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<host>[^/?#]*)(?P<path>[^#]*)(?P<rest>#.*)?")
_AUTHORITY: Final = re.compile(r"(?:\[(?P<six>[^\[\]]*)\]|(?P<name>[^\[\]:@]*))(?::(?P<port>.*))?")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")
_SIX: Final = re.compile(r"[0-9A-Fa-f:.]{2,45}(%(25)?[A-Za-z0-9._-]{1,32})?")
_QUOTE: Final = "Copy the whole URL and put it in single quotes: meshnode join 'http://...'"


class JoinUrlError(ValueError):
    """The text is no join URL. `part` says where it goes wrong; the message says what to do and holds no secret."""

    def __init__(self, part: Part, message: str) -> None:
        super().__init__(message)
        self.part = part


@dataclass(frozen=True, slots=True)
class JoinUrl:
    """A join URL taken apart. `host` is a name or an IP literal without brackets; `secret` is never to be shown."""

    host: str
    port: int
    token_id: bytes
    secret: bytes = field(repr=False)
    pin: bytes
    alternates: tuple[Address, ...] = ()


def build_join_url(url: JoinUrl) -> str:
    """The URL's text, secret included. Raises ValueError if a part has the wrong size."""
    sizes = ((url.token_id, TOKEN_ID_BYTES), (url.secret, SECRET_BYTES), (url.pin, PIN_BYTES))
    if any(len(part) != size for part, size in sizes) or len(url.alternates) > ALTERNATES_MAX:
        raise ValueError("a part of the join URL has the wrong size")
    fragment = [
        _base64(url.secret + _check(b"secret", url.secret, _SECRET_CHECK_BYTES)),
        _base64(url.pin + _check(b"pin", url.pin, _PIN_CHECK_BYTES)),
    ]
    if url.alternates:
        packed = b"".join(_pack_alternate(address) for address in url.alternates)
        fragment.append(_base64(_check(b"addresses", packed, _ALTERNATES_CHECK_BYTES) + packed))
    host = f"[{url.host.replace('%', '%25')}]" if ":" in url.host else url.host
    return f"http://{host}:{url.port}/join/{token_text(url.token_id)}#{'.'.join(fragment)}"


def token_text(token_id: bytes) -> str:
    """A token id as it stands in URLs, lists and logs: 16 lowercase base32 characters. It is no secret."""
    checked = token_id + _check(b"token", token_id, _TOKEN_CHECK_BYTES)
    return base64.b32encode(checked).decode("ascii").lower()


def parse_token(text: str) -> bytes:
    """The token id that `token_text` spelled, in any case. Raises JoinUrlError."""
    shape = "The part after /join/ has 16 letters and digits (a to z, 2 to 7)"
    if len(text) < TOKEN_CHARS:
        raise JoinUrlError("token", f"{shape}; this one has {len(text)}: it was cut off. {_QUOTE}")
    if len(text) > TOKEN_CHARS:
        raise JoinUrlError("token", f"{shape}; this one has {len(text)}. {_QUOTE}")
    try:
        raw = base64.b32decode(text.upper())
    except (binascii.Error, ValueError):
        raise JoinUrlError("token", f"{shape}; this one has others. {_QUOTE}") from None
    return _checked("token", raw, _TOKEN_CHECK_BYTES, "The part after /join/ has a typing error")


def parse_join_url(text: str) -> JoinUrl:
    """Take a pasted join URL apart. Raises JoinUrlError, which names the part and never repeats the secret."""
    cleaned = text.strip().strip("<>'\"`").strip()
    if not cleaned:
        raise JoinUrlError("url", "There is no join URL. On a machine of the mesh, run: meshnode invite")
    if len(cleaned) > JOIN_URL_CHARS_MAX:
        raise JoinUrlError("url", f"This is longer than any join URL ({JOIN_URL_CHARS_MAX} characters). {_QUOTE}")
    if any(character.isspace() for character in cleaned):
        raise JoinUrlError("url", f"There is a blank or a line break inside the join URL. {_QUOTE}")
    shape = _SHAPE.fullmatch(cleaned)
    if shape is None:
        raise JoinUrlError("scheme", f"A join URL starts with http:// and this text does not. {_QUOTE}")
    if shape["scheme"].lower() != "http":
        raise JoinUrlError(
            "scheme",
            "A join URL starts with http:// (that is only the page that explains it; joining itself is encrypted). "
            + _QUOTE,
        )
    host, port = _parse_authority(shape["host"])
    token_id = _parse_path(shape["path"])
    secret, pin, alternates = _parse_fragment(shape["rest"])
    return JoinUrl(host, port, token_id, secret, pin, alternates)


def _parse_authority(text: str) -> tuple[str, int]:
    if text.count(":") > 1 and not text.startswith("["):
        raise JoinUrlError("host", f"An IPv6 address stands in brackets: http://[fd00::1]:4894/join/... {_QUOTE}")
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise JoinUrlError("host", f"The address between http:// and /join/ is not a host and a port. {_QUOTE}")
    host = match["six"] if match["six"] is not None else match["name"]
    if match["six"] is not None:
        if _SIX.fullmatch(host) is None or ":" not in host:
            raise JoinUrlError("host", f"What stands between [ and ] is not an IPv6 address. {_QUOTE}")
        host = host.replace("%25", "%", 1)
    elif _HOST_NAME.fullmatch(host) is None:
        raise JoinUrlError("host", f"The host between http:// and the port is missing or malformed. {_QUOTE}")
    port = match["port"]
    if port is None:
        return host, ONBOARDING_PORT
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise JoinUrlError("port", f"The port after the host must be a number from 1 to 65535. {_QUOTE}")
    return host, int(port)


def _parse_path(path: str) -> bytes:
    match = re.fullmatch(r"/join/([^/?]*)/?", path)
    if match is None:
        raise JoinUrlError("path", f"After the host and port, a join URL goes on with /join/ and 16 letters. {_QUOTE}")
    return parse_token(match[1])


def _parse_fragment(rest: str | None) -> tuple[bytes, bytes, tuple[Address, ...]]:
    if rest is None or len(rest) < 2:
        raise JoinUrlError(
            "fragment",
            "The part after # is missing: without it nobody can join. A chat program, or the shell without quotes, "
            f"may have cut it off. {_QUOTE}",
        )
    parts = rest[1:].split(".")
    secret = _fixed(parts[0], "secret", SECRET_CHARS, _SECRET_CHECK_BYTES, "The secret (between # and the dot)")
    if len(parts) < 2:
        raise JoinUrlError("pin", f"The URL was cut off after the secret: a dot and 44 characters follow it. {_QUOTE}")
    pin = _fixed(parts[1], "pin", PIN_CHARS, _PIN_CHECK_BYTES, "The fingerprint (after the dot)")
    if len(parts) > 3:
        raise JoinUrlError("addresses", f"There is one dot too many after the #. {_QUOTE}")
    return secret, pin, _parse_alternates(parts[2]) if len(parts) == 3 else ()


def _fixed(text: str, part: Part, size: int, check_bytes: int, what: str) -> bytes:
    if len(text) != size:
        why = "it was cut off" if len(text) < size else "something was added to it"
        raise JoinUrlError(part, f"{what} has {size} characters, and here are {len(text)}: {why}. {_QUOTE}")
    return _checked(part, _from_base64(text, part, what), check_bytes, f"{what} has a typing error")


def _parse_alternates(text: str) -> tuple[Address, ...]:
    what = "The list of more addresses (after the second dot)"
    raw = _from_base64(text, "addresses", what)
    packed = raw[_ALTERNATES_CHECK_BYTES:]
    if raw[:_ALTERNATES_CHECK_BYTES] != _check(b"addresses", packed, _ALTERNATES_CHECK_BYTES):
        raise JoinUrlError("addresses", f"{what} has a typing error or was cut off. {_QUOTE}")
    addresses: list[Address] = []
    while packed:
        size = packed[0]
        try:
            addresses.append(unpack_address(packed[1 : 1 + size]))
        except ValueError:
            raise JoinUrlError("addresses", f"{what} cannot be read. {_QUOTE}") from None
        packed = packed[1 + size :]
    if len(addresses) > ALTERNATES_MAX:
        raise JoinUrlError("addresses", f"{what} names more than {ALTERNATES_MAX}. {_QUOTE}")
    return tuple(addresses)


def _pack_alternate(address: Address) -> bytes:
    packed = pack_address(address)
    return bytes([len(packed)]) + packed


def _check(label: bytes, data: bytes, size: int) -> bytes:
    # Against typing errors only. What it reveals of the secret stays in the part that never travels.
    return hashlib.blake2b(label + b"\x00" + data, digest_size=size, person=b"meshnode url/1").digest()


def _checked(part: Part, raw: bytes, check_bytes: int, complaint: str) -> bytes:
    data, check = raw[:-check_bytes], raw[-check_bytes:]
    if check != _check(part.encode("ascii"), data, check_bytes):
        raise JoinUrlError(part, f"{complaint}. {_QUOTE}")
    return data


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode("ascii").rstrip("=")


def _from_base64(text: str, part: Part, what: str) -> bytes:
    if not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        raise JoinUrlError(part, f"{what} has a character that does not belong there. {_QUOTE}")
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise JoinUrlError(part, f"{what} was cut off. {_QUOTE}") from None
    if _base64(raw) != text:
        raise JoinUrlError(part, f"{what} has a typing error at its end. {_QUOTE}")
    return raw


def join_addresses(url: JoinUrl) -> Sequence[tuple[str, int]]:
    """Every (host, port) that the URL names, the one in plain sight first, none twice."""
    return list(dict.fromkeys([(url.host, url.port), *((host, port) for host, port in url.alternates)]))
