"""How points in time are spelled for people and programs: RFC 3339, UTC. Reading clocks is kernel.clock's."""

from datetime import UTC, datetime
from typing import Final

YEAR_10000_S: Final = 253_402_300_799.0


def rfc3339(unix_s: float) -> str:
    """UTC with milliseconds; years beyond what dates can say are clamped: a clock may be wrong by any amount.
    What is no number at all is the year 1970.
    """
    moment = datetime.fromtimestamp(min(max(0.0, unix_s), YEAR_10000_S), UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
