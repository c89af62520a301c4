"""Case 36, model files: whatever a GGUF says of itself, reading it ends soon, in little memory: answered or refused."""

import random
import struct
import time
import tracemalloc

import pytest

from meshnode.llm.gguf.errors import GgufError
from meshnode.llm.gguf.facts import language_of, shape_of
from meshnode.llm.gguf.header import read_header
from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import PrefixSource
from meshnode.llm.gguf.weights import open_weights
from tests.support.gguf_files import GgufFile, text

MUTANTS = 20_000
# What liars write where a number stands: the edges of every width, and products that wrap around.
EDGES = [0, 1, 3, 7, 8, 9, 12, 13, 31, 255, 256, 65_535, 1 << 31, (1 << 31) - 1, (1 << 32) - 1]
EDGES += [1 << 32, 1 << 40, (1 << 61) + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def model() -> GgufFile:
    """A file of each kind of key, small enough that a mutation hits something."""
    file = GgufFile()
    file.key("general.architecture", "str", "gemma3")
    file.key("general.alignment", "u32", 32)
    for key, value in [("block_count", 2), ("embedding_length", 32), ("attention.head_count", 2)]:
        file.key(f"gemma3.{key}", "u32", value)
    file.key("gemma3.attention.sliding_window", "u32", 4)
    file.key("gemma3.attention.head_count_kv", "[u32]", [1, 2])
    file.key("gemma3.feed_forward_length", "[i32]", [64, 64])
    file.key("tokenizer.ggml.model", "str", "llama")
    file.key("tokenizer.ggml.tokens", "[str]", ["<s>", "a", "bc", ""])
    file.key("tokenizer.ggml.scores", "[f32]", [0.0] * 4)
    file.key("tokenizer.chat_template", "str", "{{ x }}")
    file.key("tokenizer.chat_templates", "[str]", ["a"])
    file.tensor("token_embd.weight", (32, 4), 8, bytes(136))
    file.tensor("output_norm.weight", (32,), 0, bytes(128))
    for block in range(2):
        file.tensor(f"blk.{block}.attn_k.weight", (32, 16), 1, bytes(1024))
    return file


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four small changes: bits, numbers at any place, pieces removed, doubled or moved, the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed))
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 8] = struct.pack("<Q", rng.choice(EDGES))
            case 2:
                changed[at : at + 4] = struct.pack("<I", rng.choice(EDGES) & 0xFFFFFFFF)
            case 3:
                del changed[at : at + rng.randint(1, 16)]
            case 4:
                start = rng.randrange(len(changed))
                changed[at:at] = changed[start : start + rng.randint(1, 64)]
            case _:
                del changed[max(at, 24) :]
    return bytes(changed)


def everything_of(data: bytes) -> None:
    """All that an agent does with a header."""
    weights = open_weights([PrefixSource(data, len(data))])
    shape = shape_of(weights)
    language_of(weights)
    for cut in shape.cuts[:2]:
        part = slice_layers(weights, 0, cut, tail=True)
        part.file.read_at(weights.sources, 0, 4096)


def test_case_36_twenty_thousand_mutants_are_answered_or_refused() -> None:
    head = model().header()
    body = model().bytes()[len(head) :]
    everything_of(head + body)
    rng = random.Random(36)
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(MUTANTS):
            try:
                everything_of(mutated(head, rng) + body)
            except GgufError:
                refused += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    # Most changes are seen; those in names, texts and numbers that may be anything are not.
    assert MUTANTS // 2 < refused < MUTANTS


@pytest.mark.parametrize("count", [1 << 20, (1 << 22) + 1, 1 << 40, 1 << 61])
@pytest.mark.parametrize("kind", [0, 8, 10, 12])
def test_case_36_a_lying_count_takes_neither_time_nor_memory(kind: int, count: int) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, kind, count) + bytes(1000)
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(GgufError):
            read_header(PrefixSource(data, len(data)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert time.process_time() - start < 0.5


def test_case_36_a_sparse_file_of_empty_strings_ends_soon() -> None:
    """Nothing lies here: every count is true, and the file is as large as it says. Only the limits end it."""

    class Nothing:
        """Zeros for ever: strings of no length."""

        size = 1 << 45

        def read_at(self, offset: int, length: int) -> bytes:
            head = b"GGUF" + struct.pack("<IQQ", 3, 0, 4000) + text("k") + struct.pack("<IIQ", 9, 8, (1 << 22) - 1)
            return (head[offset:] + bytes(length))[:length] if offset < len(head) else bytes(length)

    start = time.process_time()
    with pytest.raises(GgufError):
        read_header(Nothing())
    assert time.process_time() - start < 20
