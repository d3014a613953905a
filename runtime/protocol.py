"""The OpenAI wire format: what a request may say, what an answer looks like, how an error reads.

Only what the engine does is accepted. A field that would change the answer and is not supported is refused with the
field's name, never ignored; the same field at the value that means "off" is fine, because client libraries send it.
Left out: tools, images, JSON mode, several choices per request, log-probabilities other than a chat answer's own.
Beyond OpenAI's fields there are `top_k`, `progress` (reports while a long prompt is read; streams only), `session`
(the name under which the context is saved and restored) and `timeout` (seconds after which the request is given up).
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from lcconvert.runtime.sampler import SamplingParams
from lcconvert.runtime.sessions import NAME as SESSION_NAME
from lcconvert.runtime.sessions import Saved, SessionError

# Tokens generated when a request sets no limit. OpenAI's own default for chat is "all the context allows", which here
# would reserve the whole cache for every greeting; the answer then ends with finish_reason "length".
DEFAULT_CHAT_TOKENS = 1024
DEFAULT_COMPLETION_TOKENS = 16

# Values that mean "off" for fields that are refused at any other value.
_OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "service_tier": ("auto", "default"),
    "store": (False,), "refusal": (), "annotations": ([],), "audio": (), "tool_calls": ([],),
    "reasoning_content": ("",),
}  # fmt: skip
# Fields that label a request and cannot change its answer.
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")

# Below these the sampler's float32 arithmetic has nothing left to draw from; the limit of both is the likeliest token.
_MIN_TEMPERATURE = 1e-4
_MIN_TOP_P = 1e-6


class ApiError(Exception):
    """An error a client sees, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        **more: Any,
    ) -> None:
        """`more`: fields of the error beyond OpenAI's."""
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}


# Requests


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]


def _text(value: Any) -> Any:
    """Message content is a string or a list of text parts."""
    if not isinstance(value, list):
        return value
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a content part is {kind!r}, expected {{'type': 'text', 'text': ...}}")
        parts.append(part["text"])
    return "\n".join(parts)


def _one_prompt(value: Any) -> Any:
    """`"text"`, `["text"]`, `[1, 2]` or `[[1, 2]]` -> text or token ids."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    elif isinstance(value, list) and any(isinstance(item, str | list) for item in value):
        raise ValueError(f"{len(value)} prompts in one request; send each prompt in its own request")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return value
    raise ValueError("expected a string or a list of token ids")


class _Strict(BaseModel):
    """Types are taken as sent ("1" is not a number), unknown fields are errors, fields that are off are dropped."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_off(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if key in cls.model_fields
            or not (key in _LABELS or (key in _OFF and (value is None or value in _OFF[key])))
        }


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """Templates know `system`; `developer` is OpenAI's newer name for the same role."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class _Generation(_Strict):
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[_Stops | None, BeforeValidator(_stop_list)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    progress: bool | None = None
    timeout: float | None = Field(None, gt=0, le=86_400)
    session: str | None = Field(None, pattern=f"^{SESSION_NAME}$")

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int) -> SamplingParams:
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        if temperature < _MIN_TEMPERATURE or top_p < _MIN_TOP_P:
            temperature, top_p = 0.0, 1.0
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            max_tokens=max_tokens,
            stop=tuple(self.stop or ()),
        )

    @model_validator(mode="after")
    def _stream_only(self) -> _Generation:
        for field in ("stream_options", "progress"):
            if getattr(self, field) and not self.stream:
                raise ValueError(f"{field} needs stream: true")
        return self


class ChatRequest(_Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Generation):
    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]


Request = TypeVar("Request", ChatRequest, CompletionRequest)


def parse_request(kind: type[Request], body: bytes) -> Request:
    """Raises a 400 `ApiError` that names the first bad field."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
        param = ".".join(str(part) for part in path) or None
        if first["type"] == "extra_forbidden":
            value = repr(first["input"])[:80]
            off = _OFF.get(str(path[-1]))
            hint = "leave it out" if off is None else "only the value that switches it off is accepted"
            raise ApiError(
                400, f"{param} is {value}, which this server does not support; {hint}", param=param,
                code="unsupported_parameter",
            ) from None  # fmt: skip
        message = first["msg"].removeprefix("Value error, ")
        message = message if param is None else f"{param}: {message}"
        if first["type"] not in ("missing", "value_error"):
            message += f" (got {repr(first['input'])[:80]})"
        raise ApiError(
            400, message, param=param, code=None if first["type"] == "missing" else "invalid_value"
        ) from None


# Answers


@dataclass(frozen=True)
class TokenLogprob:
    """The natural-log probability of one generated token; `text` as the tokenizer shows the token alone."""

    text: str
    logprob: float

    def body(self) -> dict[str, Any]:
        whole = "\ufffd" not in self.text  # a token can be part of a character; it then has no text of its own
        encoded = list(self.text.encode()) if whole else None
        return {"token": self.text, "logprob": self.logprob, "bytes": encoded, "top_logprobs": []}


def usage_body(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class ChatAnswer:
    """Bodies of one chat answer; `piece` and `whole` take text, finish reason and log-probabilities (or None)."""

    prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(
        self, text: str, finish: str, logprobs: list[TokenLogprob] | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {"object": self.name, **self._head, "choices": [self._choice(text, finish, logprobs)], "usage": usage}

    def opening(self) -> dict[str, Any] | None:
        """What a stream says before the first piece of text, if anything."""
        return self._chunk({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def piece(self, text: str, finish: str | None, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        return self._chunk(self._piece_choice(text, finish, logprobs))

    def notice(self, **fields: Any) -> dict[str, Any]:
        """A chunk without text: usage at the end, progress during prefill."""
        return {"object": self.chunk_name, **self._head, "choices": [], **fields}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {"object": self.chunk_name, **self._head, "choices": [choice]}

    def _choice(self, text: str, finish: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "finish_reason": finish, "logprobs": _chat_logprobs(logprobs)}

    def _piece_choice(self, text: str, finish: str | None, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        delta = {"content": text} if text or finish is None else {}
        return {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": _chat_logprobs(logprobs)}


class CompletionAnswer(ChatAnswer):
    """Bodies of one text completion."""

    prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def opening(self) -> None:
        return None

    def _choice(self, text: str, finish: str | None, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}

    _piece_choice = _choice


def _chat_logprobs(logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
    return None if logprobs is None else {"content": [entry.body() for entry in logprobs]}


def model_body(name: str, created: int, max_context: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "lcconvert", "max_model_len": max_context}


def session_body(name: str, saved: Saved | SessionError) -> dict[str, Any]:
    if isinstance(saved, SessionError):
        return {"id": name, "object": "session", "error": str(saved)}
    return {
        "id": name,
        "object": "session",
        "created": int(saved.saved_at),
        "tokens": saved.tokens,
        "bytes": saved.size,
    }
