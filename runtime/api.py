"""The HTTP application of one engine: OpenAI's chat and completion endpoints, `/health`, `/metrics`.

The event loop only parses, queues and forwards; the worker thread runs the model and small threads tokenize, so the
cheap endpoints answer at any moment. A stream that has nothing to say for a while sends an SSE comment, which clients
skip, so that no proxy takes a long prefill for a dead connection.

Left out: TLS and several models in one process (put a proxy in front), and the web page. Request and answer text never
reaches the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.metrics import Metrics
from lcconvert.runtime.protocol import (
    DEFAULT_CHAT_TOKENS,
    DEFAULT_COMPLETION_TOKENS,
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    TokenLogprob,
    model_body,
    parse_request,
    session_body,
    usage_body,
)
from lcconvert.runtime.sessions import Sessions, drop_session, file_of, list_sessions
from lcconvert.runtime.units import format_bytes
from lcconvert.runtime.worker import ClientLeft, Job, Progress, Rejected, Stopped, TimedOut, Worker

if TYPE_CHECKING:
    from lcconvert.runtime.engine import Engine, Piece

KEEP_ALIVE = 10.0  # seconds of silence before a stream sends a comment
_CLIENT_GONE = 499  # nginx's number for "client closed request"; only the metrics see it
_T = TypeVar("_T")


class _Api:
    """The endpoints of one engine."""

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        api_key: str | None,
        keep_alive: float,
        prefix_cache: int | None,
        sessions: Sessions | None,
    ) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.model_name = model_name
        self.keep_alive = keep_alive
        self.started = time.time()
        self.metrics = Metrics()
        self.worker = Worker(engine, self.metrics, prefix_cache=prefix_cache, sessions=sessions)
        self.session_folder = sessions.folder if sessions else None
        self._key = api_key.encode() if api_key else None
        # A token is about four bytes of text; JSON escapes can make six of one. Beyond that nothing can fit.
        self._max_body = 2**20 + 32 * engine.max_context
        self._tokenizers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="lcconvert-tokenize")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)
            self._tokenizers.shutdown(wait=False, cancel_futures=True)

    # Endpoints

    async def index(self, request: Request) -> Response:
        lines = [
            f"lcconvert serves {self.model_name}, {self.engine.max_context} tokens of context.", "",
            "POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/sessions",
            "GET /health   GET /metrics",
        ]  # fmt: skip
        return PlainTextResponse("\n".join(lines) + "\n")

    async def health(self, request: Request) -> Response:
        state = self.worker.state()
        status = "failed" if not state["alive"] else "stopping" if state["stopping"] else "ok"
        body = {
            "status": status,
            "model": self.model_name,
            "max_context": self.engine.max_context,
            "running": state["running"],
            "waiting": state["waiting"],
            "uptime_seconds": round(time.time() - self.started, 1),
        }
        return JSONResponse(body, status_code=200 if status == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        body, media_type = self.metrics.render()
        return Response(body, media_type=media_type)

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._authorize(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Response:
        self._authorize(request)
        body = await self._body(request)
        asked = await self._in_thread(lambda: parse_request(ChatRequest, body))
        self._check_model(asked.model)
        if not self.tokenizer.has_chat_template:
            raise ApiError(400, f"{self.model_name} has no chat template; use /v1/completions", code="no_chat_template")
        messages = [message.for_template() for message in asked.messages]
        ids = await self._in_thread(lambda: self.tokenizer.encode_chat(messages))
        return await self._answer(request, asked, ids, DEFAULT_CHAT_TOKENS, ChatAnswer(self.model_name))

    async def completions(self, request: Request) -> Response:
        self._authorize(request)
        body = await self._body(request)
        asked = await self._in_thread(lambda: parse_request(CompletionRequest, body))
        self._check_model(asked.model)
        prompt = asked.prompt
        if isinstance(prompt, str):
            text = prompt
            ids = await self._in_thread(lambda: self.tokenizer.encode(text, add_special=True))
        else:
            ids = prompt
            if (worst := max(ids, default=0)) >= (size := self.engine.spec.vocab_size):
                raise ApiError(400, f"prompt: token id {worst} is outside the vocabulary of {size}", param="prompt")
        return await self._answer(request, asked, ids, DEFAULT_COMPLETION_TOKENS, CompletionAnswer(self.model_name))

    async def sessions(self, request: Request) -> Response:
        self._authorize(request)
        folder = self._session_folder()
        found = await self._in_thread(lambda: list_sessions(folder))
        return JSONResponse({"object": "list", "data": [session_body(name, saved) for name, saved in found]})

    async def session(self, request: Request) -> Response:
        """POST saves what is kept of a session now; DELETE removes its file."""
        self._authorize(request)
        name, folder = request.path_params["name"], self._session_folder()
        file_of(folder, name)
        if request.method == "POST":
            with contextlib.suppress(KeyError):
                tokens = await asyncio.wrap_future(self.worker.save_session(name))
                return JSONResponse({"id": name, "object": "session", "tokens": tokens})
        elif await self._in_thread(lambda: drop_session(folder, name)):
            return JSONResponse({"id": name, "object": "session", "deleted": True})
        raise ApiError(404, f"there is no session {name!r} to save or drop", code="session_not_found")

    # What the endpoints share

    def _session_folder(self) -> Path:
        if self.session_folder is None:
            raise ApiError(
                400, "this server keeps no sessions; start it with --session-dir", param="session", code="no_sessions"
            )
        return self.session_folder

    def _authorize(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise ApiError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
            )

    def _model(self) -> dict[str, Any]:
        return model_body(self.model_name, int(self.started), self.engine.max_context)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            message = f"model {name[:200]!r} is not served here; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _body(self, request: Request) -> bytes:
        """The JSON body. The content type is required so that no web page can post here without the browser asking."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"content type is {kind[:100]!r}, expected 'application/json'")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body:
                raise ApiError(413, f"the body is over {self._max_body} bytes, more than the context could hold")
        return bytes(body)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, work)

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        ids: list[int],
        default_tokens: int,
        answer: ChatAnswer,
    ) -> Response:
        if asked.session is not None:
            self._session_folder()
        if not ids:
            raise ApiError(400, "the prompt has no tokens", code="empty_prompt")
        room = self.engine.max_context - len(ids)
        max_tokens = asked.asked_tokens or min(default_tokens, max(room, 1))
        if max_tokens > room:
            raise self._too_long(asked, len(ids), max_tokens)
        job = Job(ids, asked.sampling(max_tokens), progress=bool(asked.progress), session=asked.session)
        self.worker.submit(job)
        end = self._give_up_after(job, asked.timeout)
        if asked.stream:
            return _EventStream(self._stream(job, asked, answer), lambda: end("the stream is over"))
        watch = asyncio.create_task(self._watch(request, job))
        try:
            return JSONResponse(await self._collect(job, asked, answer))
        except Exception as error:
            raise _as_api_error(error) from error
        finally:
            watch.cancel()
            end("the request is over")

    def _too_long(self, asked: ChatRequest | CompletionRequest, prompt: int, max_tokens: int) -> ApiError:
        """The refusal of a request that can never fit, with the memory it would take."""
        most, token_bytes = self.engine.max_context, self.engine.kv_bytes_per_token()
        plan = {
            "needed_tokens": prompt + max_tokens,
            "needed_bytes": round((prompt + max_tokens) * token_bytes),
            "free_bytes": round(self.worker.free_tokens() * token_bytes),
            "largest_context": most,
        }
        wanted = f"{prompt} prompt tokens" + (f" + {max_tokens} max_tokens" if asked.asked_tokens else "")
        advice = "shorten the prompt" + (" or lower max_tokens" if prompt < most else "")
        message = (
            f"{wanted} do not fit in {most} tokens of context; {advice} (it needs "
            f"{format_bytes(plan['needed_bytes'])} of KV cache, {format_bytes(plan['free_bytes'])} are free)"
        )
        param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        return ApiError(400, message, param=param, code="context_length_exceeded", plan=plan)

    def _give_up_after(self, job: Job, seconds: float | None) -> Callable[[str], None]:
        """Ends the job when its time is over; returns what to call with a reason when its response is over."""
        timer = None
        if seconds is not None:
            reason = TimedOut(f"the request took longer than its timeout of {seconds:g} s")
            timer = asyncio.get_running_loop().call_later(seconds, lambda: self.worker.cancel(job, reason))

        def end(why: str) -> None:
            if timer is not None:
                timer.cancel()
            self.worker.cancel(job, ClientLeft(why))

        return end

    async def _watch(self, request: Request, job: Job) -> None:
        """Cancels the job when the client hangs up."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.worker.cancel(job, ClientLeft("the client left"))

    async def _collect(self, job: Job, asked: ChatRequest | CompletionRequest, answer: ChatAnswer) -> dict[str, Any]:
        text, count, logprobs = "", 0, _wanted_logprobs(asked)
        while True:
            event = await job.next()
            if event is None or isinstance(event, Progress):
                continue
            text += event.text
            count += 1
            if logprobs is not None:
                logprobs.append(self._logprob(event))
            if event.finish is not None:
                return answer.whole(text, event.finish, logprobs, usage_body(len(job.ids), count, job.cached))

    async def _stream(self, job: Job, asked: ChatRequest | CompletionRequest, answer: ChatAnswer) -> AsyncIterator[str]:
        """Server-sent events, ended by [DONE] or by an error."""
        count, finish = 0, None
        # OpenAI: with include_usage every chunk has the field, null until the last.
        extra = {"usage": None} if asked.include_usage else {}
        try:
            while finish is None:
                event = await job.next(self.keep_alive)
                if event is None:
                    yield ": waiting\n\n"
                elif isinstance(event, Progress):
                    report = {"done": event.done, "total": event.total}
                    yield _sse(answer.notice(lcconvert_progress=report, **extra))
                else:
                    if count == 0 and (opening := answer.opening()) is not None:
                        yield _sse({**opening, **extra})
                    count += 1
                    finish = event.finish
                    logprobs = None if _wanted_logprobs(asked) is None else [self._logprob(event)]
                    if event.text or finish is not None or logprobs is not None:
                        yield _sse({**answer.piece(event.text, finish, logprobs), **extra})
            if asked.include_usage:
                yield _sse(answer.notice(usage=usage_body(len(job.ids), count, job.cached)))
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _sse(_as_api_error(error).body)

    def _logprob(self, piece: Piece) -> TokenLogprob:
        return TokenLogprob(self.tokenizer.decode([piece.token], skip_special=False), piece.logprob)


def _wanted_logprobs(asked: ChatRequest | CompletionRequest) -> list[TokenLogprob] | None:
    return [] if isinstance(asked, ChatRequest) and asked.logprobs else None


def _sse(body: dict[str, Any]) -> str:
    # ASCII, because some clients take U+2028 and its like for the end of a line
    return f"data: {json.dumps(body, allow_nan=False)}\n\n"


class _EventStream(StreamingResponse):
    """`at_end` is called however the response ends, also when the client leaves before the first event."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


