"""Slices as files: which bytes come from where, what changed in the header, what is refused."""

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from meshnode.llm.gguf.errors import GgufError
from meshnode.llm.gguf.facts import shape_of
from meshnode.llm.gguf.header import Array, Header, numbers_of, read_header
from meshnode.llm.gguf.pieces import Zeros
from meshnode.llm.gguf.rules import REFUSED, RULES, rule_of
from meshnode.llm.gguf.slicing import Slice, slice_layers
from meshnode.llm.gguf.source import FileSource, PrefixSource
from meshnode.llm.gguf.weights import Weights, open_weights
from meshnode.llm.gguf.writing import write_file
from tests.llm.gguf.certification import BEGIN, DOCUMENT, END, runs, table
from tests.support.gguf_files import GgufFile, split
from tests.support.tiny_models import MODELS, Maker, tiny_model


def opened(*files: GgufFile) -> Weights:
    return open_weights([PrefixSource(data, len(data)) for data in (file.bytes() for file in files)])


def content(weights: Weights, cut: Slice) -> bytes:
    return cut.file.read_at(weights.sources, 0, cut.file.size)


def parsed(weights: Weights, cut: Slice) -> tuple[Header, dict[str, bytes]]:
    """The slice as a file of its own, and its tensors' bytes."""
    data = content(weights, cut)
    header = read_header(PrefixSource(data, len(data)))
    return header, {tensor.name: data[tensor.offset : tensor.offset + tensor.length] for tensor in header.tensors}


def number(header: Header, key: str) -> Any:
    return header.fields[key].value


def items(weights: Weights, cut: Slice, key: str) -> list[Any]:
    data = content(weights, cut)
    source = PrefixSource(data, len(data))
    array = read_header(source).fields[key].value
    assert isinstance(array, Array)
    return list(numbers_of(source, array, count_max=99))


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("tail", [False, True])
def test_the_stages_hold_every_layer_once(architecture: str, tail: bool) -> None:
    file = tiny_model(architecture)
    weights = opened(file)
    original = {name: data for name, _, _, data in file.tensors}
    seen: set[str] = set()
    for first, last in pairwise([0, 4, 8] if RULES[architecture].cut_every == 4 else [0, 2, 6, 8]):
        cut = slice_layers(weights, first, last, tail=tail)
        header, tensors = parsed(weights, cut)
        extra = 1 if tail and last < 8 and shape_of(weights).layer_input else 0
        assert number(header, f"{architecture}.block_count") == last - first + extra
        for name, data in tensors.items():
            if not name.startswith("blk."):
                continue
            _, layer, rest = name.split(".", 2)
            if int(layer) == last - first:
                assert not any(data)
                continue
            assert original[f"blk.{int(layer) + first}.{rest}"] == data
            seen.add(f"blk.{int(layer) + first}.{rest}")
    assert seen == {name for name in original if name.startswith("blk.")}


def test_who_has_the_vocabulary_the_embedding_and_the_head() -> None:
    file = tiny_model("llama")
    weights, original = opened(file), {name: data for name, _, _, data in file.tensors}
    (first, a), (middle, b), (last, c) = (
        parsed(weights, slice_layers(weights, *cut)) for cut in [(0, 3), (3, 5), (5, 8)]
    )
    assert number(first, "tokenizer.ggml.model") == number(last, "tokenizer.ggml.model") == "llama"
    assert number(middle, "tokenizer.ggml.model") == "no_vocab"
    assert number(middle, "llama.vocab_size") == 1
    assert not any(key.startswith("tokenizer.") for key in middle.fields if key != "tokenizer.ggml.model")
    assert a["token_embd.weight"] == original["token_embd.weight"]
    assert len(b["token_embd.weight"]) < 256
    assert not any(b["token_embd.weight"])
    assert c["token_embd.weight"] == original["output.weight"]
    assert c["output_norm.weight"] == original["output_norm.weight"]
    assert not any(a["output_norm.weight"] + b["output_norm.weight"])
    assert not any("output.weight" in tensors for tensors in (a, b, c))
    assert all(tensors["rope_freqs.weight"] == original["rope_freqs.weight"] for tensors in (a, b, c))


def test_a_tied_head_is_on_both_ends() -> None:
    file = tiny_model("qwen2")
    weights, original = opened(file), {name: data for name, _, _, data in file.tensors}
    for cut in [(0, 3), (5, 8)]:
        assert parsed(weights, slice_layers(weights, *cut))[1]["token_embd.weight"] == original["token_embd.weight"]


def test_where_llama_cpp_insists_on_a_head_it_is_zero() -> None:
    file = tiny_model("gpt-oss")
    weights, original = opened(file), {name: data for name, _, _, data in file.tensors}
    first, middle, last = (parsed(weights, slice_layers(weights, *cut))[1] for cut in [(0, 3), (3, 5), (5, 8)])
    assert not any(first["output.weight"] + middle["output.weight"] + last["token_embd.weight"])
    assert last["output.weight"] == original["output.weight"]


