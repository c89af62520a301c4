"""The native paths of models and of what runs, over real HTTP."""

from collections.abc import AsyncIterator
from urllib.parse import quote

import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import (
    Loading,
    PullPart,
    PullProgress,
)
from tests.house.source import ROOT
from tests.support.api_client import ApiClient, fetch
from tests.support.api_server import TOKEN, running_api, until
from tests.support.llm_services import (
    ATTIC,
    BARN,
    ME,
    REMOTE,
    STAGES,
    Served,
    Services,
    mount_of,
    served,
    session,
    shard,
)
from tests.support.open_routes import routes_that_answer


@pytest.fixture
async def it() -> AsyncIterator[Served]:
    async with served() as made:
        yield made


# ---- models ---------------------------------------------------------------------------------------------------------


async def test_models_have_their_plan(it: Served) -> None:
    [demo, vectors, remote] = await it.get("/api/llm/models")
    assert demo == {
        "model": "demo", "description": "small", "quantization": "F16", "required_ram": 800, "cluster_ram": 5000,
        "can_run": True, "fits_single_node": True, "is_downloaded": True, "ollama_ready": True,
        "shard_plan": {
            "model": {
                "name": "demo", "total_layers": 8, "total_ram": 800, "head_count": 4, "embed_length": 64,
                "is_available": True, "quantization": "F16",
            },
            "coordinator": ME,
            "shards": [shard(ME, 0, 7)],
        },
        "single_node_id": ME, "downloaded_tags": ["demo"], "aliases": ["d"], "architecture": "", "parameters": 0,
        "file_bytes": 700, "context_max": 512, "embeds": False, "licence": "", "source": "", "digest": "",
        "held_by": [ME, ATTIC], "pinned": False, "state": "idle", "tokens_per_s": 31.0, "first_token_s": 0.4,
        "reason": "fits on den alone",
    }  # fmt: skip
    assert (vectors["can_run"], vectors["is_downloaded"]) == (False, True)
    assert (remote["can_run"], remote["required_ram"], remote["reason"]) == (False, 9000, "Nobody holds it: pull it.")
    assert "shard_plan" not in remote
    assert [call[1] for call in it.services.calls] == ["demo", REMOTE.name]


async def test_models_without_plans_and_of_this_node_alone(it: Served) -> None:
    assert [one["model"] for one in await it.get("/api/llm/models?scope=local&plan=false")] == ["demo"]
    assert it.services.calls == []
    it.services.known = []
    assert await it.get("/api/llm/models") == []


async def test_lists_come_in_pages(it: Served) -> None:
    first = await it.ask("GET", "/api/llm/catalogue?limit=2")
    assert [one["model"] for one in first.json] == ["c0", "c1"]
    link = first.headers["link"]
    following = await it.ask("GET", link[1 : link.index(">")])
    assert [one["model"] for one in following.json] == ["c2", "c3"]
    last = await it.ask("GET", "/api/llm/catalogue?limit=2&cursor=c3")
    assert [one["model"] for one in last.json] == ["c4"]
    assert "link" not in last.headers
    await it.refused("GET", "/api/llm/catalogue?cursor=gone", None, 400, "leads nowhere")


async def test_a_plan_with_its_alternatives(it: Served) -> None:
    plan = await it.get("/api/llm/plan?model=d&context=512")
    assert (plan["fits"], plan["bytes_free"], len(plan["plans"])) == (True, 5000, 2)
    assert plan["plans"][1] == {
        "engine": "local", "tokens_per_s": 31.0, "first_token_s": 0.4, "reason": "best", "chosen": True,
        "stages": [{"node_id": ME, "node_name": "den", "first": 0, "last": 8, "bytes": 800, "gpu_layers": 0}],
    }  # fmt: skip
    assert it.services.calls == [("plan", "d", 512)]
    await it.refused("GET", "/api/llm/plan?model=dmo", None, 404, "did you mean 'demo'?")
    await it.refused("GET", "/api/llm/plan", None, 400, "model")
    await it.refused("GET", "/api/llm/plan?model=d&context=0", None, 400, "context")


