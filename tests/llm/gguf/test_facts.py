"""Sizes, cuts, tokens and templates from the header alone."""

import pytest

from meshnode.llm.gguf.errors import GgufError
from meshnode.llm.gguf.facts import language_of, quantisation_of, shape_of
from meshnode.llm.gguf.source import PrefixSource
from meshnode.llm.gguf.weights import Weights, open_weights
from tests.support.gguf_files import GgufFile, split
from tests.support.tiny_models import MODELS, VOCABULARY, Maker, tiny_model


def opened(*files: GgufFile) -> Weights:
    return open_weights([PrefixSource(data, len(data)) for data in (file.bytes() for file in files)])


@pytest.mark.parametrize("architecture", MODELS)
def test_the_sizes_add_up_to_the_file(architecture: str) -> None:
    file = tiny_model(architecture)
    shape = shape_of(opened(file))
    assert shape.total_bytes == sum(len(data) for *_, data in file.tensors)
    assert (shape.layers, shape.n_embd, shape.n_vocab) == (8, 256, VOCABULARY)
    assert shape.context_max in (512, 2048)
    assert shape.kv_bytes_per_token == (shape.heads_kv * 64 * 2 * 2,) * 8
    assert (shape.heads, shape.quantisation) == (4, "F16")
    assert shape.heads_kv == (4 if architecture in ("dots1", "gpt2", "olmoe", "phi2", "starcoder") else 2)
    assert shape.parameters == sum(len(data) // (4 if kind == 0 else 2) for _, _, kind, data in file.tensors)
    assert not shape.embeds


def test_a_header_alone_is_enough() -> None:
    file = tiny_model("gemma3")
    size = len(file.bytes())
    assert shape_of(open_weights([PrefixSource(file.header(), size)])) == shape_of(opened(file))


def test_windows_and_cuts_follow_the_pattern() -> None:
    assert shape_of(opened(tiny_model("gemma3", layers=12))).window_tokens == (16, 16, 16, 16, 16, 0) * 2
    assert shape_of(opened(tiny_model("gpt-oss"))).window_tokens == (16, 0) * 4
    assert shape_of(opened(tiny_model("llama"))).cuts == tuple(range(1, 8))
    assert shape_of(opened(tiny_model("gpt-oss"))).cuts == (2, 4, 6)
    assert shape_of(opened(tiny_model("gemma3", layers=12))).cuts == (1, 2, 3, 4, 6, 7, 8, 9, 10)
    assert shape_of(opened(tiny_model("smollm3", layers=12))).cuts == (4, 8)
    assert shape_of(opened(tiny_model("smollm3", layers=4))).cuts == ()
    assert "period of 4" in shape_of(opened(tiny_model("smollm3", layers=4))).uncut_reason
    assert shape_of(opened(tiny_model("qwen3moe"))).experts_used == 2
    assert shape_of(opened(tiny_model("llama"))).layer_input
    assert not shape_of(opened(tiny_model("qwen2"))).layer_input


def test_an_unknown_architecture_runs_whole_and_says_why() -> None:
    maker = Maker("mystery", (1,), 2, 0)
    MODELS["llama"](maker)
    shape = shape_of(opened(maker.file))
    assert shape.cuts == ()
    assert "'mystery' cannot be split" in shape.uncut_reason
    assert shape.layers == 2


def test_split_files_are_one_model() -> None:
    file = tiny_model("llama", layers=4)
    count = len(file.tensors)
    parts = split(file, [5, 0, count - 5])
    assert shape_of(opened(*parts)) == shape_of(opened(file))
    for wrong, words in [(parts[:2], "3 files"), ([parts[0], parts[2], parts[1]], "another one")]:
        with pytest.raises(GgufError, match=words):
            opened(*wrong)
    lost = split(file, [5, count - 5])
    lost[1].tensors.pop()
    with pytest.raises(GgufError, match="together"):
        opened(*lost)


def test_a_hole_in_the_layers_is_refused() -> None:
    file = tiny_model("llama", layers=3)
    file.tensors = [tensor for tensor in file.tensors if not tensor[0].startswith("blk.1.")]
    with pytest.raises(GgufError, match="layer 1 of 3 has no tensors"):
        opened(file)
    file = tiny_model("llama", layers=3)
    file.tensor("blk.3.attn_norm.weight", (4,), 0, bytes(16))
    with pytest.raises(GgufError, match="beyond the 3"):
        opened(file)


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("embedding_length", "i32", -1),
        ("embedding_length", "u64", 1 << 40),
        ("context_length", "f32", 1.0),
        ("attention.head_count_kv", "[u32]", [2]),
        ("attention.head_count", "str", "four"),
    ],
)
def test_numbers_that_cannot_be_are_refused(key: str, kind: str, value: object) -> None:
    file = tiny_model("llama", layers=2)
    file.fields = [field for field in file.fields if field[0] != f"llama.{key}"]
    file.key(f"llama.{key}", kind, value)
    with pytest.raises(GgufError, match=key):
        shape_of(opened(file))


@pytest.mark.parametrize("count", [0, 513, 1 << 31])
def test_layers_are_counted_within_bounds(count: int) -> None:
    file = tiny_model("llama", layers=2)
    file.fields = [field for field in file.fields if field[0] != "llama.block_count"]
    file.key("llama.block_count", "u32", count)
    with pytest.raises(GgufError, match="block_count"):
        opened(file)


def test_how_it_talks() -> None:
    file = tiny_model("llama", layers=1)
    file.key("tokenizer.chat_template", "str", "{{ messages }}")
    file.key("tokenizer.chat_templates", "[str]", ["tool_use", "gone"])
    file.key("tokenizer.chat_template.tool_use", "str", "{{ tools }}")
    file.key("tokenizer.ggml.add_bos_token", "bool", False)
    file.key("tokenizer.ggml.eot_token_id", "u32", 7)
    language = language_of(opened(file))
    assert language.tokens == {"bos": 1, "eos": 2, "eot": 7, "unknown": 0}
    assert (language.adds_bos, language.adds_eos) == (False, None)
    assert language.template == "{{ messages }}"
    assert language.templates == {"tool_use": "{{ tools }}"}
    assert language.tokenizer == "llama"


def test_embedding_models_say_so() -> None:
    file = tiny_model("llama", layers=1)
    file.key("llama.pooling_type", "u32", 1)
    assert shape_of(opened(file)).embeds


def test_the_name_of_the_mixture() -> None:
    file = tiny_model("llama", "Q4_K", layers=1)
    assert quantisation_of(opened(file)) == "Q4_K_M"
    file.fields = [field for field in file.fields if field[0] != "general.file_type"]
    assert quantisation_of(opened(file)) == "Q4_K"