def test_arrays_for_each_layer_are_cut() -> None:
    maker = Maker("llama", (1,), 6, 0)
    maker.put("attention.head_count_kv", "[u32]", [1, 2, 3, 4, 5, 6])
    maker.put("rope.dimension_sections", "[i32]", [1, 2, 3, 4, 5, 6])
    maker.put("some.flags", "[bool]", [True, False, True, True, False, True])
    MODELS["llama"](maker)
    keys = [name for name, _ in maker.file.fields]
    del maker.file.fields[len(keys) - 1 - keys[::-1].index("llama.attention.head_count_kv")]
    weights = opened(maker.file)
    cut = slice_layers(weights, 2, 4)
    assert items(weights, cut, "llama.attention.head_count_kv") == [3, 4]
    assert items(weights, cut, "llama.some.flags") == [True, True]
    assert items(weights, cut, "llama.rope.dimension_sections") == [1, 2, 3, 4, 5, 6]
    assert items(weights, slice_layers(weights, 2, 4, tail=True), "llama.attention.head_count_kv") == [3, 4, 5]


def test_a_shorter_array_is_refused_not_guessed() -> None:
    file = tiny_model("llama")
    file.key("llama.some.list", "[u32]", [1, 2, 3])
    weights = opened(file)
    with pytest.raises(GgufError, match=r"llama\.some\.list has 3 items"):
        slice_layers(weights, 0, 4)


def test_windows_keep_their_place() -> None:
    weights = opened(tiny_model("gemma3", layers=12))
    key = "gemma3.attention.sliding_window_pattern"
    assert items(weights, slice_layers(weights, 4, 9), key) == [1, 0, 1, 1, 1]
    weights = opened(tiny_model("gpt-oss", layers=12))
    key = "gpt-oss.attention.sliding_window_pattern"
    assert items(weights, slice_layers(weights, 4, 9), key) == [1, 0, 1, 0, 1]
    assert items(weights, slice_layers(weights, 4, 9, tail=True), key) == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("architecture", MODELS)
def test_a_tail_is_added_only_where_a_layers_input_can_be_read(architecture: str) -> None:
    weights = opened(tiny_model(architecture))
    edge = shape_of(weights).cuts[0]
    cut = slice_layers(weights, 0, edge, tail=True)
    assert cut.tail is shape_of(weights).layer_input
    if not cut.tail:
        assert content(weights, cut) == content(weights, slice_layers(weights, 0, edge))


def test_dense_layers_at_the_front_are_counted_off() -> None:
    weights = opened(tiny_model("ernie4_5-moe"))
    key = "ernie4_5-moe.leading_dense_block_count"
    found = [number(parsed(weights, slice_layers(weights, *cut))[0], key) for cut in [(0, 2), (2, 4), (4, 8)]]
    assert found == [3, 1, 0]


def test_scales_and_positions_apply_once() -> None:
    weights = opened(tiny_model("granite"))
    scales = [
        number(parsed(weights, slice_layers(weights, *cut))[0], "granite.embedding_scale") for cut in [(0, 2), (2, 8)]
    ]
    assert scales == [12.0, 1.0]
    weights = opened(tiny_model("gpt2"))
    positions = [parsed(weights, slice_layers(weights, *cut))[1]["position_embd.weight"] for cut in [(0, 2), (2, 8)]]
    assert any(positions[0])
    assert not any(positions[1])


def test_appended_prediction_heads_are_left_out() -> None:
    maker = Maker("llama", (1,), 5, 0)
    maker.put("nextn_predict_layers", "u32", 1)
    MODELS["llama"](maker)
    weights = opened(maker.file)
    assert weights.layers == 4
    header, tensors = parsed(weights, slice_layers(weights, 2, 4))
    assert number(header, "llama.nextn_predict_layers") == 0
    assert number(header, "llama.block_count") == 2
    assert not any(name.startswith("blk.2.") for name in tensors)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 2), (-1, 4), (0, 9), (8, 8)])
def test_ranges_that_are_none_are_refused(first: int, last: int) -> None:
    with pytest.raises(GgufError, match="not part of a model of 8"):
        slice_layers(opened(tiny_model("llama")), first, last)


def test_periods_hold_the_cuts() -> None:
    weights = opened(tiny_model("smollm3"))
    for first, last in [(0, 3), (3, 8), (2, 4)]:
        with pytest.raises(GgufError, match="multiples of 4"):
            slice_layers(weights, first, last)
    assert slice_layers(weights, 4, 8).first == 4


def test_a_stage_of_windowed_models_needs_a_window() -> None:
    weights = opened(tiny_model("gpt-oss"))
    with pytest.raises(GgufError, match="wants a layer with a window"):
        slice_layers(weights, 7, 8)
    assert slice_layers(weights, 6, 7).file.size


