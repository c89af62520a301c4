"""Writes the trained network as a GGUF file: Q8_0 matrices, F32 norms, vocabulary, chat template."""

from pathlib import Path
from typing import Any, Final

import gguf
import torch

from scripts.demo_model.material import TEMPLATE
from scripts.demo_model.network import Shape, Tensors
from scripts.demo_model.vocabulary import BOS, EOS, UNKNOWN, Vocabulary

CONTEXT: Final = 4096
NAME: Final = "meshnode-demo"
DESCRIPTION: Final = "A very small model that shows a mesh at work. It knows a few sentences, and says so."


def write(path: Path, vocabulary: Vocabulary, tensors: Tensors, shape: Shape) -> int:
    """Writes the file and returns its bytes."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, shape)
    _add_vocabulary(writer, vocabulary)
    for name, tensor in sorted(tensors.items()):
        values: Any = tensor.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size


def read(path: Path) -> tuple[Vocabulary, Tensors, Shape]:
    """What `write` wrote, the matrices as their 8 bits say: training goes on from there."""
    reader = gguf.GGUFReader(path)
    pieces = [str(piece) for piece in reader.fields["tokenizer.ggml.tokens"].contents()]
    vocabulary = Vocabulary(pieces[len(Vocabulary([]).pieces) :])
    tensors: Tensors = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        tensors[tensor.name] = values.float().requires_grad_()
    return vocabulary, tensors, Shape(vocabulary=len(pieces))


def _add_shape(writer: Any, shape: Shape) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(vocabulary.ids["<|im_end|>"])
    writer.add_pad_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
