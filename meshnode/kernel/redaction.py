"""What may never reach a log, a terminal or an answer: control characters and secrets.

Its job is two pure text functions and the small set of secrets known at run time. It leaves writing
records to `kernel.logs`, and the decision what counts as a secret to whoever holds one: they hand it to
`SecretSet.hide` the moment they read or make it.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

REDACTED: Final = "[redacted]"
known_secrets_max: Final = 256
secret_length_min: Final = 8
redaction_depth_max: Final = 8

# Beside the C0 and C1 control characters: line and paragraph separators, which some viewers break lines at, and
# the bidirectional and zero-width characters, with which text can be made to look like other text.
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

_SECRET_PATTERNS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    # A join URL carries its secret behind the '#', where no HTTP client would send it.
    (re.compile(r"(/join[^\s#\"'<>]*#)[^\s\"'<>]+"), rf"\1{REDACTED}"),
    (re.compile(r"(/login#)[^\s\"'<>]+"), rf"\1{REDACTED}"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{4,}"), rf"\1\2{REDACTED}"),
    (re.compile(r"\bmnt_[A-Za-z0-9_-]{8,}"), REDACTED),
    (re.compile(r"(meshnode_session_\d+=)[^\s;\"',]+"), rf"\1{REDACTED}"),
    (
        re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL),
        REDACTED,
    ),
    (
        re.compile(
            r"(?i)([\"']?\b(?:api[_-]?key|api[_-]?token|secret|password|passphrase|private[_-]?key|gossip[_-]?key)"
            r"[\"']?\s*[=:]\s*)(b?\"[^\"]*\"|b?'[^']*'|[^\s,;)}\]]+)"
        ),
        rf"\1{REDACTED}",
    ),
    # The bare words are ordinary ones too: only as a key or a parameter do they stand before a secret.
    (
        re.compile(
            r"(?i)([\"'](?:token|authorization|cookie)[\"']\s*:\s*|\b(?:token|cookie)=)"
            r"(b?\"[^\"]*\"|b?'[^']*'|[^\s,;)}\]&]+)"
        ),
        rf"\1{REDACTED}",
    ),
)

_SECRET_FIELD: Final = re.compile(
    r"(?i)(?:^|_)(?:token|secret|secrets|password|passphrase|authorization|cookie|api_key|private_key|signing_key"
    r"|gossip_key|session_key|login_code|join_url)$"
)


def printable(text: str) -> str:
    """`text` with every character that could end a line, move a cursor or reorder text written as an escape."""
    if _UNPRINTABLE.search(text) is None:
        return text
    return _UNPRINTABLE.sub(_escape, text)


def printable_json(text: str) -> str:
    """JSON `text` with the characters that are unprintable inside its strings written as JSON escapes."""
    if _UNPRINTABLE.search(text) is None:
        return text
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    short = _SHORT.get(character)
    if short is not None:
        return short
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


class SecretSet:
    """Secrets this process holds, so that they can be cut out of any text wherever they turn up.

    Bounded: past `known_secrets_max` the oldest is forgotten; the patterns still catch what looks like one.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, None] = OrderedDict()
        self._longest_first: tuple[str, ...] = ()

    def hide(self, secret: str) -> None:
        """Cut `secret` out of every text from now on. Too short a secret would cut up ordinary words: ignored."""
        if len(secret) < secret_length_min or secret in self._known:
            return
        self._known[secret] = None
        while len(self._known) > known_secrets_max:
            self._known.popitem(last=False)
        # A secret that holds another must go first, or a part of it would be left.
        self._longest_first = tuple(sorted(self._known, key=len, reverse=True))

    def redact(self, text: str) -> str:
        """`text` without the known secrets and without what looks like a secret."""
        for secret in self._longest_first:
            if secret in text:
                text = text.replace(secret, REDACTED)
        for pattern, replacement in _SECRET_PATTERNS:
            text = pattern.sub(replacement, text)
        return text

    def redact_value(self, name: str, value: object, depth: int = 0) -> object:
        """A value of a record, redacted: by the name of its field, and through nested maps and lists.

        Returns only what JSON can hold; anything else is turned into its `repr` first, so that no object can
        bring a secret past by its own rendering. Past `redaction_depth_max` levels the rest is cut off.
        """
        if value is None or isinstance(value, bool | int | float):
            return value
        if _SECRET_FIELD.search(name) is not None:
            return REDACTED
        if isinstance(value, str):
            return self.redact(value)
        if depth >= redaction_depth_max:
            return "..."
        if isinstance(value, Mapping):
            return {
                self.redact(str(key)): self.redact_value(str(key), inner, depth + 1) for key, inner in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [self.redact_value("", inner, depth + 1) for inner in value]
        return self.redact(repr(value))
