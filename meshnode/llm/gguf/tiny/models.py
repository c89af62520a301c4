"""Models of random weights, a few megabytes each, one for every architecture that may be cut.

They say nothing sensible; they are deterministic, have what their architecture has, and llama.cpp loads them. The same
architecture, type and seed give the same bytes everywhere. Nothing but the standard library is needed to make them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from meshnode.llm.gguf.tiny import dense, experts
from meshnode.llm.gguf.tiny.layout import GgufFile
from meshnode.llm.gguf.tiny.maker import BF16, F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, Maker

KINDS: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        **{"F32": (F32,), "F16": (F16,), "BF16": (BF16,), "Q8_0": (Q8_0,), "Q4_0": (Q4_0,), "Q4_K": (Q4_K,)},
        "K": (Q4_K, Q5_K, Q6_K),
    }
)
"""The types of the matrices by the name of the kind; where there are several they take turns, as in real files."""

MODELS: Final[Mapping[str, Callable[[Maker], None]]] = MappingProxyType(
    {
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
)


def tiny_model(architecture: str, kind: str = "F16", *, layers: int = 8, seed: int = 0) -> GgufFile:
    """A model of `layers` layers whose matrices are of the kind `kind`. Raises KeyError for an unknown one."""
    maker = Maker(architecture, KINDS[kind], layers, seed)
    MODELS[architecture](maker)
    return maker.file
