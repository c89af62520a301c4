"""What a model needs and how it talks, from its header alone: sizes for the planner, tokens and templates for chats.

It reads no weights. Whether the model runs is the engine's to find out.
"""

from typing import Final

import msgspec

from meshnode.llm.gguf.header import Array
from meshnode.llm.gguf.rules import Rule, cut_period, cuts_of, never, rule_of, window_layers
from meshnode.llm.gguf.slicing import EVERYWHERE, INPUT
from meshnode.llm.gguf.tensor_types import TENSOR_TYPES
from meshnode.llm.gguf.weights import VOCABULARY_MAX, Placed, Weights
from protocol.sharding.shapes import ModelShape

TEMPLATE_CHARS_MAX: Final = 1 << 18
CONTEXT_MAX: Final = 1 << 28
WIDTH_MAX: Final = 1 << 20
HEADS_MAX: Final = 1 << 16
KV_ITEM_BYTES: Final = 2
"""Keys and values are kept as F16."""

# fmt: off
_FILE_TYPES: Final = (
    "F32", "F16", "Q4_0", "Q4_1", "-", "-", "-", "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L",
    "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S",
    "IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "-", "-", "-", "TQ1_0", "TQ2_0",
    "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0",
)
# fmt: on
"""llama.cpp's llama_ftype, by number."""
_TOKENS: Final = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "cls", "mask")


class Language(msgspec.Struct, frozen=True, kw_only=True):
    """How the model talks. Token ids have llama.cpp's names (`bos`, `eos`, ...); only those that the file gives.

    `adds_bos`, `adds_eos`: None where the file leaves it to the tokenizer. `templates` holds templates that have names.
    """

    tokenizer: str
    pretokenizer: str
    tokens: dict[str, int]
    adds_bos: bool | None
    adds_eos: bool | None
    template: str
    templates: dict[str, str]


def language_of(weights: Weights) -> Language:
    """Tokens and templates. Raises GgufError for a template or a token that cannot be."""
    tokens = {}
    for name in _TOKENS:
        value = weights.value(f"tokenizer.ggml.{name}_token_id")
        if isinstance(value, int) and 0 <= value < VOCABULARY_MAX:
            tokens[name] = value
    templates = {
        name: text
        for name in weights.strings("tokenizer.chat_templates", 16)
        if len(text := weights.text(f"tokenizer.chat_template.{name}")) in range(1, TEMPLATE_CHARS_MAX + 1)
    }
    template = weights.text("tokenizer.chat_template")
    return Language(
        tokenizer=weights.text("tokenizer.ggml.model"),
        pretokenizer=weights.text("tokenizer.ggml.pre"),
        tokens=tokens,
        adds_bos=_flag(weights, "add_bos_token"),
        adds_eos=_flag(weights, "add_eos_token"),
        template=template if len(template) <= TEMPLATE_CHARS_MAX else "",
        templates=templates,
    )


def shape_of(weights: Weights, *, digest: str = "", name: str = "") -> ModelShape:
    """Sizes and cuts. `digest` and `name` are the caller's; without a name the file's own. Raises GgufError."""
    rule = rule_of(weights)
    cuts, reason = _cuts(weights, rule)
    width = weights.whole("embedding_length", 0, WIDTH_MAX)
    embedding = sum(_bytes(placed) for name, placed in weights.shared.items() if name in INPUT)
    everywhere = sum(_bytes(placed) for name, placed in weights.shared.items() if name in EVERYWHERE)
    rest = sum(map(_bytes, weights.shared.values())) - embedding - everywhere
    head = weights.shared.get("token_embd.weight")
    tied = _bytes(head) if head is not None and "output.weight" not in weights.shared else 0
    windows = window_tokens(weights, rule)
    return ModelShape(
        digest=digest,
        name=name or weights.text("general.name"),
        architecture=weights.architecture,
        quantisation=quantisation_of(weights),
        n_embd=width,
        n_vocab=_vocabulary(weights),
        context_max=weights.whole("context_length", 0, CONTEXT_MAX),
        layer_bytes=tuple(sum(map(_bytes, block.values())) for block in weights.blocks),
        kv_bytes_per_token=_kv_bytes(weights, width, windows),
        embed_bytes=embedding,
        output_bytes=rest + tied,
        cuts=cuts,
        uncut_reason=reason,
        state_bytes=_state_bytes(weights),
        shared_bytes=everywhere,
        tied_bytes=tied,
        window_tokens=windows,
        layer_input=isinstance(rule, Rule) and rule.layer_input,
        parameters=sum(_elements(placed) for home in (weights.shared, *weights.blocks) for placed in home.values()),
        heads=max(weights.per_layer("attention.head_count", 0, HEADS_MAX)),
        heads_kv=max(_heads_kv(weights)),
        experts=weights.whole("expert_count", 0, 1 << 16),
        experts_used=weights.whole("expert_used_count", 0, 1 << 16),
        embeds=weights.whole("pooling_type", 0, 16) > 0 or not _causal(weights),
    )


