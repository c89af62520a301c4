"""What may be cut where: the patterns of each architecture that depend on a layer's number or on how many there are.

A stage's layers are numbered from 0 again, so whatever llama.cpp derives from a layer's number, from the count of
layers, or from whether the input is tokens, must come out the same. Where a key of the file can say so, slicing.py
writes it; where a period is compiled in, cuts are held to it; where nothing helps, the pipeline is refused with the
reason. Whether a rule is right is shown by the certification tests, not by this table. Read from llama.cpp as of
llama-cpp-python 0.3.36.
"""

from collections.abc import Mapping
from math import lcm
from types import MappingProxyType
from typing import Final

import msgspec

from meshnode.llm.gguf.header import Array
from meshnode.llm.gguf.weights import Weights


class SlidingWindow(msgspec.Struct, frozen=True):
    """Every layer but one in `period` sees a window: all but the last of each period, or all but the first.

    `always`: even when the file names no window. A file's own pattern (a period, or an array) goes before.
    """

    period: int
    dense_first: bool = False
    always: bool = False


class Rule(msgspec.Struct, frozen=True):
    """How one architecture may be cut.

    `cut_every`: a stage may begin at multiples of this only. `cut_keys`: periods that stand in the file, likewise.
    `layers_max`: from more layers on, llama.cpp derives from their number what a stage would get wrong.
    `zeroed`: shared tensors that are added to the input, zero after the first stage. `scaled`: the input is multiplied
    by `embedding_scale`, 1 after the first stage. `layer_input`: llama.cpp exports a layer's input, the cheaper hook.
    `own_output`: llama.cpp wants an output matrix beside the embedding, always. `needs`: keys without which llama.cpp
    takes a value that follows from the number of layers.
    """

    cut_every: int = 1
    cut_keys: tuple[str, ...] = ()
    window: SlidingWindow | None = None
    layers_max: int | None = None
    zeroed: frozenset[str] = frozenset()
    scaled: bool = False
    layer_input: bool = False
    own_output: bool = False
    needs: tuple[str, ...] = ()


_PLAIN: Final = Rule()
_HOOKED: Final = Rule(layer_input=True)

RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "llama": _HOOKED,
        "qwen2": _PLAIN,
        "qwen2moe": Rule(own_output=True),
        "qwen3": _HOOKED,
        "qwen3moe": _HOOKED,
        "gemma3": Rule(window=SlidingWindow(6), layers_max=61),
        "phi3": _PLAIN,
        "gpt-oss": Rule(window=SlidingWindow(2, always=True), layer_input=True, own_output=True),
        "olmo2": Rule(window=SlidingWindow(4), own_output=True),
        "granite": Rule(scaled=True),
        "granitemoe": Rule(scaled=True),
        "starcoder2": _PLAIN,
        "stablelm": Rule(own_output=True),
        "smollm3": Rule(cut_every=4),
        "llama4": Rule(cut_every=4, cut_keys=("interleave_moe_layer_step",), window=SlidingWindow(4, always=True)),
        "mistral3": _PLAIN,
        "arcee": _PLAIN,
        "bailingmoe": Rule(own_output=True),
        "cohere2": Rule(window=SlidingWindow(4, always=True)),
        "command-r": Rule(layers_max=63),
        "deepseek": _PLAIN,
        "dots1": Rule(own_output=True),
        "ernie4_5": _PLAIN,
        "ernie4_5-moe": Rule(cut_keys=("interleave_moe_layer_step",)),
        "exaone": _PLAIN,
        "exaone4": Rule(layers_max=63),
        "gpt2": Rule(zeroed=frozenset({"position_embd.weight"})),
        "hunyuan-dense": _PLAIN,
        "internlm2": Rule(own_output=True),
        "minicpm": Rule(scaled=True, needs=("residual_scale",)),
        "olmoe": Rule(own_output=True),
        "phi2": Rule(own_output=True),
        "seed_oss": _PLAIN,
        "starcoder": Rule(zeroed=frozenset({"position_embd.weight"})),
    }
)

REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "gemma": "it multiplies its input by a constant even when the input is no token",
        "gemma2": "it multiplies its input by a constant even when the input is no token",
        "gemma3n": "its later layers need the tokens themselves",
        "gemma4": "its later layers need the tokens themselves",
        "deepseek2": "llama.cpp tells its variants apart by their number of layers",
        "glm4": "llama.cpp takes hidden states only from files of its multimodal variant",
        "bloom": "it normalises its input even when the input is no token",
    }
)


def rule_of(weights: Weights) -> Rule | str:
    """The rule for this model, or why it cannot be cut."""
    name = weights.architecture
    rule = RULES.get(name)
    if rule is not None:
        return rule
    why = REFUSED.get(name, "nobody has shown yet that it computes the same when cut")
    return f"models of the architecture {name!r} cannot be split by layers: {why}"


def cut_period(weights: Weights, rule: Rule) -> int:
    """A stage may begin at multiples of this."""
    return lcm(rule.cut_every, *(max(1, weights.whole(key, 1, 512)) for key in rule.cut_keys))


def window_layers(weights: Weights, window: SlidingWindow) -> tuple[bool, ...]:
    """Which layers see only a window of the context."""
    if not window.always and weights.whole("attention.sliding_window", 0) == 0:
        return (False,) * weights.layers
    if isinstance(weights.hyper("attention.sliding_window_pattern"), Array):
        return tuple(bool(flag) for flag in weights.per_layer("attention.sliding_window_pattern", 0))
    period = weights.whole("attention.sliding_window_pattern", window.period)
    if period == 0:
        return (True,) * weights.layers
    exempt = 0 if window.dense_first else period - 1
    return tuple(layer % period != exempt for layer in range(weights.layers))


def never(weights: Weights, rule: Rule) -> str | None:
    """Why this model cannot be cut at all, though others of its architecture can; None when it can."""
    missing = [key for key in rule.needs if weights.hyper(key) is None]
    if missing:
        return f"the file is of an old kind and does not say {', '.join(missing)}: convert the model again"
    if rule.layers_max is None or weights.layers <= rule.layers_max:
        return None
    return f"{weights.architecture} of {weights.layers} layers computes with a constant that follows from their number"


def cuts_of(weights: Weights, rule: Rule) -> tuple[int, ...]:
    """Where the model may be cut, so that whichever of the cuts are chosen no stage is refused."""
    if never(weights, rule) is not None:
        return ()
    period = cut_period(weights, rule)
    cuts = range(period, weights.layers, period)
    windows = window_layers(weights, rule.window) if rule.window is not None else ()
    if not any(windows):
        return tuple(cuts)
    # Every stage begins with a layer that has a window, or is the first and goes on until there is one.
    return tuple(cut for cut in cuts if windows[cut] and any(windows[:cut]))


def why_not(weights: Weights, rule: Rule, first: int, last: int) -> str | None:
    """Why layers `first` up to, not including, `last` cannot be a stage; None when they can."""
    whole = weights.layers
    if not 0 <= first < last <= whole:
        return f"layers {first} to {last} are not part of a model of {whole}"
    if last - first == whole:
        return None
    period = cut_period(weights, rule)
    for edge in (first, last):
        if edge % period and edge != whole:
            return f"{weights.architecture} can be cut at multiples of {period} layers only, not at {edge}"
    windows = window_layers(weights, rule.window) if rule.window is not None else ()
    if any(windows) and not any(windows[first:last]):
        return (
            f"layers {first} to {last} all see the whole context: llama.cpp wants a layer with a window in every stage"
        )
    return never(weights, rule)
