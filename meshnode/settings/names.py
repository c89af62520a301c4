"""Node names: labels for people, made safe to show, and never an identity.

Host names with spaces, emoji or stray control characters exist; a node takes the name as far as it can be shown and
never refuses to start because of it.
"""

import ipaddress
import unicodedata
from typing import Final

NAME_CHARS_MAX: Final = 63
FALLBACK_NAME: Final = "node"

_JOINER: Final = "\u200d"
_JOINS: Final = frozenset(("Mn", "Me", "Mc"))
_DROPPED: Final = frozenset(("Cc", "Cf", "Cs", "Co"))


def normalise_name(text: str) -> str:
    """The name as it is stored and shown: NFC, no control or direction characters, single spaces, ≤ 63 characters.

    A character made of several code points is kept whole or left out. Empty when nothing can be shown. Applying it
    twice changes nothing more.
    """
    spaced = "".join(" " if character.isspace() else character for character in text)
    visible = "".join(character for character in spaced if _is_shown(character))
    name = unicodedata.normalize("NFC", " ".join(visible.split())).strip(_JOINER + " ")
    if len(name) <= NAME_CHARS_MAX:
        return name
    end = NAME_CHARS_MAX
    while end > 0 and (_continues(name[end]) or name[end - 1] == _JOINER):
        end -= 1
    return name[:end].strip(_JOINER + " ")


def node_name(configured: str, hostname: str) -> str:
    """The name of this node: the configured one, else the host name's first label, else 'node'."""
    return normalise_name(configured) or normalise_name(_first_label(hostname)) or FALLBACK_NAME


def _first_label(hostname: str) -> str:
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return hostname.split(".", 1)[0]
    return hostname


def _is_shown(character: str) -> bool:
    """The joiner is invisible but holds emoji together; other format characters could reverse or hide text."""
    return character == _JOINER or unicodedata.category(character) not in _DROPPED


def _continues(character: str) -> bool:
    """Whether the code point belongs to the character before it: accents, variation selectors, skin tones."""
    return (
        character == _JOINER or unicodedata.category(character) in _JOINS or "\U0001f3fb" <= character <= "\U0001f3ff"
    )
