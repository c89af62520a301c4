"""What the mesh knows of a model without holding it: made from the header of its file, kept as a record."""

import hashlib
import re
from collections.abc import Sequence
from typing import Final, Literal

import msgspec
from blake3 import blake3

from meshnode.llm.gguf.facts import language_of, shape_of
from meshnode.llm.gguf.weights import LAYERS_MAX, PARTS_MAX, Weights
from protocol.sharding.shapes import ModelShape

TEMPLATE_BYTES_MAX: Final = 32 * 1024
RECORD_BYTES_MAX: Final = 60_000
FILE_BYTES_MAX: Final = 1 << 46
TEXT_CHARS_MAX: Final = 1_000

_DIGEST: Final = re.compile("[0-9a-f]{64}")

Checked = Literal["file", "told", "header"]
"""How the digest is known: computed from the whole file; the origin's word; made up from header, size and version."""


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One file of a model. `header_bytes` come before the weights; `header` is their BLAKE3. `sha256` hex, if known.

    `version` is what the origin called this state of the file.
    """

    size: int
    header_bytes: int
    header: bytes
    sha256: str = ""
    version: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model file. `source`: the reference it came from, empty when only members hold it.

    `digest` is the SHA-256 of the file, hex; of the parts' hashes one after another when there are several. A template
    that is too long for a record is left out (`template_cut`): read it from the header.
    """

    name: str
    digest: str
    checked: Checked
    shape: ModelShape
    parts: tuple[Part, ...]
    source: str = ""
    description: str = ""
    licence: str = ""
    tokenizer: str = ""
    bos: str = ""
    eos: str = ""
    adds_bos: bool = True
    chat_template: str = ""
    template_cut: bool = False
    aliases: tuple[str, ...] = ()
    created: int = 0

    @property
    def bytes(self) -> int:
        """The size of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return self.shape.layers


def make_manifest(
    weights: Weights,
    headers: Sequence[bytes],
    *,
    name: str,
    source: str,
    created: float,
    sha256s: Sequence[str] = (),
    versions: Sequence[str] = (),
    told: bool = False,
    aliases: Sequence[str] = (),
    description: str = "",
    licence: str = "",
) -> Manifest:
    """Describe a model whose headers are all here. `sha256s`, `versions`: one for each part, if known.

    `told`: the hashes are the origin's word. Blocks (tens of milliseconds: the vocabulary is looked into).
    """
    parts = tuple(
        Part(header.file_bytes, len(raw), blake3(raw).digest(), _at(sha256s, index), _at(versions, index))
        for index, (header, raw) in enumerate(zip(weights.headers, headers, strict=True))
    )
    digest = digest_of(sha256s) if sha256s and all(sha256s) else _made_up(parts)
    language = language_of(weights)
    manifest = Manifest(
        name=name,
        digest=digest,
        checked="header" if not (sha256s and all(sha256s)) else "told" if told else "file",
        shape=shape_of(weights, digest=digest, name=name),
        parts=parts,
        source=source,
        description=(description or weights.text("general.description"))[:TEXT_CHARS_MAX],
        licence=(licence or weights.text("general.license"))[:TEXT_CHARS_MAX],
        tokenizer=language.tokenizer,
        bos=_token(weights, language.tokens.get("bos")),
        adds_bos=language.adds_bos is not False,
        eos=_token(weights, language.tokens.get("eos")),
        chat_template=language.template,
        aliases=tuple(aliases),
        created=int(created),
    )
    too_long = len(language.template.encode()) > TEMPLATE_BYTES_MAX
    if too_long or len(msgspec.msgpack.encode(manifest)) > RECORD_BYTES_MAX:
        manifest = msgspec.structs.replace(manifest, chat_template="", template_cut=True)
    return manifest


def is_sound(manifest: Manifest) -> bool:
    """Whether what another member wrote can be true: its digest becomes part of paths, its sizes of plans."""
    return (
        _DIGEST.fullmatch(manifest.digest) is not None
        and manifest.shape.digest == manifest.digest
        and 1 <= manifest.shape.layers <= LAYERS_MAX
        and len(manifest.shape.kv_bytes_per_token) == manifest.shape.layers
        and min(manifest.shape.layer_bytes) >= 0
        and 1 <= len(manifest.parts) <= PARTS_MAX
        and all(0 < part.header_bytes <= part.size <= FILE_BYTES_MAX for part in manifest.parts)
    )


def digest_of(sha256s: Sequence[str]) -> str:
    """The digest of a model from the hashes of its parts, hex."""
    if len(sha256s) == 1:
        return sha256s[0]
    return hashlib.sha256(b"".join(bytes.fromhex(one) for one in sha256s)).hexdigest()


def _made_up(parts: Sequence[Part]) -> str:
    """A name for bytes that nobody has seen whole: the same header, sizes and versions give the same one."""
    known = [(part.size, part.header_bytes, part.header, part.version) for part in parts]
    return hashlib.sha256(b"meshnode unseen model" + msgspec.msgpack.encode(known)).hexdigest()


def _at(texts: Sequence[str], index: int) -> str:
    return texts[index] if index < len(texts) else ""


def _token(weights: Weights, number: int | None) -> str:
    if number is None:
        return ""
    tokens = weights.strings("tokenizer.ggml.tokens", number + 1)
    return tokens[number][:256] if number < len(tokens) else ""
