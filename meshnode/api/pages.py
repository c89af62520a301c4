"""The few pages of the agent itself, served by a quart-trio application behind the guard.

Its job is static HTML: the front page, the readable description of the API, the login page. It leaves every data
route to the router. Quart is imported at the first visit of a page, in a thread: it takes 13 MB and a tenth of a
second, and most agents are never visited by a browser.
"""

from collections.abc import Callable
from importlib import resources
from typing import Any, cast

import trio

from meshnode.api.routing import AsgiApp, AsgiReceive, AsgiSend, Mount, Route

_STATIC = {
    "/docs.css": ("docs.css", "text/css"),
    "/login": ("login.html", "text/html"),
    "/login.js": ("login.js", "text/javascript"),
}


def _media_type(path: str) -> str:
    return _STATIC[path][1] if path in _STATIC else "text/html"


class Pages:
    """Serves the pages. `render_docs` makes the page of the API's description, once."""

    def __init__(self, render_docs: Callable[[], str]) -> None:
        self._render_docs = render_docs
        self._app: AsgiApp | None = None
        self._making = trio.Lock()

    async def __call__(self, scope: Any, receive: AsgiReceive, send: AsgiSend) -> None:
        async with self._making:
            if self._app is None:
                self._app = await trio.to_thread.run_sync(self._make_app)
        await self._app(scope, receive, send)

    def _make_app(self) -> AsgiApp:
        from quart import Response
        from quart_trio import QuartTrio

        app = QuartTrio(__name__, static_folder=None)
        folder = resources.files("meshnode.api").joinpath("static")
        texts = {path: folder.joinpath(name).read_text("utf-8") for path, (name, _) in _STATIC.items()}
        texts["/"] = folder.joinpath("index.html").read_text("utf-8")
        texts["/docs"] = self._render_docs()

        async def page() -> Response:
            from quart import request

            return Response(texts[request.path], content_type=f"{_media_type(request.path)}; charset=utf-8")

        for number, path in enumerate(texts):
            app.add_url_rule(path, f"page_{number}", page, methods=["GET"])
        return cast(AsgiApp, app)

    def mount(self, *, front_page: bool = True) -> Mount:
        """The routes of the pages. Those that must be reachable before anybody has logged in are public."""
        table = [
            ("/docs", "This description, readable.", False),
            ("/docs.css", "Its style.", True),
            ("/login", "Where login links lead.", True),
            ("/login.js", "Its script.", True),
        ]
        if front_page:
            table.append(("/", "The front page.", False))
        return Mount(
            [
                Route(
                    method="GET",
                    path=path,
                    asgi=self,
                    media=(_media_type(path),),
                    summary=summary,
                    public=public,
                    tag="pages",
                )
                for path, summary, public in table
            ]
        )
