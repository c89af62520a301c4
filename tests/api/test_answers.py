"""What the local API answers: routes, decoding, errors, lists, headers, and that every answer has a request id."""

import html
from typing import Any

import msgspec
import pytest
import trio

from meshnode.api.limits import ApiLimits
from meshnode.api.render import encode
from meshnode.api.routing import ApiRequest, Mount, Route, Router
from meshnode.kernel.errors import MeshError
from tests.support.api_client import ApiClient, fetch
from tests.support.api_server import Thing, running_api, until


async def test_a_struct_is_rendered_and_what_is_absent_is_absent() -> None:
    async with running_api() as running:
        answer = await fetch(running.port, "GET", "/api/things/lamp")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == {"name": "lamp", "size": 3}


async def test_errors_have_one_form() -> None:
    async with running_api() as running:
        answer = await fetch(running.port, "GET", "/api/things/missing")
        unknown = await fetch(running.port, "GET", "/api/nowhere")
        wrong = await fetch(running.port, "PUT", "/api/things/lamp")
        broken = await fetch(running.port, "GET", "/api/broken")
        log = running.log_text.getvalue()
    assert answer.status == 404
    assert answer.json == {
        "error": "There is no such thing. GET /api/things lists them.",
        "code": "not_found",
        "retryable": False,
    }
    assert (unknown.status, unknown.json["code"]) == (404, "not_found")
    assert (wrong.status, wrong.json["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert (broken.status, broken.json["code"]) == (500, "internal")
    request_id = broken.headers["x-request-id"]
    assert request_id in broken.json["error"]
    assert broken.json["detail"] == {"request_id": request_id}
    assert b"Traceback" not in broken.body
    assert b"canary" not in broken.body
    assert f"request_id={request_id}" in log
    assert "Traceback" in log


async def test_every_answer_has_a_request_id_of_its_own_and_the_security_headers() -> None:
    seen = set()
    async with running_api() as running, ApiClient(running.port) as client:
        for method, path in [
            ("GET", "/healthz"),
            ("GET", "/api/nowhere"),
            ("POST", "/healthz"),
            ("GET", "/api/broken"),
            ("GET", "/docs"),
            ("DELETE", "/api/things/a"),
        ]:
            answer = await client.request(method, path)
            seen.add(answer.headers["x-request-id"])
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cache-control"] == "no-store"
            assert "server" not in answer.headers
            assert "access-control-allow-origin" not in answer.headers
    assert len(seen) == 6


async def test_a_handler_without_an_answer_is_204_and_a_route_sets_its_status() -> None:
    async with running_api() as running:
        removed = await fetch(running.port, "DELETE", "/api/things/lamp")
        made = await fetch(running.port, "POST", "/api/things", json_body={"name": "lamp", "size": 2})
        assert running.trial.changes == ["-lamp", "lamp"]
    assert (removed.status, removed.body) == (204, b"")
    assert (made.status, made.json) == (201, {"name": "lamp", "size": 2})


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"name": "x", "colour": "red"}', "colour"),
        (b'{"size": 1}', "name"),
        (b'{"name": "x", "size": "1"}', "size"),
        (b'{"name": null}', "name"),
        (b"[]", "body"),
        (b"", "name"),
        (b"{", None),
        (b"\xff\xfe", None),
        (b'{"name": "\xff"}', None),
        (b"[" * 100_000, None),
    ],
)
async def test_a_bad_body_is_a_400_that_names_the_field(body: bytes, field: str | None) -> None:
    async with running_api() as running:
        answer = await fetch(
            running.port, "POST", "/api/things", body=body, headers={"Content-Type": "application/json"}
        )
        assert running.trial.changes == []
    assert (answer.status, answer.json["code"]) == (400, "bad_request")
    if field is not None:
        assert answer.json["detail"] == {"field": field}
        assert field in answer.json["error"]


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/octet-stream"]
)
async def test_a_body_that_is_not_json_is_a_415(media_type: str) -> None:
    async with running_api() as running:
        answer = await fetch(
            running.port, "POST", "/api/things", body=b'{"name": "x"}', headers={"Content-Type": media_type}
        )
        assert running.trial.changes == []
    assert (answer.status, answer.json["code"]) == (415, "unsupported_media_type")


