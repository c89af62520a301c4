"""The reference of the API benchmark: hypercorn on trio with an application that answers one fixed JSON text.

    python -m scripts.benchmarks.bare_server < BODY

Prints its port, serves until its standard output's reader is gone or it is terminated.
"""

import socket
import sys
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve


async def main(body: bytes) -> None:
    """Serve `body` to everybody."""
    bound = socket.create_server(("127.0.0.1", 0))
    config = Config()
    config.bind = [f"fd://{bound.fileno()}"]
    config.accesslog = config.errorlog = None
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    print(bound.getsockname()[1], flush=True)
    await serve(application, config, mode="asgi")


if __name__ == "__main__":
    trio.run(main, sys.stdin.buffer.read())
