"""Between the endpoints and the socket: errors in one shape, streams that end cleanly, a count of every response.

Apart from `api.py`, because nothing here knows what is asked or answered.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.metrics import Metrics
from lcconvert.runtime.protocol import ApiError
from lcconvert.runtime.worker import ClientLeft, Rejected, Stopped, TimedOut

STALLED = 120.0  # seconds a client may take to accept one event of a stream
_CLIENT_GONE = 499  # nginx's number for "client closed request"; only the metrics see it


def as_api_error(error: Exception) -> ApiError:
    """What a client is told. Its own mistakes in words; our failures without detail, which is in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, ClientLeft | ClientDisconnect):
        return ApiError(_CLIENT_GONE, "the client left")
    if isinstance(error, TimedOut):
        return ApiError(504, f"{error}; ask for less or allow more time", param="timeout", code="timeout")
    if isinstance(error, Rejected):
        return ApiError(503, str(error), code="overloaded", kind="server_error")
    if isinstance(error, Stopped):
        return ApiError(503, f"{error}; send the request again later", code="stopped", kind="server_error")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}; /openapi.json lists the endpoints")
    return ApiError(500, "the server failed on this request; its log has the reason", kind="server_error")


def respond_to_error(request: Request, error: Exception) -> Response:
    known = as_api_error(error)
    return JSONResponse(known.body, status_code=known.status, headers=getattr(error, "headers", None))


def sse(body: dict[str, Any]) -> str:
    """One server-sent event. ASCII, because some clients take U+2028 and its like for the end of a line."""
    return f"data: {json.dumps(body, allow_nan=False)}\n\n"


class EventStream(StreamingResponse):
    """`at_end` is called however the response ends, also when the client leaves before the first event.

    A client that takes nothing for `STALLED` seconds is cut off, so that no connection is held for ever.
    """

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(STALLED):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            await super().__call__(scope, receive, send_in_time)
        finally:
            self._at_end()


class CountRequests:
    """ASGI middleware: one count a request. A response that was not sent to its end counts as `_CLIENT_GONE`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = started = _CLIENT_GONE

        async def watch(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                started = message["status"]
            elif not message.get("more_body", False):
                status = started
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
