"""How points in time are spelled for people and programs: RFC 3339, UTC. Reading clocks is kernel.clock's."""

from datetime import UTC, datetime
from typing import Final

YEAR_10000_S: Final = 253_402_300_799.0
_SPANS: Final = ((2 * 86_400.0, 86_400.0, "days"), (2 * 3_600.0, 3_600.0, "hours"), (120.0, 60.0, "minutes"))


def rfc3339(unix_s: float) -> str:
    """UTC with milliseconds; years beyond what dates can say are clamped: a clock may be wrong by any amount.
    What is no number at all is the year 1970.
    """
    moment = datetime.fromtimestamp(min(max(0.0, unix_s), YEAR_10000_S), UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def span_text(seconds: float) -> str:
    """How far two clocks are apart, in the largest unit that says it: `365 days`, `3 hours`, `42 s`, `0.3 s`."""
    for least, unit_s, name in _SPANS:
        if seconds >= least:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