@pytest.mark.parametrize("architecture", MODELS)
def test_whichever_cuts_are_chosen_no_stage_is_refused(architecture: str) -> None:
    weights = opened(tiny_model(architecture))
    edges = [0, *shape_of(weights).cuts, weights.layers]
    assert len(edges) > 2
    for first, last in combinations(edges, 2):
        slice_layers(weights, first, last, tail=True)


def test_what_cannot_be_cut_says_why() -> None:
    for architecture, reason in [*REFUSED.items(), ("mystery", "nobody has shown")]:
        maker = Maker(architecture, (1,), 2, 0)
        MODELS["llama"](maker)
        weights = opened(maker.file)
        assert isinstance(rule_of(weights), str)
        with pytest.raises(GgufError, match=reason[:20]):
            slice_layers(weights, 0, 1)
    with pytest.raises(GgufError, match="62 layers computes"):
        slice_layers(opened(tiny_model("gemma3", layers=62)), 0, 30)
    old = tiny_model("minicpm")
    old.fields = [field for field in old.fields if field[0] != "minicpm.residual_scale"]
    with pytest.raises(GgufError, match="convert the model again"):
        slice_layers(opened(old), 0, 4)
    odd = tiny_model("llama")
    odd.tensor("token_embd_norm.weight", (256,), 0, bytes(1024))
    with pytest.raises(GgufError, match="token_embd_norm"):
        slice_layers(opened(odd), 0, 4)


def test_a_slice_is_the_same_from_one_file_or_several_and_from_the_header_alone() -> None:
    file = tiny_model("llama")
    weights = opened(file)
    expected = content(weights, slice_layers(weights, 2, 6, tail=True))
    parts = opened(*split(file, [20, len(file.tensors) - 20]))
    assert content(parts, slice_layers(parts, 2, 6, tail=True)) == expected
    head, size = file.header(), len(file.bytes())
    remote = open_weights([PrefixSource(head, size)])
    cut = slice_layers(remote, 2, 6, tail=True)
    whole = file.bytes()
    rebuilt = bytearray(cut.file.size)
    for need in cut.file.needed():
        rebuilt[need.at : need.at + need.length] = whole[need.offset : need.offset + need.length]
    assert cut.file.read_at(remote.sources, 0, cut.head_bytes) == expected[: cut.head_bytes]
    assert read_header(PrefixSource(expected[: cut.head_bytes], len(expected))).data_offset == cut.head_bytes
    copied = sum(need.length for need in cut.file.needed())
    assert copied == cut.file.bytes_needed()
    at = 0
    for piece in cut.file.pieces:
        if not isinstance(piece, Zeros) and hasattr(piece, "data"):
            rebuilt[at : at + piece.length] = piece.data
        at += piece.length
    assert bytes(rebuilt) == expected


@pytest.mark.parametrize("tail", [False, True])
def test_a_stage_receives_its_layers_and_hardly_more(tail: bool) -> None:
    file = tiny_model("llama", "Q8_0", layers=8)
    weights = opened(file)
    cut = slice_layers(weights, 2, 6, tail=tail)
    own = sum(len(data) for name, _, _, data in file.tensors if name.split(".")[1] in "2345")
    assert own <= cut.file.bytes_needed() <= 1.02 * own


def test_reading_anywhere_gives_the_same_bytes() -> None:
    weights = opened(tiny_model("llama", layers=3))
    cut = slice_layers(weights, 1, 2, tail=True)
    data = content(weights, cut)
    for at in [0, 1, 23, 24, 1000, 5000, cut.file.size - 3, cut.file.size, cut.file.size + 5]:
        for length in [0, 1, 7, 4096, 200_000]:
            assert cut.file.read_at(weights.sources, at, length) == data[at : at + length]


def test_a_written_slice_can_be_cut_again(tmp_path: Path) -> None:
    """A peer that holds layers 2 to 6 can give 3 to 5: what it holds is a model too."""
    weights = opened(tiny_model("llama"))
    path = tmp_path / "slice.gguf"
    write_file(slice_layers(weights, 2, 6).file, weights.sources, path)
    with FileSource(path) as source:
        middle = open_weights([source])
        again = parsed(middle, slice_layers(middle, 1, 3))[1]
    direct = parsed(weights, slice_layers(weights, 3, 5))[1]
    assert {name: data for name, data in again.items() if name.startswith("blk.")} == {
        name: data for name, data in direct.items() if name.startswith("blk.")
    }


def test_the_document_is_the_certifications() -> None:
    exact = table(dict.fromkeys(runs(), 0.0))
    assert f"{BEGIN}\n{exact}\n{END}" in DOCUMENT.read_text(encoding="utf-8")


def test_the_document_names_every_refusal() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    for name, reason in REFUSED.items():
        assert f"| `{name}` | {reason} |" in lines
