"""Somebody's words in a prompt may name control tokens: where to cut the text so that none of them is taken for one.

Half of a name is no name: a text that is cut inside each such name, and whose parts are tokenised one by one, gives
the template's control tokens and plain text for all others. Words without such names are not touched at all.
"""

from collections.abc import Iterable, Sequence

Span = tuple[int, int]


def cuts(text: str, quoted: Sequence[Span], names: Iterable[str]) -> list[int]:
    """Where to cut `text`, ascending: once inside each of `names` that lies in, or reaches into, a `quoted` span.

    Names of one character cannot be cut, and are left.
    """
    found: list[Span] = []
    for name in names:
        if len(name) < 2 or name not in text:
            continue
        for first, end in quoted:
            reach = len(name) - 1
            at = text.find(name, max(0, first - reach), end + reach)
            while at >= 0:
                found.append((at, at + len(name)))
                at = text.find(name, at + 1, end + reach)
    made: list[int] = []
    for first, end in sorted(set(found), key=lambda span: (span[1], span[0])):
        if not made or not first < made[-1] < end:
            made.append(end - 1)
    return made
