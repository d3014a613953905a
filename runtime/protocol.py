"""The OpenAI wire format: what a request may say and how an error reads; `bodies.py` has the answers.

Only what the engine does is accepted. A field that would change the answer and is not supported is refused with the
field's name, never ignored; the same field at the value that means "off" is fine, because client libraries send it.
Left out: images, several choices per request, log-probabilities of the prompt, answers that must call a tool.
Beyond OpenAI's fields there are `top_k`, `progress` (reports while a long prompt is read; streams only), `session`
(the name under which the context is saved and restored) and `timeout` (seconds after which the request is given up).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from lcconvert.runtime.sampler import SamplingParams
from lcconvert.runtime.sessions import NAME as SESSION_NAME

# Tokens generated when a request sets no limit. OpenAI's own default for chat is "all the context allows", which here
# would reserve the whole cache for every greeting; the answer then ends with finish_reason "length".
DEFAULT_CHAT_TOKENS = 1024
DEFAULT_COMPLETION_TOKENS = 16

# Values that mean "off" for fields that are refused at any other value.
_OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logit_bias": ({},), "functions": ([],), "function_call": ("none", "auto"), "parallel_tool_calls": (True,),
    "modalities": (["text"],), "service_tier": ("auto", "default"), "store": (False,), "refusal": (),
    "annotations": ([],), "audio": (), "reasoning_content": ("",),
}  # fmt: skip
# Fields that label a request and cannot change its answer.
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")

_MOST_MESSAGES = 20_000
_MOST_LOGPROBS = 20

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


_Prompt = Annotated[
    str | list[int],
    BeforeValidator(_one_prompt, json_schema_input_type=str | list[Annotated[int, Field(ge=0)]] | list[str]),
]


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


class CalledFunction(_Strict):
    name: str
    arguments: str  # JSON

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments out themselves, so they get them as an object where they are one."""
        try:
            arguments = json.loads(self.arguments)
        except (ValueError, RecursionError):
            arguments = None
        return {"name": self.name, "arguments": arguments if isinstance(arguments, dict) else self.arguments}


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text, json_schema_input_type=str | list[TextPart] | None)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Templates know `system`; `developer` is OpenAI's newer name for the same role."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content or ""
        if self.tool_calls:
            calls = [{"id": c.id, "type": c.type, "function": c.function.for_template()} for c in self.tool_calls]
            message["tool_calls"] = calls
        labels = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in labels.items() if value is not None}

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"content is missing in a message of role {self.role}")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls in a message of role {self.role}; only an assistant calls tools")
        return self


class Function(_Strict):
    name: str = Field(pattern="^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": self.type, "function": {"parameters": {"type": "object", "properties": {}}, **function}}


class JsonSchema(_Strict):
    name: str = Field(max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and only to it")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The JSON schema that an answer must follow, if any."""
        if self.json_schema is not None:
            return self.json_schema.json_schema
        return {"type": "object"} if self.type == "json_object" else None


class _Generation(_Strict):
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[_Stops | None, BeforeValidator(_stop_list, json_schema_input_type=str | _Stops | None)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    progress: bool | None = None
    timeout: float | None = Field(None, gt=0, le=86_400)
    session: str | None = Field(None, pattern=f"^{SESSION_NAME}$")
    response_format: ResponseFormat | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives to tell beside each token's own log-probability; None: tell nothing."""
        raise NotImplementedError

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
            top_logprobs=self.wanted_logprobs or 0,
        )

    @model_validator(mode="after")
    def _stream_only(self) -> _Generation:
        for field in ("stream_options", "progress"):
            if getattr(self, field) and not self.stream:
                raise ValueError(f"{field} needs stream: true")
        return self


class ChatRequest(_Generation):
    messages: list[Message] = Field(min_length=1, max_length=_MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto"] | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    @model_validator(mode="after")
    def _go_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.offered_tools and self.response_format and self.response_format.schema_wanted is not None:
            raise ValueError("response_format asks for JSON while tools are offered; send one of the two")
        return self


class CompletionRequest(_Generation):
    prompt: _Prompt
    logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(_Strict):
    """A text or messages; which tokens they become as a prompt. `return_tokens` false: only how many."""

    model: str | None = None
    return_tokens: bool | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=_MOST_MESSAGES)
    tools: list[Tool] | None = Field(None, max_length=128)

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected prompt or messages, one of the two")
        return self


Request = TypeVar("Request", ChatRequest, CompletionRequest, TokenizeRequest)


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
