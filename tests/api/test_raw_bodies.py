"""Bodies that are taken piece by piece: as slowly as their source makes them, and refused while they come."""

import contextlib
from typing import Any

import trio

from meshnode.api.limits import ApiLimits
from meshnode.api.routing import ApiRequest, Mount, Route
from meshnode.kernel.errors import ErrorCode, MeshError
from tests.support.api_client import ApiClient
from tests.support.api_server import running_api


async def test_a_handler_that_refuses_late_does_not_leave_a_sender_hanging() -> None:
    async def slow(request: ApiRequest[Any, Any]) -> None:
        assert request.chunks is not None
        await anext(request.chunks)
        await trio.sleep(0.3)  # what is sent meanwhile fills every queue before it
        raise MeshError(ErrorCode.DISK_FULL, "It is full.")

    route = Route(method="PUT", path="/api/full", handler=slow, summary="Full.", raw_body=True, body_bytes_max=10**12)
    async with running_api(mounts=[Mount([route])]) as running, ApiClient(running.port) as client:
        assert client.stream is not None
        head = f"PUT /api/full HTTP/1.1\r\nHost: {client.own_host}\r\nContent-Type: application/octet-stream\r\n"
        await client.stream.send_all((head + "Content-Length: 999999999999\r\n\r\n").encode())
        with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):
            while True:
                await client.stream.send_all(bytes(1_000_000))
        assert (await client.stream.receive_some(65536)).startswith(b"HTTP/1.1 507 ")


async def test_a_patient_route_waits_for_a_slow_body_and_others_do_not() -> None:
    limits = ApiLimits(body_grace_s=0.1, linger_s=0.2)
    answers = []
    for path in ("/api/files/slow", "/api/patient"):
        async with running_api(limits=limits) as running, ApiClient(running.port) as client:
            assert client.stream is not None
            head = f"PUT {path} HTTP/1.1\r\nHost: {client.own_host}\r\nContent-Type: application/octet-stream\r\n"
            await client.stream.send_all((head + "Content-Length: 2\r\n\r\nx").encode())
            await trio.sleep(0.5)
            with contextlib.suppress(trio.BrokenResourceError):
                await client.stream.send_all(b"y")
            answers.append((await client.stream.receive_some(65536))[:12])
    assert answers == [b"HTTP/1.1 408", b"HTTP/1.1 200"]
