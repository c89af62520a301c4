"""A llama network as plain functions on a dictionary of tensors that bear GGUF's names, and its two optimisers."""

from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional

Tensors = dict[str, Any]


class Shape(NamedTuple):
    """The measures of the network."""

    layers: int = 8
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    inner: int = 512
    vocabulary: int = 1536
    rope_base: float = 10_000.0
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        """Numbers of one attention head."""
        return self.width // self.heads


def fresh(shape: Shape, seed: int) -> Tensors:
    """Random weights; what writes into the residual stream starts small."""
    generator = torch.Generator().manual_seed(seed)
    kv = shape.kv_heads * shape.head
    quiet = (2 * shape.layers) ** -0.5
    tensors: Tensors = {}

    def made(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        tensors[name] = torch.randn(rows, columns, generator=generator) * columns**-0.5 * scale

    made("token_embd.weight", shape.vocabulary, shape.width)
    made("output.weight", shape.vocabulary, shape.width, 0.1)
    tensors["output_norm.weight"] = torch.ones(shape.width)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        tensors[block + "attn_norm.weight"] = torch.ones(shape.width)
        tensors[block + "ffn_norm.weight"] = torch.ones(shape.width)
        made(block + "attn_q.weight", shape.width, shape.width)
        made(block + "attn_k.weight", kv, shape.width)
        made(block + "attn_v.weight", kv, shape.width)
        made(block + "attn_output.weight", shape.width, shape.width, quiet)
        made(block + "ffn_gate.weight", shape.inner, shape.width)
        made(block + "ffn_up.weight", shape.inner, shape.width)
        made(block + "ffn_down.weight", shape.width, shape.inner, quiet)
    for tensor in tensors.values():
        tensor.requires_grad_()
    return tensors


def _norm(x: Any, weight: Any, epsilon: float) -> Any:
    return functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), epsilon)


def _turned(x: Any, circle: Any) -> Any:
    # llama.cpp turns neighbouring pairs for this architecture; so no permutation is needed when the file is written.
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * circle).flatten(-2).to(x.dtype)


def hidden(tensors: Tensors, shape: Shape, tokens: Any, mask: Any, dtype: Any) -> Any:
    """Normed states (rows, length, width) of tokens (rows, length); `mask` (rows, 1, length, length): what is seen."""
    rows, length = tokens.shape
    frequencies = shape.rope_base ** (-torch.arange(0, shape.head, 2) / shape.head)
    angles = torch.outer(torch.arange(length), frequencies)
    circle = torch.polar(torch.ones_like(angles), angles)
    weight = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    x = functional.embedding(tokens, weight["token_embd.weight"])
    group = shape.heads // shape.kv_heads
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        y = _norm(x, weight[block + "attn_norm.weight"], shape.epsilon)
        query, key, value = (
            (y @ weight[block + name].T).view(rows, length, -1, shape.head).transpose(1, 2)
            for name in ("attn_q.weight", "attn_k.weight", "attn_v.weight")
        )
        query, key = _turned(query, circle), _turned(key, circle)
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + seen.transpose(1, 2).reshape(rows, length, shape.width) @ weight[block + "attn_output.weight"].T
        y = _norm(x, weight[block + "ffn_norm.weight"], shape.epsilon)
        y = functional.silu(y @ weight[block + "ffn_gate.weight"].T) * (y @ weight[block + "ffn_up.weight"].T)
        x = x + y @ weight[block + "ffn_down.weight"].T
    return _norm(x, weight["output_norm.weight"], shape.epsilon)


_NEWTON: Final = (3.4445, -4.7750, 2.0315)
NEWTON_STEPS: Final = 5


def _orthogonal(stack: Any, dtype: Any) -> Any:
    """The nearest orthogonal matrices, roughly, by a Newton-Schulz iteration on all of one shape at once."""
    x = stack.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _NEWTON
    for _ in range(NEWTON_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(stack.dtype)


class Muon:
    """Momentum with orthogonal steps for the layers' matrices (Jordan et al. 2024): far fewer steps than with Adam."""

    def __init__(self, tensors: Tensors, momentum: float = 0.95) -> None:
        shapes: dict[Any, list[Any]] = {}
        for tensor in tensors.values():
            shapes.setdefault(tuple(tensor.shape), []).append(tensor)
        self._groups = [(group, torch.zeros(len(group), *shape)) for shape, group in shapes.items()]
        self._momentum = momentum

    def step(self, rate: float, decay: float, dtype: Any) -> None:
        """One step on the gradients that are there."""
        for group, velocity in self._groups:
            gradient = torch.stack([tensor.grad for tensor in group])
            velocity.mul_(self._momentum).add_(gradient)
            update = _orthogonal(gradient + self._momentum * velocity, dtype)
            scale = rate * max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            for tensor, change in zip(group, update, strict=True):
                tensor.mul_(1 - rate * decay).sub_(change, alpha=scale)
