"""What a user may write to name a model to pull, turned into the addresses of its parts.

It knows forms only. Whether anything is there is `origin`'s to find out; names of the catalogue are `catalogue`'s.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.gguf.foreign import ADVICE, kind_of_name

PARTS_MAX: Final = 512
REF_CHARS_MAX: Final = 2048
HUB: Final = "https://huggingface.co"

_HUB_REF: Final = re.compile(
    r"hf:(?P<owner>[\w.-]{1,96})/(?P<repo>[\w.-]{1,96})/(?P<file>[^@?#]{1,512}\.gguf)(@(?P<revision>[\w./-]{1,128}))?",
    re.IGNORECASE,
)
_PART: Final = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_DOTS: Final = frozenset({".", "..", ""})
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class RemoteRef:
    """A file at an HTTP origin, in one or several parts. `gated_page`: where a person may ask for access."""

    name: str
    urls: tuple[str, ...]
    hub: bool = False
    gated_page: str = ""


@dataclass(frozen=True, slots=True)
class LocalRef:
    """A file on this machine, in one or several parts; it stays where it is."""

    name: str
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class NamedRef:
    """A name: of the catalogue, or of a model that a peer holds."""

    name: str


Ref = RemoteRef | LocalRef | NamedRef


def parse_ref(text: str, *, hub: str = HUB) -> Ref:
    """Understand a reference. Raises MeshError BAD_REQUEST saying which forms there are. Touches nothing."""
    text = text.strip()
    if not text or len(text) > REF_CHARS_MAX or any(character < " " for character in text):
        raise _unknown(text)
    kind = kind_of_name(text.partition("?")[0].partition("@")[0])
    if kind is not None:
        raise MeshError(ErrorCode.BAD_REQUEST, f"{text[:200]!r} is {kind}. {ADVICE}")
    if text.lower().startswith("hf:"):
        return _hub_ref(text, hub)
    if "://" in text:
        return _url_ref(text)
    if text.startswith(("/", "./", "../", "~")) or text.endswith(".gguf"):
        path = Path(text).expanduser().absolute()
        parts = [Path(part) for part in _parts(str(path))]
        return LocalRef(_name_of(path.name), tuple(parts))
    if re.fullmatch(r"[\w.:@/+-]{1,200}", text):
        return NamedRef(text)
    raise _unknown(text)


def _hub_ref(text: str, hub: str) -> RemoteRef:
    match = _HUB_REF.fullmatch(text)
    if match is None or _DOTS.intersection(text[3:].replace("@", "/").split("/")):
        raise MeshError(
            ErrorCode.BAD_REQUEST,
            f"{text[:200]!r} names no file of the hub. Write hf:OWNER/REPOSITORY/FILE.gguf, with @REVISION behind it "
            "if it must be a certain one.",
        )
    page = f"{hub}/{match['owner']}/{match['repo']}"
    revision = quote(match["revision"] or "main", safe="")
    urls = tuple(f"{page}/resolve/{revision}/{quote(part)}" for part in _parts(match["file"]))
    return RemoteRef(_name_of(match["file"].rpartition("/")[2]), urls, hub=True, gated_page=page)


def _url_ref(text: str) -> RemoteRef:
    parsed = urlsplit(text)
    loopback = parsed.hostname in _LOOPBACK
    if parsed.scheme != "https" and not (parsed.scheme == "http" and loopback):
        raise MeshError(
            ErrorCode.BAD_REQUEST,
            "A model is pulled over https:// only: what arrives over plain http could be anybody's. Put an s behind "
            "http, or download the file yourself and pull its path.",
        )
    if parsed.username or parsed.password:
        raise MeshError(
            ErrorCode.BAD_REQUEST,
            "A URL with a password in it ends in logs. Set llm.hub_token instead, or pull a path.",
        )
    if not parsed.hostname or not parsed.path.endswith(".gguf"):
        raise MeshError(ErrorCode.BAD_REQUEST, "The URL of a model ends in .gguf, before any question mark.")
    if _DOTS.intersection(unquote(parsed.path).split("/")[1:]):
        raise MeshError(ErrorCode.BAD_REQUEST, "The path of a model's URL has no empty part, no . and no .. in it.")
    tail = f"?{parsed.query}" if parsed.query else ""
    base = f"{parsed.scheme}://{parsed.netloc}"
    urls = tuple(f"{base}{part}{tail}" for part in _parts(parsed.path))
    return RemoteRef(_name_of(parsed.path.rpartition("/")[2]), urls)


def _parts(first: str) -> list[str]:
    """All parts of a file, whichever part was named."""
    match = _PART.search(first)
    if match is None:
        return [first]
    count = int(match["count"])
    if not 0 < int(match["number"]) <= count <= PARTS_MAX:
        raise MeshError(
            ErrorCode.BAD_REQUEST, f"{first.rpartition('/')[2]!r} is no part of a file of at most {PARTS_MAX} parts."
        )
    return [f"{first[: match.start()]}-{number:05}-of-{match['count']}.gguf" for number in range(1, count + 1)]


def _name_of(file: str) -> str:
    """A model's name from its file's: without ending and part number."""
    return _PART.sub("", file).removesuffix(".gguf")[:128]


def _unknown(text: str) -> MeshError:
    return MeshError(
        ErrorCode.BAD_REQUEST,
        f"{text[:200]!r} is no model reference. Write a name from `meshnode models --all`, hf:OWNER/REPO/FILE.gguf, an "
        "https:// URL that ends in .gguf, or the path of a file on this machine.",
    )