# Errors and counting


def _as_api_error(error: Exception) -> ApiError:
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
        return ApiError(error.status_code, f"{error.detail}; GET / lists the endpoints")
    return ApiError(500, "the server failed on this request; its log has the reason", kind="server_error")


def _respond_to_error(request: Request, error: Exception) -> Response:
    known = _as_api_error(error)
    return JSONResponse(known.body, status_code=known.status, headers=getattr(error, "headers", None))


class _CountRequests:
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


def make_app(
    engine: Engine,
    *,
    model_name: str,
    api_key: str | None = None,
    keep_alive: float = KEEP_ALIVE,
    prefix_cache: int | None = None,
    sessions: Sessions | None = None,
) -> Starlette:
    """The ASGI application of one loaded engine, which its worker thread owns from startup to shutdown.

    `app.state.worker` is that worker. `prefix_cache`: see `PrefixCache`;
    without `sessions` a request that names one is refused.
    Raises UserError when the engine has no tokenizer.
    """
    api = _Api(engine, model_name, api_key, keep_alive, prefix_cache, sessions)
    routes = [
        Route("/", api.index),
        Route("/health", api.health),
        Route("/metrics", api.show_metrics),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/sessions", api.sessions),
        Route("/v1/sessions/{name}", api.session, methods=["POST", "DELETE"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
    ]
    known = (ApiError, UserError, Rejected, HTTPException, ClientDisconnect, Exception)
    count = Middleware(_CountRequests, metrics=api.metrics, paths=frozenset(route.path for route in routes))
    app = Starlette(
        routes=routes,
        middleware=[count],
        exception_handlers=dict.fromkeys(known, _respond_to_error),
        lifespan=api.lifespan,
    )
    app.state.worker = api.worker
    return app