async def test_a_pull_tells_how_far_it_is_everywhere(it: Served) -> None:
    part = PullPart(node_id=ATTIC, node_name="attic", first=3, last=8, completed=4, total=6)
    it.services.steps = [
        PullProgress(model="demo", status="reading the header"),
        PullProgress(
            model="demo", status="fetching", completed=4, total=10, bytes_per_s=2.5, source="hf", parts=(part,)
        ),
    ]  # fmt: skip
    events = await it.stream("/api/llm/pull", {"model": "hf:o/r/f.gguf", "node": "attic", "whole": True})
    assert it.services.calls == [("pull", "hf:o/r/f.gguf", ATTIC, True)]
    assert [event.event for event in events] == ["llm_pull_progress", "llm_pull_progress", "llm_pull_done"]
    assert events[1].json == {
        "model": "demo", "status": "fetching", "completed": 4, "total": 10, "bytes_per_s": 2.5, "source": "hf",
        "nodes": [{
            "node_id": ATTIC, "node_name": "attic", "first": 3, "last": 8, "completed": 4, "total": 6,
        }],
    }  # fmt: skip
    assert events[2].json == {"model": "demo"}
    it.services.steps = []
    assert [event.json for event in await it.stream("/api/llm/pull", {"model": "d"})] == [{"model": "d"}]


async def test_a_pull_that_fails(it: Served) -> None:
    gone = MeshError(ErrorCode.NOT_FOUND, "There is no such file there.")
    it.services.steps = [gone]
    await it.refused("POST", "/api/llm/pull", {"model": "x"}, 404, "no such file")
    await it.refused("POST", "/api/llm/pull", {"model": "x", "node": "nobody"}, 404, "nobody")
    it.services.steps = [PullProgress(model="x", status="s"), gone]
    events = await it.stream("/api/llm/pull", {"model": "x"})
    assert (events[-1].event, events[-1].json) == (
        "llm_pull_error",
        {"model": "x", "error": "There is no such file there.", "code": "not_found", "retryable": False},
    )


async def test_a_reader_of_a_pull_that_leaves(it: Served) -> None:
    it.services.steps = [PullProgress(model="x", status="s"), "hang"]
    async with ApiClient(it.port, token=TOKEN) as client:
        await client.send("POST", "/api/llm/pull", headers={"Content-Type": "application/json"}, body=b'{"model": "x"}')
        await client.receive_head()
    await until(lambda: it.services.closed == 1)


async def test_loading_and_unloading(it: Served) -> None:
    it.services.steps = [Loading(session="", step="loading", bytes_done=1, bytes_total=2)]
    events = await it.stream("/api/llm/load", {"model": "demo", "meshnode": {"stages": 2}})
    assert [(event.event, event.json) for event in events] == [
        ("llm_load_progress", {"model": "demo", "status": "loading", "completed": 1, "total": 2}),
        ("llm_load_done", {"model": "demo"}),
    ]
    assert (await it.ask("POST", "/api/llm/unload", {"model": "demo"})).status == 204
    assert it.services.calls == [("load", "demo", 2), ("unload", "demo")]
    await it.refused("POST", "/api/llm/unload", {"model": "dmo"}, 404, "did you mean")


@pytest.mark.parametrize("name", ["demo", REMOTE.name])
@pytest.mark.parametrize("escaped", [False, True])
async def test_removing_a_model_whose_name_has_slashes(it: Served, name: str, escaped: bool) -> None:
    path = "/api/llm/models/" + quote(name, safe="" if escaped else "/:")
    answer = await it.ask("DELETE", path)
    assert answer.json == {"model": name, "nodes": [ME], "freed_bytes": 700, "unreachable": [], "kept": []}
    await it.ask("DELETE", f"{path}?node=attic&force=true")
    await it.ask("DELETE", f"{path}?everywhere=true")
    assert it.services.calls == [
        ("remove", name, None, False, False), ("remove", name, ATTIC, False, True), ("remove", name, None, True, False),
    ]  # fmt: skip
    await it.refused("DELETE", f"{path}?everywhere=true&node=attic", None, 400, "exclude each other")
    await it.refused("DELETE", "/api/llm/models/dmo", None, 404, "did you mean")


# ---- what runs ------------------------------------------------------------------------------------------------------


