"""The HTTP application of one engine: OpenAI's chat and completion endpoints, `/health`, `/metrics`, a page.

The event loop only parses, queues and forwards; the worker thread runs the model and other processes tokenize, so the
cheap endpoints answer at any moment. A stream that has nothing to say for a while sends an SSE comment, which clients
skip, so that no proxy takes a long prefill for a dead connection.

Left out: TLS and several models in one process (put a proxy in front). Request and answer text never reaches the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lcconvert.runtime import packed
from lcconvert.runtime.bodies import (
    ChatAnswer,
    CompletionAnswer,
    Part,
    TokenLogprob,
    model_body,
    session_body,
    usage_body,
)
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.grammar import Grammars
from lcconvert.runtime.metrics import Metrics
from lcconvert.runtime.openapi import document
from lcconvert.runtime.protocol import (
    DEFAULT_CHAT_TOKENS,
    DEFAULT_COMPLETION_TOKENS,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Message,
    TokenizeRequest,
    Tool,
    parse_request,
)
from lcconvert.runtime.sessions import Sessions, drop_session, file_of, list_sessions
from lcconvert.runtime.texts import Texts
from lcconvert.runtime.tool_calls import ToolCallReader
from lcconvert.runtime.transport import CountRequests, EventStream, as_api_error, respond_to_error, sse
from lcconvert.runtime.units import format_bytes
from lcconvert.runtime.web import page_routes
from lcconvert.runtime.worker import ClientLeft, Job, Progress, Rejected, TimedOut, Worker

if TYPE_CHECKING:
    from lcconvert.runtime.engine import Engine, Piece
    from lcconvert.runtime.tokenizer import Tokenizer

KEEP_ALIVE = 10.0  # seconds of silence before a stream sends a comment
_MOST_BODY = 2**28  # bytes, whatever context an artifact claims to have
_IDS_A_PART = 2**15  # token ids of a long list that are written out at once
_BODY_SECONDS = 120.0  # a client has to send its request
_T = TypeVar("_T")
_Asked = TypeVar("_Asked", ChatRequest, CompletionRequest, TokenizeRequest)


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
        texts: Texts | None,
    ) -> None:
        self.engine = engine
        self.texts = texts or Texts(engine.tokenizer.files)
        self.tokenizer = engine.tokenizer
        self.model_name = model_name
        self.keep_alive = keep_alive
        self.started = time.time()
        self.metrics = Metrics()
        self.worker = Worker(engine, self.metrics, prefix_cache=prefix_cache, sessions=sessions)
        self.session_folder = sessions.folder if sessions else None
        self._key = api_key.encode() if api_key else None
        # A token is about four bytes of text; JSON escapes can make six of one. Beyond that nothing can fit.
        self._max_body = min(2**20 + 32 * engine.max_context, _MOST_BODY)
        self._held = 0  # bytes of bodies that are being received or parsed
        self._max_held = 8 * self._max_body
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="lcconvert-text")
        self._grammars = Grammars(engine.tokenizer, engine.spec.vocab_size, engine.eos_ids)
        self._document = document(model_name)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)
            self._threads.shutdown(wait=False, cancel_futures=True)
            self.texts.close()

    # Endpoints

    def about(self) -> dict[str, Any]:
        """What the page has to know."""
        engine = self.engine
        return {
            "model": self.model_name,
            "max_context": engine.max_context,
            "max_body": self._max_body,
            "chat": self.tokenizer.has_chat_template,
            "sessions": self.session_folder is not None,
            "key": self._key is not None,
            "kv_scheme": engine.kv.scheme,
            "context_bytes": round(engine.max_context * engine.kv_bytes_per_token()),
            "weights_bytes": engine.memory()["weights"],
            "control_tokens": self.tokenizer.control_tokens,
            **packed.WORDING,
        }

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

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def chat(self, request: Request) -> Response:
        asked = await self._asked(request, ChatRequest)
        ids = await self._chat_ids(asked.messages, asked.offered_tools)
        return await self._answer(request, asked, ids, DEFAULT_CHAT_TOKENS, ChatAnswer(self.model_name))

    async def completions(self, request: Request) -> Response:
        asked = await self._asked(request, CompletionRequest)
        prompt = asked.prompt
        if isinstance(prompt, str):
            text = prompt
            ids = await self._in_thread(lambda: self.texts.encode(text))
        else:
            ids = prompt
            if (worst := max(ids, default=0)) >= (size := self.engine.spec.vocab_size):
                raise ApiError(400, f"prompt: token id {worst} is outside the vocabulary of {size}", param="prompt")
        return await self._answer(request, asked, ids, DEFAULT_COMPLETION_TOKENS, CompletionAnswer(self.model_name))

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a prompt, and the memory its context would take."""
        asked = await self._asked(request, TokenizeRequest)
        if asked.messages is not None:
            ids = await self._chat_ids(asked.messages, asked.tools or [])
        else:
            text = asked.prompt or ""
            ids = await self._in_thread(lambda: self.texts.encode(text))
        body: dict[str, Any] = {"count": len(ids), "max_model_len": self.engine.max_context, **self._memory(len(ids))}
        if asked.return_tokens is False:
            return JSONResponse(body)
        head = json.dumps(body)[:-1]

        def parts() -> Iterator[str]:  # some at a time, because a million at once would keep the event loop waiting
            for first in range(0, max(len(ids), 1), _IDS_A_PART):
                yield (", " if first else head + ', "tokens": [') + json.dumps(ids[first : first + _IDS_A_PART])[1:-1]
            yield "]}"

        return StreamingResponse(parts(), media_type="application/json")

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

    async def _asked(self, request: Request, kind: type[_Asked]) -> _Asked:
        """The request in the body, once its sender may ask and the model is right."""
        self._authorize(request)
        body = bytearray()
        try:
            await self._receive(request, body)
            asked = await self._in_thread(lambda: parse_request(kind, bytes(body)))
        finally:
            self._held -= len(body)
        self._check_model(asked.model)
        return asked

    async def _receive(self, request: Request, body: bytearray) -> None:
        """The JSON body. The content type is required so that no web page can post here without the browser asking."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"content type is {kind[:100]!r}, expected 'application/json'")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    self._held += len(part)
                    if len(body) > self._max_body:
                        raise ApiError(413, f"the body is over {self._max_body} bytes, more than the context holds")
                    if self._held > self._max_held:
                        raise Rejected("too many large requests are arriving at once; retry later")
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from None

    async def _chat_ids(self, messages: list[Message], tools: list[Tool]) -> list[int]:
        if not self.tokenizer.has_chat_template:
            raise ApiError(400, f"{self.model_name} has no chat template; use /v1/completions", code="no_chat_template")

        def encode() -> list[int]:
            said = [message.for_template() for message in messages]
            return self.texts.encode_chat(said, [tool.for_template() for tool in tools])

        return await self._in_thread(encode)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

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
        constraint = None
        if asked.response_format is not None and (schema := asked.response_format.schema_wanted) is not None:
            constraint = await self._in_thread(lambda: self._grammars.constraint(schema))
        params = asked.sampling(max_tokens)
        job = Job(ids, params, progress=bool(asked.progress), session=asked.session, constraint=constraint)
        self.worker.submit(job)
        end = self._give_up_after(job, asked.timeout)
        if asked.stream:
            return EventStream(self._stream(job, asked, answer), lambda: end("the stream is over"))
        watch = asyncio.create_task(self._watch(request, job))
        try:
            return JSONResponse(await self._collect(job, asked, answer))
        except Exception as error:
            raise as_api_error(error) from error
        finally:
            watch.cancel()
            end("the request is over")

    def _too_long(self, asked: ChatRequest | CompletionRequest, prompt: int, max_tokens: int) -> ApiError:
        """The refusal of a request that can never fit, with the memory it would take."""
        most = self.engine.max_context
        needed = prompt + max_tokens
        plan = {"needed_tokens": needed, **self._memory(needed), "largest_context": most}
        wanted = f"{prompt} prompt tokens" + (f" + {max_tokens} max_tokens" if asked.asked_tokens else "")
        advice = "shorten the prompt" + (" or lower max_tokens" if prompt < most else "")
        message = (
            f"{wanted} do not fit in {most} tokens of context; {advice} (it needs "
            f"{format_bytes(plan['needed_bytes'])} of KV cache, {format_bytes(plan['free_bytes'])} are free)"
        )
        param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        return ApiError(400, message, param=param, code="context_length_exceeded", plan=plan)

    def _memory(self, tokens: int) -> dict[str, int]:
        """Bytes of KV cache that so many tokens need, and that are free."""
        token_bytes = self.engine.kv_bytes_per_token()
        free = self.worker.free_tokens()
        return {"needed_bytes": round(tokens * token_bytes), "free_bytes": round(free * token_bytes)}

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
        reader = _PieceReader(self.tokenizer, asked)
        parts: list[Part] = []
        while not parts or parts[-1].finish is None:
            event = await job.next()
            if event is not None and not isinstance(event, Progress):
                parts.append(reader.part(event))
        whole = Part(
            "".join(part.text for part in parts),
            parts[-1].finish,
            [call for part in parts for call in part.calls],
            None if asked.wanted_logprobs is None else [entry for part in parts for entry in part.logprobs or []],
        )
        return answer.whole(whole, usage_body(len(job.ids), len(parts), job.cached))

    async def _stream(self, job: Job, asked: ChatRequest | CompletionRequest, answer: ChatAnswer) -> AsyncIterator[str]:
        """Server-sent events, ended by [DONE] or by an error."""
        reader, count, finish = _PieceReader(self.tokenizer, asked), 0, None
        # OpenAI: with include_usage every chunk has the field, null until the last.
        extra = {"usage": None} if asked.include_usage else {}
        try:
            while finish is None:
                event = await job.next(self.keep_alive)
                if event is None:
                    yield ": waiting\n\n"
                elif isinstance(event, Progress):
                    read = {"prompt_tokens": len(job.ids), "cached_tokens": job.cached}
                    report = {"done": event.done, "total": event.total, **read}
                    yield sse(answer.notice(lcconvert_progress=report, **extra))
                else:
                    if count == 0 and (opening := answer.opening()) is not None:
                        yield sse({**opening, **extra})
                    count += 1
                    finish = event.finish
                    part = reader.part(event)
                    if part.text or part.calls or finish is not None or part.logprobs is not None:
                        yield sse({**answer.piece(part), **extra})
            if asked.include_usage:
                yield sse(answer.notice(usage=usage_body(len(job.ids), count, job.cached)))
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield sse(as_api_error(error).body)


class _PieceReader:
    """Makes of each piece of one answer what is sent for it."""

    def __init__(self, tokenizer: Tokenizer, asked: ChatRequest | CompletionRequest) -> None:
        tools = asked.offered_tools if isinstance(asked, ChatRequest) else []
        self._calls = ToolCallReader({tool.function.name for tool in tools}) if tools else None
        self._tokenizer, self._logprobs = tokenizer, asked.wanted_logprobs is not None

    def part(self, piece: Piece) -> Part:
        text, finish = piece.text, piece.finish
        calls: list[dict[str, Any]] = []
        if self._calls is not None:
            text, calls = self._calls.push(text, last=finish is not None)
        called = self._calls is not None and self._calls.found
        logprobs = None
        if self._logprobs:
            top = [TokenLogprob(self._text(token), logprob) for token, logprob in piece.top]
            logprobs = [TokenLogprob(self._text(piece.token), piece.logprob, top)]
        return Part(text, "tool_calls" if called and finish == "stop" else finish, calls, logprobs)

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)


def make_app(
    engine: Engine,
    *,
    model_name: str,
    api_key: str | None = None,
    keep_alive: float = KEEP_ALIVE,
    prefix_cache: int | None = None,
    sessions: Sessions | None = None,
    texts: Texts | None = None,
) -> Starlette:
    """The ASGI application of one loaded engine, which its worker thread owns from startup to shutdown.

    `app.state.worker` is that worker. `prefix_cache`: see `PrefixCache`; without `sessions` a request that names one is
    refused. `texts` encodes for this engine, by default in children that start at the first text; it is closed when the
    application ends. Raises UserError when the engine has no tokenizer.
    """
    api = _Api(engine, model_name, api_key, keep_alive, prefix_cache, sessions, texts)
    routes = [
        *page_routes(api.about()),
        Route("/health", api.health),
        Route("/metrics", api.show_metrics),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/sessions", api.sessions),
        Route("/v1/sessions/{name}", api.session, methods=["POST", "DELETE"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/openapi.json", api.openapi),
    ]
    known = (ApiError, UserError, Rejected, HTTPException, ClientDisconnect, Exception)
    count = Middleware(CountRequests, metrics=api.metrics, paths=frozenset(route.path for route in routes))
    app = Starlette(
        routes=routes,
        middleware=[count],
        exception_handlers=dict.fromkeys(known, respond_to_error),
        lifespan=api.lifespan,
    )
    app.state.worker = api.worker
    return app
