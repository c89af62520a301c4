"""The agent's own tiny models, under the name that tests have for them."""

from meshnode.llm.gguf.tiny.maker import VOCABULARY, Maker
from meshnode.llm.gguf.tiny.models import KINDS as TYPES
from meshnode.llm.gguf.tiny.models import MODELS, tiny_model

__all__ = ["MODELS", "TYPES", "VOCABULARY", "Maker", "tiny_model"]
