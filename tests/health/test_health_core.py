"""What counts as healthy: tables of figures and verdicts."""

import pytest

from meshnode.health.core import (
    judge_clock,
    judge_loop,
    judge_memory,
    judge_mesh,
    judge_services,
    judge_storage,
    judge_wal,
    worst,
)
from meshnode.health.model import MeshContact, ServiceState, Status

MIB = 1 << 20
NOW = 1_800_000_000.0
HEALTHY, DEGRADED, UNHEALTHY, UNKNOWN = Status


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([], UNKNOWN),
        ([HEALTHY], HEALTHY),
        ([HEALTHY, UNKNOWN], UNKNOWN),
        ([HEALTHY, DEGRADED, UNKNOWN], DEGRADED),
        ([UNHEALTHY, DEGRADED, HEALTHY], UNHEALTHY),
    ],
)
def test_the_worst_wins(statuses: list[Status], expected: Status) -> None:
    assert worst(statuses) is expected


@pytest.mark.parametrize(
    ("free", "expected"),
    [(10_000, HEALTHY), (256, HEALTHY), (255, DEGRADED), (64, DEGRADED), (63, UNHEALTHY), (0, UNHEALTHY)],
)
def test_room_on_the_disk_and_in_memory(free: int, expected: Status) -> None:
    assert judge_storage(free * MIB, "/data").status is expected
    assert judge_memory(free * MIB).status is expected


@pytest.mark.parametrize(
    ("size", "expected"), [(0, HEALTHY), (100, HEALTHY), (101, DEGRADED), (1_024, DEGRADED), (1_025, UNHEALTHY)]
)
def test_the_log_of_the_database(size: int, expected: Status) -> None:
    assert judge_wal(size * MIB).status is expected


@pytest.mark.parametrize(
    ("wall", "offsets", "expected"),
    [
        (NOW, [], HEALTHY),
        (NOW, [0.1, -0.2, 4.9], HEALTHY),
        (NOW, [5.1], DEGRADED),
        (NOW, [-6.0, -7.0], DEGRADED),
        # One peer that lives in 2040 says nothing about us.
        (NOW, [0.1, 4e8, 0.2], HEALTHY),
        (NOW, [400.0, 401.0, 0.0], UNHEALTHY),
        (5_000.0, [], UNHEALTHY),
    ],
)
def test_the_clock(wall: float, offsets: list[float], expected: Status) -> None:
    assert judge_clock(wall, offsets).status is expected


def test_the_clock_says_in_which_direction_it_is_wrong() -> None:
    assert "this clock is 10 s behind the only peer measured" in judge_clock(NOW, [10.0]).message
    assert "this clock is 365 days behind the only" in judge_clock(NOW, [31_535_999.9]).message
    assert judge_clock(NOW, [-9.0, -3.2, -3.2, 4.0]).message == "this clock is 3.2 s ahead of the median of 4 peers"
    assert judge_clock(NOW, [0.04, -0.03]).message == "this clock agrees with the median of 2 peers"


@pytest.mark.parametrize(("lag", "expected"), [(0.0, HEALTHY), (0.5, HEALTHY), (0.6, DEGRADED), (5.1, UNHEALTHY)])
def test_the_event_loop(lag: float, expected: Status) -> None:
    assert judge_loop(lag).status is expected


@pytest.mark.parametrize(
    ("others", "up", "expected"),
    [(0, 0, HEALTHY), (3, 3, HEALTHY), (3, 1, HEALTHY), (3, 0, DEGRADED), (1, 0, DEGRADED)],
)
def test_the_mesh(others: int, up: int, expected: Status) -> None:
    assert judge_mesh(MeshContact(others, up)).status is expected


def test_a_node_that_has_just_started_looks_for_the_others() -> None:
    verdict = judge_mesh(MeshContact(3, 0, is_looking=True))
    assert (verdict.status, verdict.message) == (Status.UNKNOWN, "just started: looking for the 3 other members")
    assert judge_mesh(MeshContact(3, 1, is_looking=True)).status is HEALTHY
    assert judge_mesh(MeshContact(0, 0, is_looking=True)).status is HEALTHY


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["running", "running"], HEALTHY),
        (["running", "starting"], UNKNOWN),
        (["waiting"], UNKNOWN),
        (["backing_off", "starting"], DEGRADED),
        (["failed", "running"], UNHEALTHY),
        (["stopping"], UNHEALTHY),
        (["stopped", "running"], UNHEALTHY),
    ],
)
def test_the_services(states: list[str], expected: Status) -> None:
    services = [ServiceState(f"service{number}", state) for number, state in enumerate(states)]
    assert judge_services(services).status is expected


def test_a_failed_service_is_named_with_its_error() -> None:
    verdict = judge_services([ServiceState("gossip", "backing_off", "no route"), ServiceState("api", "running")])
    assert "gossip (no route)" in verdict.message
    assert "api" not in verdict.message
