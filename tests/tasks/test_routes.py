"""The paths of tasks over real HTTP, with a mesh behind them."""

import base64
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshnode.tasks.routes import place_of
from meshnode.tasks.service.streaming import Place
from protocol.placement.tracking import SchedulingParameters
from tests.support.api_client import Answer, ApiClient, SentEvent, fetch
from tests.support.api_server import TOKEN, running_api
from tests.support.task_mesh import OPEN, Member, TaskMesh, task_mesh


@asynccontextmanager
async def served(folder: Path, size: int = 2, **how: Any) -> AsyncIterator[tuple[TaskMesh, Member, int]]:
    """A mesh, its last member, and the port of that one's API."""
    async with task_mesh(folder, size, **how) as mesh:
        member = mesh.members[-1]
        async with running_api(mounts=[member.tasks.mount]) as running:
            yield mesh, member, running.port


async def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await fetch(port, method, path, json_body=body, token=TOKEN, headers=named)


async def streamed(port: int, task: str, after: str | None = None) -> list[SentEvent]:
    """What a task's stream tells, to its end."""
    async with ApiClient(port, token=TOKEN) as client:
        headers = {"Last-Event-ID": after} if after is not None else {}
        found = await client.events(f"/api/tasks/{task}/stream", headers=headers)
        return [event async for event in found if event.event is not None]


async def test_an_input_over_http_is_stored_named_and_refused(tmp_path: Path) -> None:
    settings = [msgspec.structs.replace(OPEN, input_bytes_max=200_000)] * 2
    async with served(tmp_path, settings=settings) as (_, member, port):
        raw = {"Content-Type": "application/octet-stream"}
        content = bytes(100_000)
        answer = await fetch(port, "POST", "/api/tasks/inputs", body=content, headers=raw, token=TOKEN)
        assert (answer.status, answer.json["bytes"], len(answer.json["held_by"])) == (201, 100_000, 2)
        assert answer.json["input"] == hashlib.sha256(content).hexdigest()
        body = {"command": ["wc", "-c"], "input": answer.json["input"]}
        task = await ask(port, "POST", "/api/tasks", body)
        assert task.json["input"] == answer.json
        await member.until_id(task.json["id"], "completed")
        refused = await fetch(port, "POST", "/api/tasks/inputs", body=bytes(200_001), headers=raw, token=TOKEN)
        assert (refused.status, refused.json["code"]) == (413, "too_large")
        member.disk.free = 0
        refused = await fetch(port, "POST", "/api/tasks/inputs", body=content, headers=raw, token=TOKEN)
        assert (refused.status, refused.json["code"]) == (507, "disk_full")
        foreign = raw | {"Sec-Fetch-Site": "cross-site"}
        assert (await fetch(port, "POST", "/api/tasks/inputs", body=content, headers=foreign)).status == 403


async def test_a_task_over_http_from_its_submission_to_its_deletion(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, member, port):
        body = {"command": "echo out; echo err >&2; exit 3", "env": ["A=1"], "preferred_node": "n0", "name": "first"}
        answer = await ask(port, "POST", "/api/tasks", body, Idempotency_Key="k")
        assert answer.status == 201
        task = answer.json
        assert (task["status"], task["env"], task["requirements"]["cpus"]) == ("pending", ["A=1"], 1.0)
        assert len(task["held_by"]) == 2
        again = await ask(port, "POST", "/api/tasks", body | {"idempotency_key": "k"})
        assert (again.status, again.json["id"]) == (200, task["id"])
        other = await ask(port, "POST", "/api/tasks", body | {"idempotency_key": "k", "retries": 1})
        assert (other.status, other.json["code"]) == (409, "conflict")
        events = await streamed(port, task["id"])
        end = events[-1]
        assert (end.event, end.json["status"], end.json["exit_code"]) == ("end", "failed", 3)
        found = (await ask(port, "GET", f"/api/tasks/{task['id']}")).json
        assert found["output"] == "out\nerr\n"
        assert found["error"] == "exit code 3"
        [line] = found["attempts"]
        assert (line["ending"], line["exit_code"], line["node_id"]) == ("exited", 3, found["assigned_node"])
        ended = await ask(port, "DELETE", f"/api/tasks/{task['id']}")
        assert (ended.status, ended.json["detail"]) == (409, {"status": "failed"})
        dead = await ask(port, "GET", "/api/tasks/dead-letter")
        assert [one["id"] for one in dead.json] == [task["id"]]
        assert "attempts" not in dead.json[0]
        retried = await ask(port, "POST", f"/api/tasks/{task['id']}/retry", {})
        assert (retried.status, retried.json["generation"]) == (200, 1)
        await member.until_id(task["id"], "failed")
        assert (await ask(port, "DELETE", "/api/tasks/dead-letter")).json["done"] == 1
        assert (await ask(port, "GET", f"/api/tasks/{task['id']}")).status == 404
        assert (await ask(port, "GET", "/api/tasks")).json == []


