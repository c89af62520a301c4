"""Seeds that once failed, each with what was wrong: the tests run them for good."""

from typing import Final, NamedTuple


class Seed(NamedTuple):
    """One history of a scenario at its default size."""

    scenario: str
    seed: int
    what: str


FAILED_ONCE: Final = (
    Seed("churn", 21, "a timer for the end of a lease was set for the very instant that it fired in"),
    Seed("churn", 356, "what a node had said before its eviction still bore witness"),
    Seed("churn", 532, "two that restarted within a partition never looked for the others again"),
)
