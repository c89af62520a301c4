"""Embeddings: texts or tokens in, vectors out, as numbers or as base64 of little-endian 32-bit floats."""

import base64
import struct
from typing import Any

from meshnode.llm.model import Embedded, EmbeddingRequest
from meshnode.surfaces.openai.errors import invalid
from meshnode.surfaces.openai.schema import EmbeddingsRequest
from meshnode.surfaces.openai.translate.completions import prompts_of

INPUTS_MAX = 2_048


def request_of(request: EmbeddingsRequest) -> EmbeddingRequest:
    """Raises MeshError BAD_REQUEST naming the field."""
    inputs = prompts_of(request.input, "input")
    if len(inputs) > INPUTS_MAX:
        raise invalid("input", f"has {len(inputs)} entries; {INPUTS_MAX} is the limit.")
    if any(not entry for entry in inputs):
        raise invalid("input", "has an empty text.")
    return EmbeddingRequest(model=request.model, inputs=tuple(inputs), dimensions=request.dimensions)


def body_of(embedded: Embedded, encoding: str) -> dict[str, Any]:
    """Their list object."""
    return {
        "object": "list",
        "model": embedded.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _packed(vector) if encoding == "base64" else vector}
            for index, vector in enumerate(embedded.vectors)
        ],
        "usage": {"prompt_tokens": embedded.prompt_tokens, "total_tokens": embedded.prompt_tokens},
    }


def _packed(vector: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