async def test_streams_tell_both_outputs_apart_in_order_and_go_on_where_a_reader_was(tmp_path: Path) -> None:
    script = (
        "for i in 1 2 3; do printf 'o%s\\n' $i; sleep 0.05; printf 'e%s\\n' $i >&2; sleep 0.05; done; printf '\\377'"
    )
    async with served(tmp_path) as (_, _, port):
        task = (await ask(port, "POST", "/api/tasks", {"command": script, "node": "n0"})).json["id"]
        events = await streamed(port, task)
        output = [event for event in events if event.event in ("stdout", "stderr")]
        assert events[0].event == "task" or events[0].event == "stdout"
        assert [(event.event, event.json.get("text")) for event in output][:6] == [
            ("stdout", "o1\n"), ("stderr", "e1\n"), ("stdout", "o2\n"), ("stderr", "e2\n"), ("stdout", "o3\n"),
            ("stderr", "e3\n"),
        ]  # fmt: skip
        assert base64.b64decode(output[6].json["base64"]) == b"\xff"
        later = await streamed(port, task, output[3].id)
        assert [(one.event, one.data) for one in later if one.event != "task"][:3] == [
            (one.event, one.data) for one in output[4:]
        ]
        assert later[-1].event == "end"
        raw = await ask(port, "GET", f"/api/tasks/{task}/output?stream=stderr&offset=3")
        assert (raw.status, raw.body, raw.headers["content-type"]) == (200, b"e2\ne3\n", "application/octet-stream")


async def test_a_full_queue_is_429_and_says_when_to_come_again(tmp_path: Path) -> None:
    nobody = [msgspec.structs.replace(OPEN, accept="nobody")] * 2
    few = SchedulingParameters(queue_max=2, share_max=1.0)
    async with served(tmp_path, settings=nobody, scheduling=few) as (_, _, port):
        for _ in range(2):
            assert (await ask(port, "POST", "/api/tasks", {"command": "true"})).status == 201
        full = await ask(port, "POST", "/api/tasks", {"command": "true"})
        assert (full.status, full.json["code"], full.json["retryable"]) == (429, "overloaded", True)
        assert int(full.headers["retry-after"]) >= 1
        stats = await ask(port, "GET", "/api/scheduler/stats")
        assert (stats.json["queue_depth"], stats.json["in_flight"], stats.json["node_count"]) == (2, 0, 2)
        assert set(stats.json["breaker_states"].values()) == {"closed"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/api/tasks", {"command": ""}, 400, "bad_request"),
        ("POST", "/api/tasks", {"command": "a", "mod": "x"}, 400, "bad_request"),
        ("POST", "/api/tasks", {"command": ["x", "y" * 1024 * 1024]}, 413, "too_large"),
        ("POST", "/api/tasks", {"command": "a", "node": "n9"}, 404, "unknown_node"),
        ("GET", "/api/tasks?status=asleep", None, 400, "bad_request"),
        ("GET", "/api/tasks?node=n9", None, 404, "unknown_node"),
        ("GET", "/api/tasks?cursor=x", None, 400, "bad_request"),
        ("GET", "/api/tasks/0123", None, 404, "not_found"),
        ("GET", "/api/tasks/0123456789abcdef/stream", None, 404, "not_found"),
        ("GET", "/api/tasks/0123456789abcdef/output", None, 404, "not_found"),
        ("DELETE", "/api/tasks/0123456789abcdef", None, 404, "not_found"),
        ("POST", "/api/tasks/0123456789abcdef/retry", {}, 404, "not_found"),
    ],
)
async def test_what_is_wrong_is_said(tmp_path: Path, method: str, path: str, body: Any, status: int, code: str) -> None:
    async with served(tmp_path, 1) as (_, _, port):
        answer = await ask(port, method, path, body)
        assert (answer.status, answer.json["code"]) == (status, code)


def test_only_our_own_places_are_believed() -> None:
    assert place_of("0123456789abcdef-5-7") == Place("0123456789abcdef", 5, 7)
    for text in (None, "", "a", "a-b-c", "a--5-7", "a-5", "a-5-7-9", "a-5-" + "9" * 200, "a-5-٣"):
        assert place_of(text) == Place()
