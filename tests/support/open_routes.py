"""Asks every route an agent describes without credentials, for the test that none of them answers.

Generated from the OpenAPI document, so that a route added later is asked too.
"""

import json
from collections.abc import Mapping
from typing import Any

import trio

from tests.support.api_client import ApiClient

answer_wait_s = 3.0  # a busy machine takes its time to refuse


async def routes_that_answer(
    port: int, document: Mapping[str, Any], *, headers: Mapping[str, str] | None = None
) -> set[str]:
    """The routes (`GET /path`) that did anything but refuse with 401 or 429: answered, or began to work."""
    answering: set[str] = set()

    async def ask(method: str, path: str, operation: Mapping[str, Any]) -> None:
        body = None
        sent = dict(headers or {})
        if "requestBody" in operation:
            sent["Content-Type"] = next(iter(operation["requestBody"]["content"]))
            body = json.dumps({}).encode()
        filled = "/".join("1" if part.startswith("{") else part for part in path.split("/"))
        async with ApiClient(port) as client:
            await client.send(method.upper(), filled, headers=sent, body=body)
            status = None
            with trio.move_on_after(answer_wait_s):
                status, _ = await client.receive_head()
            if status not in {401, 429}:
                answering.add(f"{method.upper()} {path}")

    async with trio.open_nursery() as nursery:
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                nursery.start_soon(ask, method, path, operation)
    return answering


def public_routes(document: Mapping[str, Any]) -> set[str]:
    """The routes that say of themselves that they need no credentials."""
    return {
        f"{method.upper()} {path}"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if operation.get("security") == []
    }