async def test_lists_page_by_their_link_header() -> None:
    names: list[str] = []
    async with running_api() as running, trio.open_nursery():
        path: str | None = "/api/things?prefix=a%20b&limit=2"
        while path is not None:
            answer = await fetch(running.port, "GET", path)
            assert answer.status == 200
            assert answer.headers["meshnode-unreachable"] == "abc"
            names += [thing["name"] for thing in answer.json]
            link = answer.headers.get("link")
            path = None if link is None else link.partition(">")[0].removeprefix("<")
            assert link is None or link.endswith('>; rel="next"')
    assert names == [f"a b{number}" for number in range(5)]


async def test_the_answer_for_this_node_alone() -> None:
    async with running_api() as running:
        answer = await fetch(running.port, "GET", "/api/things?scope=local")
    assert "meshnode-unreachable" not in answer.headers


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/things?scope=galaxy", "scope"),
        ("/api/things?limit=0", "limit"),
        ("/api/things?limit=1001", "limit"),
        ("/api/things?limit=-1", "limit"),
        ("/api/things?limit=%D9%A1", "limit"),
        ("/api/things?limit=99999999999999999999", "limit"),
        ("/api/things?colour=red", "colour"),
        ("/api/things?prefix=a&prefix=b", "prefix"),
        ("/api/things/lamp?scope=local", "scope"),
        ("/api/things?" + "&".join(f"tags={n}" for n in range(65)), None),
        ("/api/things?prefix=%ff", None),
        ("/api/things?prefix=" + "x" * 9000, None),
        ("/api/things/%ff", None),
        ("/api/things/%00", None),
        ("/api/things/a%0d%0aSet-Cookie:x", None),
        ("/a" * 33, None),
        ("*", None),
        ("http://127.0.0.1/api/things", None),
    ],
)
async def test_a_bad_path_or_query_is_a_400(path: str, field: str | None) -> None:
    async with running_api() as running:
        answer = await fetch(running.port, "GET", path)
    assert (answer.status, answer.json["code"]) == (400, "bad_request")
    if field is not None:
        assert answer.json["detail"] == {"field": field}


async def test_path_parameters_are_decoded_once() -> None:
    async with running_api() as running:
        one = await fetch(running.port, "GET", "/api/things/llama3.2%3A3b%2Fx%2525")
    assert one.json["name"] == "llama3.2:3b/x%25"


async def test_head_answers_like_get_without_the_body() -> None:
    async with running_api() as running, ApiClient(running.port) as client:
        await client.send("HEAD", "/api/things/lamp")
        status, headers = await client.receive_head()
    assert status == 200
    assert headers["content-length"] == "24"


