"""GGUF files that are right or wrong as asked, also in several parts."""

from collections.abc import Iterable

from meshnode.llm.gguf.tiny.layout import SCALARS, GgufFile, text

__all__ = ["SCALARS", "GgufFile", "split", "text"]


def split(whole: GgufFile, sizes: Iterable[int]) -> list[GgufFile]:
    """The same model in several files, with so many tensors each; the keys are in the first."""
    counts = list(sizes)
    parts, start = [], 0
    for number, count in enumerate(counts):
        part = GgufFile(whole.version, whole.alignment, list(whole.fields) if number == 0 else [])
        part.key("split.no", "u16", number)
        part.key("split.count", "u16", len(counts))
        part.key("split.tensors.count", "i32", len(whole.tensors))
        part.tensors = whole.tensors[start : start + count]
        start += count
        parts.append(part)
    return parts
