"""docs/api.md says what the code says: errors, limits, figures, and the paths that need no credentials."""

import dataclasses
import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from meshnode.api.limits import ApiLimits
from meshnode.api.routing import Mount
from meshnode.cluster.routes import ClusterRoutes
from meshnode.health.routes import health_routes
from meshnode.kernel.errors import ErrorCode, exit_code, http_status
from meshnode.kernel.metrics import KERNEL_METRICS
from meshnode.surfaces.openai.routes import openai_mount
from meshnode.tasks.service.figures import TASK_METRICS
from tests.support.api_client import fetch
from tests.support.api_server import running_api
from tests.support.open_routes import public_routes

SPECS = (*KERNEL_METRICS, *TASK_METRICS)
DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """The rows of every table that begin with a name in backticks."""
    found: dict[str, list[str]] = {}
    for line in DOCUMENT.read_text("utf-8").splitlines():
        if match := re.match(r"\| `([a-z0-9_]+)` \| (.*) \|$", line):
            assert match[1] not in found or match[1] == "timeout", f"{match[1]} is in two tables"
            found[match[1]] = [cell.strip() for cell in match[2].split("|")]
    return found


def test_every_error_is_documented_with_its_status_and_exit_code(rows: dict[str, list[str]]) -> None:
    for code in ErrorCode:
        assert rows[code.value][:2] == [str(http_status(code)), str(exit_code(code))], code
        assert rows[code.value][2].endswith(".")


def test_every_limit_is_documented_with_its_default(rows: dict[str, list[str]]) -> None:
    for limit in dataclasses.fields(ApiLimits):
        assert float(rows[limit.name][0]) == limit.default, limit.name


def test_every_figure_is_documented(rows: dict[str, list[str]]) -> None:
    for spec in SPECS:
        assert rows[spec.name] == [spec.kind.value, ", ".join(spec.labels), spec.help]


def test_nothing_else_is_documented(rows: dict[str, list[str]]) -> None:
    known = {code.value for code in ErrorCode} | {limit.name for limit in dataclasses.fields(ApiLimits)}
    assert set(rows) == known | {spec.name for spec in SPECS}


async def described() -> Any:
    """The description of the agent's routes."""
    nothing: Any = None  # only the list of routes is read, and no handler runs
    cluster = ClusterRoutes(**dict.fromkeys(signature(ClusterRoutes).parameters, nothing))
    # The trial server has event streams of its own at that path.
    mesh = [route for route in cluster.routes() if route.path != "/api/events"]
    openai = openai_mount(nothing, nothing)
    async with running_api(mounts=[Mount(mesh), Mount(health_routes(nothing)), openai]) as running:
        return (await fetch(running.port, "GET", "/openapi.json")).json


async def test_every_answer_with_a_body_is_described_with_its_media_types() -> None:
    document = await described()
    answers = {
        f"{method.upper()} {path}": operation["responses"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    media = {
        name: {status: set(one.get("content", ())) for status, one in listed.items()}
        for name, listed in answers.items()
    }
    assert [name for name, statuses in media.items() if name.startswith("GET") and "204" in statuses] == []
    assert all(statuses["200"] for statuses in media.values() if "200" in statuses)
    both = {"application/json", "text/event-stream"}
    for path in ("chat/completions", "completions", "responses"):
        assert media[f"POST /v1/{path}"]["200"] == both
    assert media["POST /v1/embeddings"]["200"] == {"application/json"}
    assert media["GET /join/{token}"]["200"] == {"text/html"}
    assert media["GET /docs.css"]["200"] == {"text/css"}
    assert media["GET /metrics"]["200"] == {"text/plain"}
    for path in ("/readyz", "/api/health"):
        assert answers[f"GET {path}"]["503"]["content"] == answers[f"GET {path}"]["200"]["content"]


async def test_the_paths_without_credentials_are_documented() -> None:
    document = await described()
    text = DOCUMENT.read_text("utf-8").partition("These paths need no credentials:")[2].partition("\n\n")[0]
    named = {name if " " in name else f"GET {name}" for name in re.findall(r"`([^`]+)`", text)}
    assert named == public_routes(document)
