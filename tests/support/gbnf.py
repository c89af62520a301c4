"""A reader of GBNF that says whether a text satisfies a grammar: all ends of all ways, without llama.cpp."""

import re
from functools import lru_cache

_TOKEN = re.compile(
    r"""\s*(?:(?P<literal>"(?:[^"\\]|\\.)*")|(?P<set>\[\^?(?:[^\]\\]|\\.)*\])|(?P<times>\{\d+,?\d*\})|(?P<name>[a-zA-Z0-9-]+)|(?P<sign>[()|*+?]))"""
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


class Grammar:
    """The rules of one GBNF text."""

    def __init__(self, text: str) -> None:
        self.rules = {}
        for line in text.removesuffix("\n").split("\n"):
            name, _, body = line.partition(" ::= ")
            assert name not in self.rules, f"{name} is defined twice"
            self.rules[name], rest = _alternatives(_tokens(body))
            assert not rest, f"left over in {name}: {rest}"

    def accepts(self, text: str) -> bool:
        """Whether the whole text is what the root stands for."""

        @lru_cache(None)
        def ends(node: tuple, at: int) -> frozenset[int]:
            match node:
                case ("literal", wanted):
                    return frozenset([at + len(wanted)]) if text.startswith(wanted, at) else frozenset()
                case ("set", pattern):
                    return (
                        frozenset([at + 1])
                        if at < len(text) and re.match(pattern, text[at], re.DOTALL)
                        else frozenset()
                    )
                case ("name", name):
                    return ends(self.rules[name], at)
                case ("any", options):
                    return frozenset().union(*(ends(option, at) for option in options))
                case ("row", parts):
                    here = frozenset([at])
                    for part in parts:
                        here = frozenset().union(*(ends(part, place) for place in here))
                    return here
                case ("times", inner, low, high):
                    here, found, count = frozenset([at]), set(), 0
                    while here:
                        if count >= low:
                            if here <= found:
                                break
                            found |= here
                        if count == high:
                            break
                        here = frozenset().union(*(ends(inner, place) for place in here))
                        count += 1
                    return frozenset(found)
            raise AssertionError(node)

        return len(text) in ends(("name", "root"), 0)


def _tokens(body: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while body[at:].strip():
        match = _TOKEN.match(body, at)
        assert match, f"no GBNF: {body[at : at + 40]}"
        found.append((match.lastgroup, match.group(match.lastgroup)))
        at = match.end()
    return found


def _alternatives(tokens: list) -> tuple[tuple, list]:
    options, parts = [], []
    while tokens and tokens[0] != ("sign", ")"):
        kind, text = tokens[0]
        tokens = tokens[1:]
        if (kind, text) == ("sign", "|"):
            options.append(("row", tuple(parts)))
            parts = []
        elif kind == "literal":
            parts.append(
                (
                    "literal",
                    re.sub(r"\\(.)", lambda m: _ESCAPES.get(m.group(1), m.group(1)), text[1:-1], flags=re.DOTALL),
                )
            )
        elif kind == "set":
            parts.append(("set", text))
        elif kind == "name":
            parts.append(("name", text))
        elif (kind, text) == ("sign", "("):
            inner, tokens = _alternatives(tokens)
            assert tokens, "a bracket is not closed"
            parts.append(inner)
            tokens = tokens[1:]
        else:
            assert parts, f"{text} has nothing before it"
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(text, (0, 0))
            if kind == "times":
                first, comma, last = text[1:-1].partition(",")
                low, high = int(first), int(last) if last else None if comma else int(first)
            parts[-1] = ("times", parts[-1], low, high)
    options.append(("row", tuple(parts)))
    return ("any", tuple(options)), tokens