def quantisation_of(weights: Weights) -> str:
    """The name that llama.cpp gives the mixture of types; without one, the type that most bytes have."""
    number = weights.value("general.file_type")
    if isinstance(number, int) and 0 <= number < len(_FILE_TYPES) and _FILE_TYPES[number] != "-":
        return _FILE_TYPES[number]
    sizes: dict[int, int] = {}
    for block in weights.blocks:
        for placed in block.values():
            sizes[placed.tensor.kind] = sizes.get(placed.tensor.kind, 0) + placed.tensor.length
    return TENSOR_TYPES[max(sizes, key=lambda kind: sizes[kind])].name


def window_tokens(weights: Weights, rule: Rule | str) -> tuple[int, ...]:
    """How many tokens each layer sees; 0: all."""
    if isinstance(rule, str) or rule.window is None:
        return (0,) * weights.layers
    # llama.cpp takes 8192 for the one architecture whose files name no window (llama4).
    size = weights.whole("attention.sliding_window", 8192, CONTEXT_MAX)
    return tuple(size if windowed else 0 for windowed in window_layers(weights, rule.window))


def _cuts(weights: Weights, rule: Rule | str) -> tuple[tuple[int, ...], str]:
    if isinstance(rule, str):
        return (), rule
    refusal = never(weights, rule)
    if refusal is not None:
        return (), refusal
    cuts = cuts_of(weights, rule)
    period = cut_period(weights, rule)
    return cuts, "" if cuts else f"its {weights.layers} layers repeat with a period of {period} and cannot be cut"


def _kv_bytes(weights: Weights, width: int, windows: tuple[int, ...]) -> tuple[int, ...]:
    heads = weights.per_layer("attention.head_count", 0, HEADS_MAX)
    default = width // max(1, *heads)
    keys = weights.whole("attention.key_length", default, WIDTH_MAX)
    values = weights.whole("attention.value_length", default, WIDTH_MAX)
    if weights.hyper("attention.key_length_mla") is not None:
        values = 0  # Compressed attention keeps one vector for both.
    near = weights.whole("attention.key_length_swa", keys, WIDTH_MAX)
    near += weights.whole("attention.value_length_swa", values, WIDTH_MAX)
    return tuple(
        0 if _recurrent(block) else count * (near if window else keys + values) * KV_ITEM_BYTES
        for block, count, window in zip(weights.blocks, _heads_kv(weights), windows, strict=True)
    )


def _heads_kv(weights: Weights) -> tuple[int, ...]:
    heads = weights.per_layer("attention.head_count", 0, HEADS_MAX)
    if weights.hyper("attention.head_count_kv") is None:
        return heads
    return weights.per_layer("attention.head_count_kv", 0, HEADS_MAX)


def _recurrent(block: dict[str, Placed]) -> bool:
    """A layer with a state of fixed size in place of keys and values."""
    return any(name.startswith(("ssm_", "time_mix_", "shortconv.")) for name in block) and "attn_k.weight" not in block


def _state_bytes(weights: Weights) -> tuple[int, ...]:
    inner = weights.whole("ssm.inner_size", 0, WIDTH_MAX)
    state = weights.whole("ssm.state_size", 0, WIDTH_MAX)
    groups = weights.whole("ssm.group_count", 0, HEADS_MAX)
    kernel = weights.whole("ssm.conv_kernel", 0, 1024)
    size = 4 * (max(0, kernel - 1) * (inner + 2 * groups * state) + state * inner)
    if size == 0:
        return ()
    return tuple(size if any(name.startswith("ssm_") for name in block) else 0 for block in weights.blocks)


def _vocabulary(weights: Weights) -> int:
    tokens = weights.value("tokenizer.ggml.tokens")
    if isinstance(tokens, Array):
        return min(tokens.count, VOCABULARY_MAX)
    return weights.whole("vocab_size", 0, VOCABULARY_MAX)


def _causal(weights: Weights) -> bool:
    return weights.hyper("attention.causal") is not False


def _flag(weights: Weights, key: str) -> bool | None:
    value = weights.value(f"tokenizer.ggml.{key}")
    return value if isinstance(value, bool) else None


def _bytes(placed: Placed) -> int:
    return placed.tensor.length


def _elements(placed: Placed) -> int:
    kind = TENSOR_TYPES[placed.tensor.kind]
    return placed.tensor.length // kind.size * kind.block