async def test_generations_under_way(it: Served) -> None:
    assert await it.get("/api/llm/inference/sessions") == []
    it.services.running = [
        session(1),
        session(3, entry=BARN, phase="fallback", failed=ATTIC, stages=STAGES[:1]),
        session(2, phase="routing", stages=(), error="x"),
    ]
    it.services.unreachable = (ATTIC,)
    answer = await it.ask("GET", "/api/llm/inference/sessions")
    assert answer.headers["meshnode-unreachable"] == ATTIC
    third, second, first = answer.json
    assert first == {
        "id": "session-0001", "model": "demo", "phase": "running", "started_at": "2027-01-15T08:00:01.000Z",
        "entry_node": ME, "engine": "pipeline", "prompt_tokens": 11, "cached_tokens": 0,
        "stages": [
            {"node_id": ME, "node_name": "den", "layer_start": 0, "layer_end": 2, "assigned_ram": 300, "steps": 7,
             "rows": 9, "compute_seconds": 0.5, "wait_seconds": 0.25, "bytes_in": 10, "bytes_out": 20},
            {"node_id": ATTIC, "node_name": "attic", "layer_start": 3, "layer_end": 7, "assigned_ram": 500, "steps": 0,
             "rows": 0, "compute_seconds": 0.0, "wait_seconds": 0.0, "bytes_in": 0, "bytes_out": 0},
        ],
        "shard_stat": {
            "node_id": ME, "node_name": "den", "model": "demo", "started_at": "2027-01-15T08:00:01.000Z",
            "token_count": 5, "was_local": False, "latency_ns": 250_000_000, "tok_sec": 30.0,
        },
    }  # fmt: skip
    assert (third["shard_stat"]["fallback_from"], third["shard_stat"]["was_local"]) == (ATTIC, False)
    assert ("shard_stat" in second, second["error"]) == (False, "x")
    local = await it.get("/api/llm/inference/sessions?scope=local")
    assert [one["id"] for one in local] == ["session-0002", "session-0001"]
    assert await it.get("/api/llm/inference/sessions/session-0001") == first
    await it.refused(
        "GET", "/api/llm/inference/sessions/session-9", None, 404, f"Not asked, because unreachable: {ATTIC}"
    )


async def test_status_and_capabilities(it: Served) -> None:
    it.services.running = [session(1), session(2, stages=STAGES[:1])]
    assert await it.get("/api/llm/status") == {
        "ollama_ready": True, "local_models": ["demo"], "active_sessions": 2, "active_distrib_sessions": 1,
        "versions": [
            {"effect": "apart", "message": "0.3.9 (on attic) and 0.3.36 (on den) are not combined", "outdated": [ATTIC],
             "update_to": "0.3.36"}
        ],
    }  # fmt: skip
    attic, den = await it.get("/api/llm/inference/capabilities")
    assert den == {
        "node_id": ME, "node_name": "den", "models": ["demo"], "free_ram": 77, "ollama_ready": True,
        "link_latencies": {ATTIC: 0.5}, "link_bandwidths": {ATTIC: 2.0}, "inference_speeds": {"demo": 31.0},
        "last_seen": "2027-01-15T08:00:00Z", "engine_version": "0.3.36", "whole_only": [],
    }  # fmt: skip
    assert (attic["engine_version"], attic["whole_only"]) == ("0.3.9", ["llama"])
    assert (attic["models"], attic["ollama_ready"]) == ([], False)
    assert await it.get("/api/llm/inference/capabilities?scope=local") == [den]


# ---- who may, and what is described ---------------------------------------------------------------------------------


async def test_no_path_answers_without_credentials() -> None:
    services = Services()
    async with running_api(mounts=[mount_of(services)], look_up=lambda *_: None) as api:
        document = (await fetch(api.port, "GET", "/openapi.json", token=TOKEN)).json
        described = {
            f"{method.upper()} {path}" for path, of in document["paths"].items() for method in of if "/llm/" in path
        }
        assert len(described) == 18
        assert not described & await routes_that_answer(api.port, document)
    assert services.calls == services.asked == []


def test_every_path_and_event_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    routes = mount_of(Services()).routes
    names = [f"`{route.method} {route.path}`" for route in routes]
    names += [f"`{event}`" for route in routes for event in route.events]
    assert [name for name in names if name not in text] == []


async def test_the_paths_that_clients_know_are_there(it: Served) -> None:
    document = await it.get("/openapi.json")
    described = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    for method, path in (
        ("GET", "/api/llm/models"), ("DELETE", "/api/llm/models/{model}"), ("GET", "/api/llm/status"),
        ("POST", "/api/llm/pull"), ("POST", "/api/llm/chat"), ("GET", "/api/llm/sessions"),
        ("POST", "/api/llm/sessions"), ("GET", "/api/llm/sessions/{id}"), ("DELETE", "/api/llm/sessions/{id}"),
        ("PUT", "/api/llm/sessions/{id}/title"), ("GET", "/api/llm/inference/sessions"),
        ("GET", "/api/llm/inference/sessions/{id}"), ("GET", "/api/llm/inference/capabilities"),
    ):  # fmt: skip
        assert (method, path) in described
    for field, value in (("use_brain", True), ("use_memory", True), ("mcp_servers", ["files"])):
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], field: value}
        await it.refused("POST", "/api/llm/chat", body, 501, field.split("_")[-1])
