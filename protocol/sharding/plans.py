"""What planning gives: a plan or a refusal, in figures and words."""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from protocol.ids import NodeId
from protocol.sharding.fitting import Fitting
from protocol.sharding.offers import NodeOffer

NODES_NAMED_MAX: Final = 8
GB: Final = 1e9

Cut = tuple[NodeOffer, int, int]
"""Layers [first, end) of the model on a node."""


class PlannedStage(msgspec.Struct, frozen=True, kw_only=True):
    """Layers [first, end) of the model on one node; bytes as they will lie in its memory."""

    node: NodeId
    name: str
    first: int
    end: int
    gpu_layers: int
    weight_bytes: int
    kv_bytes: int
    compute_bytes: int
    ram_bytes: int
    vram_bytes: tuple[int, ...]
    layers_held: int  # of its layers, how many lie on its disk already
    compute_s: float  # for one token


class Alternative(msgspec.Struct, frozen=True):
    """What was considered and not taken."""

    words: str
    tokens_per_s: float | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline, not loaded yet."""

    model: str
    engine: Literal["local", "pipeline", "rpc"]
    stages: tuple[PlannedStage, ...]
    tokens_per_s: float  # one stream
    streams: int
    streams_tokens_per_s: float
    prompt_tokens: int
    first_token_s: float
    wire_s: float  # all hops of one token, the way back included
    learnt: bool  # whether sessions of this model have taught the speed of a stage
    exact: bool
    reasons: tuple[str, ...]
    alternatives: tuple[Alternative, ...] = ()


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no plan. Bytes are 0 where memory is not the reason."""

    code: Literal["no_nodes", "few_nodes", "too_long", "no_memory", "uncut", "untested", "no_engine"]
    words: str
    needed_bytes: int = 0
    free_bytes: int = 0
    short_bytes: int = 0
    would_fit: tuple[str, ...] = ()


def planned_stage(fitting: Fitting, cut: Cut, compute_s: float) -> PlannedStage:
    """A cut that was placed, as a plan tells it."""
    offer, first, end = cut
    placement = fitting.place(offer, first, end)
    assert placement is not None  # every cut that is found was placed
    return PlannedStage(
        node=offer.node,
        name=offer.name,
        first=first,
        end=end,
        gpu_layers=placement.gpu_layers,
        weight_bytes=placement.weight_bytes,
        kv_bytes=placement.kv_bytes,
        compute_bytes=placement.compute_bytes,
        ram_bytes=placement.ram_bytes,
        vram_bytes=placement.vram_bytes,
        layers_held=offer.held(first, end),
        compute_s=compute_s,
    )


def names_of(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    listed = list(names)
    shown = ", ".join(listed[:NODES_NAMED_MAX])
    return shown if len(listed) <= NODES_NAMED_MAX else f"{shown} and {len(listed) - NODES_NAMED_MAX} more"
