"""The content of a message as OpenAI's clients send it: one text, or a list of parts."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshnode.kernel.errors import ErrorCode, MeshError

PARTS_MAX: Final = 1024
_TEXT_KINDS: Final = frozenset({"text", "input_text", "output_text"})
_WHAT_TO_DO: Final = "Send text parts only"


def text_of(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """The text of a message's content; parts are put together as they are, without anything between.

    Raises:
        MeshError: BAD_REQUEST for a part that is no text, by its name.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if len(content) > PARTS_MAX:
        raise MeshError(
            ErrorCode.BAD_REQUEST, f"A message has {len(content)} content parts; at most {PARTS_MAX} are taken."
        )
    return "".join(_text_of_part(part, index) for index, part in enumerate(content))


def _text_of_part(part: Any, index: int) -> str:
    if not isinstance(part, Mapping):
        raise MeshError(ErrorCode.BAD_REQUEST, f"Content part {index} is no object. {_WHAT_TO_DO}.")
    kind = part.get("type")
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    if kind not in _TEXT_KINDS:
        shown = kind if isinstance(kind, str) else "without a type"
        raise MeshError(
            ErrorCode.BAD_REQUEST,
            f"Content part {index} is {shown[:64]!r}: no model of this mesh takes images, sound or files. "
            f"{_WHAT_TO_DO}.",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise MeshError(ErrorCode.BAD_REQUEST, f"Content part {index} has no text. {_WHAT_TO_DO}.")
    return text
