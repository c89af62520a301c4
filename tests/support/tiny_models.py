"""Models of random weights, a few megabytes each, one for every architecture that is to be certified.

They say nothing sensible; they are deterministic, have what their architecture has, and llama.cpp loads them. The same
architecture, type and seed give the same bytes everywhere. Nothing but the standard library is needed to make them.
"""

from collections.abc import Callable

from tests.support import tiny_models_dense as dense
from tests.support import tiny_models_experts as experts
from tests.support.gguf_files import GgufFile
from tests.support.tiny_models_maker import F16, Q4_0, Q4_K, Q8_0, VOCABULARY, Maker

__all__ = ["MODELS", "TYPES", "VOCABULARY", "Maker", "tiny_model"]

TYPES = {"F16": F16, "Q8_0": Q8_0, "Q4_0": Q4_0, "Q4_K": Q4_K}

MODELS: dict[str, Callable[[Maker], None]] = {
    "llama": dense.llama,
    "qwen2": dense.qwen2,
    "qwen2moe": experts.qwen2moe,
    "qwen3": dense.qwen3,
    "qwen3moe": experts.qwen3moe,
    "gemma3": dense.gemma3,
    "phi3": dense.phi3,
    "gpt-oss": experts.gpt_oss,
    "olmo2": dense.olmo2,
    "granite": dense.granite,
    "starcoder2": dense.starcoder2,
    "stablelm": dense.stablelm,
    "smollm3": dense.smollm3,
    "llama4": experts.llama4,
    "mistral3": dense.plain,
    "arcee": dense.arcee,
    "bailingmoe": experts.bailingmoe,
    "cohere2": dense.cohere2,
    "command-r": dense.command_r,
    "deepseek": experts.deepseek,
    "dots1": experts.dots1,
    "ernie4_5": dense.plain,
    "ernie4_5-moe": experts.ernie_moe,
    "exaone": dense.plain,
    "exaone4": dense.exaone4,
    "gpt2": dense.gpt2,
    "granitemoe": experts.granite_moe,
    "hunyuan-dense": dense.hunyuan,
    "internlm2": dense.plain,
    "minicpm": dense.minicpm,
    "olmoe": experts.olmoe,
    "phi2": dense.phi2,
    "seed_oss": dense.seed_oss,
    "starcoder": dense.gpt2,
}


def tiny_model(architecture: str, kind: str = "F16", *, layers: int = 8, seed: int = 0) -> GgufFile:
    """A model of `layers` layers whose matrices are of the type `kind` (a key of TYPES)."""
    maker = Maker(architecture, TYPES[kind], layers, seed)
    MODELS[architecture](maker)
    return maker.file