async def test_options_names_the_methods() -> None:
    async with running_api() as running:
        answer = await fetch(running.port, "OPTIONS", "/api/things")
        unknown = await fetch(running.port, "OPTIONS", "/api/nowhere")
    assert (answer.status, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
    assert unknown.status == 404


async def test_bytes_in_pieces_and_whole() -> None:
    async with running_api() as running:
        pieces = await fetch(running.port, "GET", "/api/pieces")
        large = await fetch(running.port, "GET", "/api/large/3000000")
    assert (pieces.body, pieces.headers["content-length"]) == (b"piece" * 3, "15")
    assert large.body == b"x" * 3_000_000


async def test_a_raw_body_is_streamed_up_to_its_limit() -> None:
    async with running_api() as running:
        headers = {"Content-Type": "application/octet-stream"}
        fits = await fetch(running.port, "PUT", "/api/files/a/b", body=b"x" * 4_000_000, headers=headers)
        async with ApiClient(running.port) as client:
            await client.send("PUT", "/api/files/a", headers={**headers, "Transfer-Encoding": "chunked"}, body=None)
            status, _ = await client.receive_head()
    assert fits.json["size"] == 4_000_000
    assert status == 200


async def test_too_large_a_body_is_refused_before_it_is_read() -> None:
    async with running_api(limits=ApiLimits(linger_s=0.2)) as running, ApiClient(running.port) as client:
        assert client.stream is not None
        head = f"POST /api/things HTTP/1.1\r\nHost: {client.own_host}\r\nContent-Type: application/json\r\n"
        await client.stream.send_all((head + "Content-Length: 999999999999\r\n\r\n").encode())
        answer = await client.stream.receive_some(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"too_large"' in answer
    assert b"connection: close" in answer.lower()


async def test_too_large_a_body_without_a_length_is_refused_while_it_comes() -> None:
    limits = ApiLimits(body_bytes_max=1000, linger_s=0.2)
    async with running_api(limits=limits) as running, ApiClient(running.port) as client:
        assert client.stream is not None
        head = f"POST /api/things HTTP/1.1\r\nHost: {client.own_host}\r\nContent-Type: application/json\r\n"
        await client.stream.send_all((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        await client.stream.send_all(b"3e8\r\n" + b"x" * 1000 + b"\r\n" + b"1\r\nx\r\n")
        answer = await client.stream.receive_some(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_the_answer_to_an_unread_upload_reaches_the_client() -> None:
    """Closing with bytes unread would reset the connection, and the client would never see why."""
    async with running_api() as running:
        body = b"x" * 2_000_000
        answer = await fetch(running.port, "POST", "/api/nowhere", body=body, headers={"Content-Type": "text/plain"})
    assert answer.status == 415


async def test_the_description_matches_the_router_and_the_page_needs_no_script() -> None:
    async with running_api() as running:
        document = (await fetch(running.port, "GET", "/openapi.json")).json
        page = (await fetch(running.port, "GET", "/docs")).body.decode()
        routes = running.api.router.routes
    described = {(m.upper(), p) for p, methods in document["paths"].items() for m in methods}
    assert described == {(route.method, route.path.replace("...}", "}")) for route in routes}
    references = list(_references(document))
    assert references
    assert all(name in document["components"]["schemas"] for name in references)
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert all(html.escape(route.summary) in page for route in routes)


def _references(node: Any) -> Any:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "$ref":
                yield value.rpartition("/")[2]
            else:
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


async def test_pages() -> None:
    async with running_api() as running:
        front = await fetch(running.port, "GET", "/")
        style = await fetch(running.port, "GET", "/docs.css")
        script = await fetch(running.port, "GET", "/login.js")
        missing = await fetch(running.port, "GET", "/login.html")
    assert b"dashboard is not installed yet" in front.body
    assert front.headers["content-type"] == "text/html; charset=utf-8"
    assert style.headers["content-type"].startswith("text/css")
    assert script.headers["content-type"].startswith("text/javascript")
    assert "script-src 'self'" in front.headers["content-security-policy"]
    assert "unsafe" not in front.headers["content-security-policy"]
    assert missing.status == 404


async def test_health_readiness_and_figures() -> None:
    async with running_api() as running:
        alive = await fetch(running.port, "GET", "/healthz")
        ready = await fetch(running.port, "GET", "/readyz")
        text = await fetch(running.port, "GET", "/metrics")
        figures = await fetch(running.port, "GET", "/api/metrics")
    assert alive.json == {"status": "ok"}
    assert ready.json == {"ready": True, "waiting_for": {}}
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'meshnode_api_requests_total{status="200"} 2.0' in text.body
    assert figures.json["meshnode_api_requests_total"] == {"200": 3}


async def test_a_handler_is_cancelled_when_its_client_leaves() -> None:
    async with running_api() as running:
        async with ApiClient(running.port) as client:
            await client.send("GET", "/api/slow")
            await until(lambda: running.trial.running == 1)
        await until(lambda: running.trial.running == 0)


async def test_too_many_requests_at_once_are_told_to_come_back() -> None:
    async with running_api(limits=ApiLimits(requests_max=1)) as running:
        async with ApiClient(running.port) as client:
            await client.send("GET", "/api/slow")
            await until(lambda: running.trial.running == 1)
            refused = await fetch(running.port, "GET", "/healthz")
        await until(lambda: running.trial.running == 0)
        again = await fetch(running.port, "GET", "/healthz")
    assert (refused.status, refused.json["code"], refused.headers["retry-after"]) == (503, "unavailable", "1")
    assert refused.json["retryable"] is True
    assert again.status == 200


async def test_too_many_connections_are_told_so() -> None:
    async with running_api(limits=ApiLimits(connections_max=2)) as running:
        async with ApiClient(running.port) as one, ApiClient(running.port) as two:
            assert (await one.request("GET", "/healthz")).status == 200
            assert (await two.request("GET", "/healthz")).status == 200
            stream = await trio.open_tcp_stream("127.0.0.1", running.port)
            async with stream:
                assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 503 ")
            assert (await one.request("GET", "/healthz")).status == 200
        assert running.counted("meshnode_api_connections_cut_total", "limit") == 1


async def test_ipv6_loopback_answers_where_there_is_one() -> None:
    async with running_api() as running:
        if len(running.server._sockets.sockets) < 2:
            pytest.skip("this machine has no ::1")
        answer = await fetch(running.port, "GET", "/healthz", host="::1")
    assert answer.status == 200


class _Nested(msgspec.Struct):
    thing: Thing
    extra: dict[str, object]
    unset: str | msgspec.UnsetType = msgspec.UNSET


class _Tagged(msgspec.Struct, tag="tagged", rename="camel"):
    some_name: str | None = None
    other_name: int = 1


def test_only_a_structs_own_absent_fields_are_left_out() -> None:
    value = [_Nested(Thing("a", 1), {"kept": None, "list": [None, Thing("b", 2)]}), _Tagged()]
    assert msgspec.json.decode(encode(value)) == [
        {"thing": {"name": "a", "size": 1}, "extra": {"kept": None, "list": [None, {"name": "b", "size": 2}]}},
        {"type": "tagged", "otherName": 1},
    ]


async def _handler(_request: ApiRequest[Any, Any]) -> None: ...


def _route(path: str, **more: Any) -> Route:
    return Route(method=more.pop("method", "GET"), path=path, handler=_handler, summary="x", **more)


@pytest.mark.parametrize(
    ("path", "expected", "params"),
    [
        (b"/a", "/a", {}),
        (b"/a/b", "/a/b", {}),
        (b"/a/c", "/a/{x}", {"x": "c"}),
        (b"/a/b/rest/of/it", "/a/{rest...}", {"rest": "b/rest/of/it"}),
        (b"/a/", "/a/{rest...}", {"rest": ""}),
        (b"/a/c/d", "/a/{x}/d", {"x": "c"}),
        (b"/b", None, {}),
        (b"/", None, {}),
    ],
)
def test_the_router_prefers_what_is_said_most_exactly(
    path: bytes, expected: str | None, params: dict[str, str]
) -> None:
    router = Router([Mount([_route(p) for p in ("/a", "/a/b", "/a/{x}", "/a/{x}/d", "/a/{rest...}")])])
    match = router.resolve("GET", path)
    assert (match.route.path if match.route else None) == expected
    assert match.params == params


@pytest.mark.parametrize(
    "make",
    [
        lambda: Router([Mount([_route("/a/{x}")]), Mount([_route("/a/{y}")])]),
        lambda: _route("a"),
        lambda: _route("/a/{x...}/b"),
        lambda: _route("/a", method="HEAD"),
        lambda: _route("/a", method="POST", get_changes=True),
        lambda: _route("/a", method="POST", request=Thing),
        lambda: Route(method="GET", path="/a", summary="neither handler nor application"),
    ],
)
def test_a_wrong_table_of_routes_does_not_start(make: Any) -> None:
    with pytest.raises(ValueError, match=r"a\b"):
        make()


async def test_a_surface_has_its_own_form_of_errors() -> None:
    def foreign(error: MeshError, status: int, request_id: str) -> object:
        return {"oops": {"message": error.message, "status": status, "id": request_id}}

    mount = Mount([_route("/v1/models")], prefix="/v1", error_body=foreign)
    async with running_api(mounts=[mount]) as running:
        inside = await fetch(running.port, "GET", "/v1/nowhere")
        outside = await fetch(running.port, "GET", "/v11/nowhere")
    assert inside.json["oops"]["status"] == 404
    assert inside.json["oops"]["id"] == inside.headers["x-request-id"]
    assert outside.json["code"] == "not_found"
