"""How a model's files are divided for hashing and sharing: units, each within one layer or one shared tensor.

A stage takes whole tensors, so it takes whole units; nodes with different layers can check and serve each other. The
division follows from the header alone and is the same everywhere: **changing it makes published hashes worthless**.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from meshnode.llm.gguf.header import Header

UNIT_BYTES: Final = 16 * 1024 * 1024
_BLOCK: Final = re.compile(r"blk\.(\d+)\.")


class Unit(NamedTuple):
    """`length` bytes from `offset` of a part. `group` is the layer's number or the shared tensor's name, or empty.

    An empty group is what lies between tensors: padding, which nobody hashes.
    """

    part: int
    offset: int
    length: int
    group: str


class Units:
    """All units of one model, by place."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self._of_part = [list(_units(part, header)) for part, header in enumerate(headers)]
        self._starts = [[unit.offset for unit in units] for units in self._of_part]
        self.groups: dict[str, list[Unit]] = {}
        for units in self._of_part:
            for unit in units:
                self.groups.setdefault(unit.group, []).append(unit)

    def split(self, part: int, offset: int, length: int) -> Iterator[Unit]:
        """The units of a range. What is not a whole unit has no group."""
        units, end = self._of_part[part], offset + length
        index = max(0, bisect_right(self._starts[part], offset) - 1)
        while offset < end:
            while index < len(units) and units[index].offset + units[index].length <= offset:
                index += 1
            unit = units[index] if index < len(units) else None
            if unit is not None and unit.offset == offset and offset + unit.length <= end:
                yield unit
                offset += unit.length
                continue
            edge = end if unit is None else unit.offset if unit.offset > offset else unit.offset + unit.length
            stop = min(end, edge)
            yield Unit(part, offset, stop - offset, "")
            offset = stop


def _units(part: int, header: Header) -> Iterator[Unit]:
    """Neighbours of one group become one unit as long as it stays small; what is large is cut."""
    held: Unit | None = None
    for tensor in header.tensors:
        match = _BLOCK.match(tensor.name)
        group = str(int(match[1])) if match else tensor.name
        follows = held is not None and held.group == group and held.offset + held.length == tensor.offset
        if held is not None and follows and held.length + tensor.length <= UNIT_BYTES:
            held = held._replace(length=held.length + tensor.length)
            continue
        if held is not None:
            yield from _cut(held)
        held = Unit(part, tensor.offset, tensor.length, group)
    if held is not None:
        yield from _cut(held)


def _cut(unit: Unit) -> Iterator[Unit]:
    for at in range(0, unit.length, UNIT_BYTES):
        yield unit._replace(offset=unit.offset + at, length=min(UNIT_BYTES, unit.length - at))
