"""A clock that is off is told of, measured from the times in the peers' answers."""

from collections.abc import Iterator

import pytest

from tests.node.loopback import Agent, Agents, agents, agree, until


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def clock(agent: Agent) -> dict[str, str]:
    """The health check."""
    said: dict[str, str] = agent.call("GET", "/api/health").json["checks"]["clock"]
    return said


def test_a_clock_that_is_ahead_of_the_others_is_told_of(house: Agents) -> None:
    den, attic = house.start("den"), house.start("attic")
    ahead = house.make("ahead", clock_ahead_s=8.0)
    attic.join(den.invite())
    ahead.start(den.invite())
    agree([den, attic, ahead])
    until(lambda: "this clock is 8.0 s ahead of" in clock(ahead)["message"], "the clock to be measured")
    assert clock(ahead)["status"] == "degraded"
    until(lambda: "2 peers" in clock(den)["message"], "both peers' clocks to be measured")
    assert clock(den)["status"] == "healthy", "the median of two is 4 s off"
