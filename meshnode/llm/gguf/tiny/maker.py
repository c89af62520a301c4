"""Puts a model of random weights together: keys, a vocabulary, tensors. Which ones, the architectures say."""

import random
import struct
from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, Final

from meshnode.llm.gguf.tiny.layout import GgufFile

F32, F16, Q4_0, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 8, 12, 13, 14, 30
FILE_TYPES: Final[Mapping[int, int]] = MappingProxyType(
    {F32: 0, F16: 1, Q4_0: 2, Q8_0: 7, Q4_K: 15, Q5_K: 17, Q6_K: 18, BF16: 32}
)
VOCABULARY: Final = 320

_POOL = 16_381
_POOL_BLOCKS = 1021
_LEVELS = [NormalDist().inv_cdf((index + 0.5) / 256) for index in range(256)]


class Maker:
    """Adds keys under the architecture's name, and tensors of random weights."""

    def __init__(self, architecture: str, kinds: Sequence[int], layers: int, seed: int, **sizes: int) -> None:
        self.file = GgufFile()
        self.arch, self.kinds, self.layers = architecture, cycle(kinds), layers
        self.rng = random.Random(f"{architecture} {seed}")
        self.d = sizes.get("d", 256)
        self.heads = sizes.get("heads", 4)
        self.kv_heads = sizes.get("kv_heads", 2)
        self.head = sizes.get("head", 64)
        self.ff = sizes.get("ff", 512)
        self.file.key("general.architecture", "str", architecture)
        # Not named after the architecture: llama.cpp expects certain tokens of a model whose name says phi3.
        self.file.key("general.name", "str", "tiny random")
        self.file.key("general.file_type", "u32", FILE_TYPES[kinds[0]])
        self.file.key("general.quantization_version", "u32", 2)

    def put(self, key: str, kind: str, value: Any) -> None:
        self.file.key(f"{self.arch}.{key}", kind, value)

    def weight(self, name: str, *dims: int, kind: int | None = None) -> None:
        """A matrix; `dims` row length first. Scaled so that what comes out is as large as what goes in."""
        kind = next(self.kinds) if kind is None else kind
        count = 1
        for dim in dims:
            count *= dim
        self.file.tensor(name + ".weight", dims, kind, self._values(kind, count, dims[0] ** -0.5))

    def norm(self, name: str, size: int, *, bias: bool = False) -> None:
        self.file.tensor(name + ".weight", (size,), F32, self._around(size, 1.0, 0.1))
        if bias:
            self.bias(name, size)

    def bias(self, name: str, *dims: int) -> None:
        count = 1
        for dim in dims:
            count *= dim
        self.file.tensor(name + ".bias", dims, F32, self._around(count, 0.0, 0.05))

    def plain(self, name: str, size: int, around: float = 0.0) -> None:
        """A vector of F32."""
        self.file.tensor(name + ".weight", (size,), F32, self._around(size, around, 0.1))

    def _around(self, count: int, middle: float, spread: float) -> bytes:
        return self._drawn(count, 4, [struct.pack("<f", middle + spread * level) for level in _LEVELS])

    def _values(self, kind: int, count: int, scale: float) -> bytes:
        if kind == F32:
            return self._around(count, 0.0, scale)
        if kind == F16:
            return self._drawn(count, 2, [struct.pack("<e", scale * level) for level in _LEVELS])
        if kind == BF16:
            return self._drawn(count, 2, [struct.pack("<f", scale * level)[2:] for level in _LEVELS])
        if kind == Q8_0:
            return self._blocks(count // 32, struct.pack("<e", scale / 73), 32)
        if kind == Q4_0:
            return self._blocks(count // 32, struct.pack("<e", scale / 4.6), 16)
        # Q4_K: a value is d * scale * (0..15) - dmin * minimum, each scale and minimum of 6 random bits.
        if kind == Q4_K:
            return self._blocks(count // 256, struct.pack("<ee", scale / 150, scale / 20), 140)
        if kind == Q5_K:  # the same with 0..31
            return self._blocks(count // 256, struct.pack("<ee", scale / 300, scale / 20), 172)
        # Q6_K: a value is d * scale * (-32..31), each scale of 8 random bits.
        return self._blocks(count // 256, b"", 208, struct.pack("<e", scale / 1400))

    def _drawn(self, count: int, size: int, table: list[bytes]) -> bytes:
        pool = b"".join(map(table.__getitem__, self.rng.randbytes(min(count, _POOL))))
        return self._repeated(pool, count * size, size)

    def _blocks(self, count: int, head: bytes, body: int, tail: bytes = b"") -> bytes:
        pool = b"".join(head + self.rng.randbytes(body) + tail for _ in range(min(count, _POOL_BLOCKS)))
        size = len(head) + body + len(tail)
        return self._repeated(pool, count * size, size)

    def _repeated(self, pool: bytes, length: int, unit: int) -> bytes:
        """Large matrices repeat a pool whose length no row length divides: no two rows are alike, and it is quick."""
        if length <= len(pool):
            return pool[:length]
        start = self.rng.randrange(len(pool) // unit) * unit
        return (pool * (length // len(pool) + 2))[start : start + length]

    def vocabulary(self) -> None:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        kinds = [2, 3, 3] + [6] * 256
        words = VOCABULARY - len(tokens)
        self.file.key("tokenizer.ggml.model", "str", "llama")
        self.file.key("tokenizer.ggml.tokens", "[str]", tokens + [f"\u2581w{word}" for word in range(words)])
        self.file.key("tokenizer.ggml.scores", "[f32]", [0.0] * len(tokens) + [-float(word) for word in range(words)])
        self.file.key("tokenizer.ggml.token_type", "[i32]", kinds + [1] * words)
        for name, token in (("bos", 1), ("eos", 2), ("unknown", 0)):
            self.file.key(f"tokenizer.ggml.{name}_token_id", "u32", token)

    def sizes(self, *, context: int = 2048, rope: float = 10000.0, ff: bool = True, head: bool = False) -> None:
        """The keys that nearly every architecture has."""
        self.put("context_length", "u32", context)
        self.put("embedding_length", "u32", self.d)
        self.put("block_count", "u32", self.layers)
        if ff:
            self.put("feed_forward_length", "u32", self.ff)
        self.put("attention.head_count", "u32", self.heads)
        self.put("attention.head_count_kv", "u32", self.kv_heads)
        self.put("rope.freq_base", "f32", rope)
        if head:
            self.put("attention.key_length", "u32", self.head)
            self.put("attention.value_length", "u32", self.head)
        self.put("rope.dimension_count", "u32", self.head)

    def rms(self) -> None:
        self.put("attention.layer_norm_rms_epsilon", "f32", 1e-5)

    def ends(self, *, output: bool = True, bias: bool = False) -> None:
        self.weight("token_embd", self.d, VOCABULARY)
        self.norm("output_norm", self.d, bias=bias)
        if output:
            self.weight("output", self.d, VOCABULARY)

    def qkv(self, block: str, *, bias: bool = False, fused: bool = False) -> None:
        widths = {"q": self.heads * self.head, "k": self.kv_heads * self.head, "v": self.kv_heads * self.head}
        if fused:
            self.weight(block + "attn_qkv", self.d, sum(widths.values()))
        for name, width in widths.items() if not fused else ():
            self.weight(f"{block}attn_{name}", self.d, width)
            if bias:
                self.bias(f"{block}attn_{name}", width)
        self.weight(block + "attn_output", self.heads * self.head, self.d)

    def gated(self, block: str) -> None:
        self.weight(block + "ffn_gate", self.d, self.ff)
        self.weight(block + "ffn_up", self.d, self.ff)
        self.weight(block + "ffn_down", self.ff, self.d)

    def experts(self, block: str, count: int, ff: int, *, bias: bool = False) -> None:
        self.weight(block + "ffn_gate_inp", self.d, count, kind=F32)
        self.weight(block + "ffn_gate_exps", self.d, ff, count)
        self.weight(block + "ffn_up_exps", self.d, ff, count)
        self.weight(block + "ffn_down_exps", ff, self.d, count)
        if bias:
            self.bias(block + "ffn_gate_inp", count)
            self.bias(block + "ffn_gate_exps", ff, count)
            self.bias(block + "ffn_up_exps", ff, count)
            self.bias(block + "ffn_down_exps", self.d, count)

    def shared_expert(self, block: str, ff: int) -> None:
        self.weight(block + "ffn_gate_shexp", self.d, ff)
        self.weight(block + "ffn_up_shexp", self.d, ff)
        self.weight(block + "ffn_down_shexp", ff, self.d)

    def blocks(self) -> list[str]:
        return [f"blk.{layer}." for layer in range(self.layers)]
