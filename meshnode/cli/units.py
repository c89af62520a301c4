"""Sizes, durations and times as people read and write them. Numbers for programs stay bytes and seconds elsewhere."""

import re
from datetime import datetime
from typing import Final

_BYTE_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_TIME_UNITS: Final = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
_DURATION: Final = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>s|m|min|h|d)?", re.IGNORECASE)
_SIZE: Final = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?:(?P<unit>[kmgt])i?)?b?", re.IGNORECASE)
_SECONDS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3_600.0, "d": 86_400.0}


def size_text(size_bytes: float) -> str:
    """`12.1 GiB`, `640 KiB`, `17 B`."""
    power = 0
    while size_bytes >= 1023.5 and power < len(_BYTE_UNITS) - 1:
        size_bytes /= 1024
        power += 1
    digits = 1 if power and size_bytes < 99.95 else 0
    return f"{size_bytes:.{digits}f} {_BYTE_UNITS[power]}"


def used_text(used_bytes: float, total_bytes: float) -> str:
    """`3.1/16.0 GiB`: both in the unit of the total. Empty when the total is not known."""
    if total_bytes <= 0:
        return ""
    total = size_text(total_bytes)
    number, unit = total.split()
    digits = 1 if "." in number else 0
    return f"{used_bytes / 1024 ** _BYTE_UNITS.index(unit):.{digits}f}/{total}"


def duration_text(seconds: float, *, units: int = 2) -> str:
    """The largest units: `3 h 12 min`, `2 d 4 h`, `45 s`. With `units` 1 the largest alone."""
    rest = max(0, round(seconds))
    parts: list[str] = []
    for unit, length in _TIME_UNITS:
        count, rest = divmod(rest, length)
        # After a unit that is nought smaller ones are left out: `2 d 5 s` pretends to a precision that nobody wants.
        if parts and not count:
            break
        if count:
            parts.append(f"{count} {unit}")
        if len(parts) == units:
            break
    return " ".join(parts) or "0 s"


def milliseconds_text(milliseconds: float | None) -> str:
    """`0.42 ms`, `18 ms`; `-` when not measured."""
    if milliseconds is None:
        return "-"
    digits = 2 if milliseconds < 1 else 1 if milliseconds < 10 else 0
    return f"{milliseconds:.{digits}f} ms"


def ago_text(stamp: str | None, wall: float) -> str:
    """An RFC 3339 time as `12 s ago`, seen at `wall` (unix seconds); `-` when there is none or it is no time."""
    moment = unix_seconds(stamp)
    if moment is None:
        return "-"
    passed = wall - moment
    return "now" if passed < 1 else f"{duration_text(passed, units=1)} ago"


def unix_seconds(stamp: str | None) -> float | None:
    """An RFC 3339 time as unix seconds; None for what is none."""
    if not stamp:
        return None
    try:
        return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return None


def parse_size_bytes(text: str) -> int:
    """Bytes from `512M`, `1.5GiB`, `4096`, in powers of 1,024. Raises ValueError that says what is accepted."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write a number and K, M, G or T, such as 512M")
    return int(float(match["number"]) * 1024 ** (" kmgt".index((match["unit"] or " ").lower())))


def parse_duration_s(text: str) -> float:
    """Seconds from `600`, `90s`, `10m`, `2h`, `7d`. Raises ValueError that says what is accepted."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no duration: write a number and s, m, h or d, such as 10m")
    return float(match["number"]) * _SECONDS[(match["unit"] or "").lower()]
