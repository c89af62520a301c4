"""A table that thousands of nodes begin with alike: one base for all of them, and each node's own changes on top.

It behaves as the dict that it stands for, order included. What 10,000 nodes know of 10,000 is told once.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Overlay(MutableMapping[K, V]):
    """`base` is shared and never changed, and none of its keys may be removed by anybody else either."""

    __slots__ = ("_base", "_gone", "_new", "_own")

    def __init__(self, base: Mapping[K, V]) -> None:
        self._base = base
        self._own: dict[K, V] = {}
        self._gone: set[K] = set()  # keys of the base that were removed; one that came back is behind the others
        self._new = 0  # how many keys of `_own` do not stand at their place in the base

    def __getitem__(self, key: K) -> V:
        if key in self._own:
            return self._own[key]
        if key in self._gone:
            raise KeyError(key)
        return self._base[key]

    def get(self, key: K, default: V | None = None) -> V | None:  # type: ignore[override]  # the overloads of Mapping's
        """As dict.get; every datagram asks, so it does not go through exceptions."""
        own = self._own
        if own:
            if key in own:
                return own[key]
            if key in self._gone:
                return default
        elif self._gone and key in self._gone:
            return default
        return self._base.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._own or (key in self._base and key not in self._gone)

    def __setitem__(self, key: K, value: V) -> None:
        if key not in self._own and (key in self._gone or key not in self._base):
            self._new += 1
        self._own[key] = value

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        own = key in self._own
        if own:
            del self._own[key]
        if own and (key in self._gone or key not in self._base):
            self._new -= 1
        else:
            self._gone.add(key)

    def __iter__(self) -> Iterator[K]:
        gone, base = self._gone, self._base
        yield from (key for key in base if key not in gone) if gone else base
        if self._new:
            yield from [key for key in self._own if key in gone or key not in base]

    def __len__(self) -> int:
        return len(self._base) - len(self._gone) + self._new
