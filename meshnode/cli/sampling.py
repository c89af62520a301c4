"""The options that `ask` and `chat` share: what is told to the model besides the words."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import click

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_NAMES: Final = ("temperature", "top_p", "top_k", "seed", "max_tokens")


def with_sampling(function: Callable[Concatenate[T, dict[str, Any], P], R]) -> Callable[Concatenate[T, P], R]:
    """Give a command these options; as its second argument it gets the fields of a chat request that they make."""

    @click.option(
        "--temperature", type=click.FloatRange(0, 100), help="0: always the likeliest word. Default: the model's."
    )
    @click.option("--top-p", type=click.FloatRange(0, 1), help="Only the likeliest, up to this share of all.")
    @click.option("--top-k", type=click.IntRange(0), help="Only so many of the likeliest.")
    @click.option("--seed", type=int, help="The same seed, the same answer, as far as the nodes are the same.")
    @click.option("--max-tokens", type=click.IntRange(1), help="Stop after so many.")
    @click.option("--stages", type=click.IntRange(1, 64), help="Split over at least so many nodes, for trials.")
    @functools.wraps(function)
    def command(first: T, /, *arguments: P.args, **named: P.kwargs) -> R:
        told: dict[str, Any] = {name: named.pop(name) for name in _NAMES}
        stages = named.pop("stages")
        fields = {name: value for name, value in told.items() if value is not None}
        if stages is not None:
            fields["meshnode"] = {"stages": stages}
        return function(first, fields, *arguments, **named)

    return command
