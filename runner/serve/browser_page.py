"""The page at `/` and its files at `/page/NAME`, from runner/serve/page, with headers that keep a browser inside.

The policy lets the page load and ask nothing but this server, and lets no script make markup from a string: a reply
of a model is text whatever it contains.
"""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE = Path(__file__).with_name("page")  # index.html and what it needs
RUNNING = "Ollama is running"  # what Ollama's clients look for at /
CONTENT_SECURITY_POLICY = "; ".join([
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
])  # fmt: skip
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept, but asked for again: a new version of moe-edge brings a new page
}


def page_routes(folder: Path) -> list[Route | Mount]:
    """`/`, and `/page/` where the folder is there."""

    async def root(request: Request) -> Response:
        index = folder / "index.html"
        if "text/html" in request.headers.get("accept", "") and index.is_file():
            return FileResponse(index, headers=HEADERS)
        return Response(RUNNING, media_type="text/plain")

    routes: list[Route | Mount] = [Route("/", root, methods=["GET"])]
    if folder.is_dir():
        routes.append(Mount("/page", _WithHeaders(StaticFiles(directory=folder))))
    return routes


class _WithHeaders:
    """An application whose every answer carries HEADERS."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def adding(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, adding)
