"""Numbers within bounds, as grammar: alternatives of digits. Bounds are whole numbers."""

from typing import Final

DIGITS_MAX: Final = 16
FRACTION: Final = f'("." [0-9]{{1,{DIGITS_MAX}}})?'


def integers(low: int | None, high: int | None) -> str:
    """A grammar body for whole numbers from `low` to `high`, both included; None: no bound. Empty: there are none."""
    alternatives = []
    if low is None or low < 0:
        negative = _positive(1 if high is None or high >= 0 else -high, None if low is None else -low)
        alternatives += [f'"-" ({negative})'] if negative else []
    if high is None or high >= 0:
        positive = _positive(max(0, low or 0), high)
        alternatives += [positive] if positive else []
    return " | ".join(alternatives)


def decimals(low: int | None, high: int | None) -> str:
    """A grammar body for numbers from `low` to `high`, both included, without exponent. Empty when there are none."""
    alternatives = []
    if low is None or low < 0:
        negative = _with_fraction(0 if high is None or high >= 0 else -high, None if low is None else -low)
        alternatives += [f'"-" ({negative})'] if negative else []
    if high is None or high >= 0:
        positive = _with_fraction(max(0, low or 0), high)
        alternatives += [positive] if positive else []
    return " | ".join(alternatives)


def _with_fraction(low: int, high: int | None) -> str:
    below = _positive(low, None if high is None else high - 1)
    whole = f'"{high}" ("." "0"{{1,{DIGITS_MAX}}})?' if high is not None and high >= low else ""
    return " | ".join(part for part in (f"({below}) {FRACTION}" if below else "", whole) if part)


def _positive(low: int, high: int | None) -> str:
    """Bounds 0 <= low, high; split by the number of digits, since no number begins with a superfluous zero."""
    if high is not None and high < low:
        return ""
    alternatives = []
    length = len(str(low))
    last = len(str(high)) if high is not None else length
    for digits in range(length, last + 1):
        smallest = low if digits == length else 10 ** (digits - 1)
        largest = high if high is not None and digits == last else 10**digits - 1
        alternatives.append(_same_length(str(smallest), str(largest)))
    if high is None and length < DIGITS_MAX:
        alternatives.append(f"[1-9] [0-9]{{{length},{DIGITS_MAX - 1}}}")
    return " | ".join(alternatives)


def _same_length(low: str, high: str) -> str:
    if not low:
        return '""'
    rest = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" ({_same_length(low[1:], high[1:])})' if rest else f'"{low[0]}"'
    first, last = int(low[0]), int(high[0])
    alternatives = []
    if rest and low[1:] != "0" * rest:
        alternatives.append(f'"{first}" ({_same_length(low[1:], "9" * rest)})')
        first += 1
    above = ""
    if rest and high[1:] != "9" * rest:
        above = f'"{last}" ({_same_length("0" * rest, high[1:])})'
        last -= 1
    if first <= last:
        alternatives.append(f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else ""))
    return " | ".join([*alternatives, above] if above else alternatives)
