"""The page at `/`: its three static files from `page/`, and what they have to know of this server.

The page is plain HTML, CSS and one JavaScript module. It loads nothing from elsewhere and talks to this server only,
which its Content-Security-Policy also enforces; text of files and answers becomes text nodes, never markup. It needs no
key to be shown, because it holds nothing: every request that it makes is checked like any other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_KINDS = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


def page_routes(about: dict[str, Any]) -> list[Route]:
    """`/` and what lies under `/page/`; `about` is served to the page as JSON."""

    async def tell(request: Request) -> Response:
        return JSONResponse(about, headers=_HEADERS)

    routes = [Route("/" if name == "index.html" else f"/page/{name}", _static(name)) for name in _KINDS]
    return [*routes, Route("/page/about.json", tell)]


def _static(name: str) -> Callable[[Request], Awaitable[Response]]:
    body = files("lcconvert.runtime").joinpath("page", name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(body, media_type=_KINDS[name], headers=_HEADERS)

    return send
