"""What one node can hold of a model, and how long it needs for that: VRAM and RAM counted apart.

Layers go to devices from the last one backwards, as llama.cpp offloads them; the rest, the embedding and, unless every
layer of the stage is on a device, the head stay in RAM. A layer's KV lies where the layer lies.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import Final, NamedTuple

import msgspec

from protocol.sharding.offers import NodeOffer, Speed
from protocol.sharding.predict import MICRO_BATCH_ROWS
from protocol.sharding.shapes import ModelShape

COMPUTE_FIXED_BYTES: Final = 48 * 1024 * 1024
COMPUTE_ROW_VALUES: Final = 12  # values of n_embd width that a graph keeps a row
ATTENTION_ROWS: Final = 256  # rows of a step: what each of them pays to each token of the context is kept a head


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the pipeline shall serve: `slots` sequences of `context` tokens each; the rest only shapes predictions."""

    context: int = 4096
    slots: int = 1
    prompt_tokens: int = 512
    streams: int = 1
    stages_min: int = 1  # split over at least so many nodes, in equal parts: for trials, not for speed


class Placement(NamedTuple):
    """A stage on a node."""

    gpu_layers: int
    weight_bytes: int
    kv_bytes: int
    compute_bytes: int
    ram_bytes: int
    vram_bytes: tuple[int, ...]  # by device
    parts: tuple[tuple[Speed, int], ...]  # what is read for every step: processor, weight bytes


class Fitting:
    """Sizes of one model under one wish; ranges of layers are [first, end)."""

    def __init__(self, shape: ModelShape, wish: Wish) -> None:
        self.shape = shape
        self.wish = wish
        states = shape.state_bytes or (0,) * shape.layers
        windows = shape.window_tokens or (0,) * shape.layers
        self.kv = [
            wish.slots * (per * (min(wish.context, window) if window else wish.context) + state)
            for per, state, window in zip(shape.kv_bytes_per_token, states, windows, strict=True)
        ]
        self._weights = [0, *accumulate(shape.layer_bytes)]
        self._both = [0, *accumulate(w + k for w, k in zip(shape.layer_bytes, self.kv, strict=True))]
        self.cuts = [0, *shape.cuts, shape.layers]
        self._memo: dict[tuple[str, int, int], Placement | None] = {}

    def between(self, first: int, end: int) -> int:
        """Weights that every token reads in these layers, the head included."""
        return self._weights[end] - self._weights[first] + (self.shape.output_bytes if end == self.shape.layers else 0)

    def compute_bytes(self, end: int, *, on_device: bool = False) -> int:
        """Scratch memory of a stage's graph; the last one also holds logits. Devices never hold the whole attention of
        a step, processors do (decision 17).
        """
        attention = 0 if on_device else ATTENTION_ROWS * self.wish.context * self.shape.heads * 4
        rows = MICRO_BATCH_ROWS * self.shape.n_embd * 4 * COMPUTE_ROW_VALUES
        logits = self.wish.slots * self.shape.n_vocab * 4 if end == self.shape.layers else 0
        return COMPUTE_FIXED_BYTES + rows + logits + attention

    def needed_bytes(self, stages: int) -> int:
        """All that the model takes, wherever, in so many stages."""
        compute = self.compute_bytes(self.shape.layers) + (stages - 1) * self.compute_bytes(0)
        again = self.shape.tied_bytes if stages > 1 else 0
        shared = (stages - 1) * self.shape.shared_bytes
        return self.shape.total_bytes + again + shared + sum(self.kv) + compute

    def place(self, offer: NodeOffer, first: int, end: int) -> Placement | None:
        """The stage on this node, or None if it does not fit."""
        key = (offer.node, first, end)
        if key not in self._memo:
            self._memo[key] = self._place(offer, first, end)
        return self._memo[key]

    def _place(self, offer: NodeOffer, first: int, end: int) -> Placement | None:
        shape, both, weights = self.shape, self._both, self._weights
        compute = self.compute_bytes(end, on_device=True)
        top, vram, parts, taken_compute = end, [], [], 0
        for device in offer.devices:
            room = device.vram_free_bytes - compute
            low = max(first, bisect_left(both, both[top] - room)) if room > 0 else top
            low = min(low, top)
            used = both[top] - both[low]
            if top > low:
                parts.append((device.speed, weights[top] - weights[low]))
                used += compute
                taken_compute += compute
            vram.append(used)
            top = low
        head = shape.output_bytes if end == shape.layers else 0
        embed = shape.embed_bytes if first == 0 else 0
        # A tied head is the embedding: where both are in the RAM of one stage, it lies there once.
        once = shape.tied_bytes if head and first == 0 else 0
        if top > first:
            compute = self.compute_bytes(end)
        taken_compute += compute
        ram = both[top] - both[first] + compute + embed + shape.shared_bytes
        head_speed = offer.speed
        if head and top == first:
            for index, device in enumerate(offer.devices):
                if vram[index] and vram[index] + head <= device.vram_free_bytes:
                    vram[index] += head
                    head_speed, once = device.speed, 0
                    break
            else:
                ram += head - once
        else:
            ram += head - once
        if ram > offer.ram_free_bytes:
            return None
        if top > first:
            parts.append((offer.speed, weights[top] - weights[first]))
        if head:
            parts.append((head_speed, head))
        weight_bytes = weights[end] - weights[first] + head + embed - once + shape.shared_bytes
        kv_bytes = sum(self.kv[first:end])
        return Placement(end - top, weight_bytes, kv_bytes, taken_compute, ram, tuple(vram), tuple(parts))

    def reach(self, offer: NodeOffer, first: int) -> int:
        """The furthest cut `end` such that [first, end) fits on the node; `first` if not one piece does."""
        begin = bisect_right(self.cuts, first)
        low, high = begin - 1, len(self.cuts) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.place(offer, first, self.cuts[middle]) is not None:
                low = middle
            else:
                high = middle - 1
        return self.cuts[low] if low >= begin else first

    def low(self, offer: NodeOffer, end: int) -> int:
        """The lowest cut `first` such that [first, end) fits on the node; `end` if not one piece does."""
        low, high = 0, bisect_left(self.cuts, end)
        while low < high:
            middle = (low + high) // 2
            if self.place(offer, self.cuts[middle], end) is not None:
                high = middle
            else:
                low = middle + 1
        return self.cuts[low]

    def room(self, offer: NodeOffer) -> int:
        """Bytes that weights and KV may take on the node, its own graph's scratch memory taken off."""
        scratch = self.compute_bytes(0, on_device=True)
        devices = sum(max(0, device.vram_free_bytes - scratch) for device in offer.devices)
        return max(0, offer.ram_free_bytes - self.compute_bytes(0)) + devices
