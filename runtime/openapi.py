"""The OpenAPI document of the server, from the models that parse its requests.

Requests are described exactly, because the same classes check them; answers by the fields a client can rely on. What
each endpoint does is told once, here.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lcconvert.runtime.protocol import ChatRequest, CompletionRequest, Message, TokenizeRequest
from lcconvert.runtime.sessions import NAME

_REF = "#/components/schemas/"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "plan": {"type": "object", "description": "Memory that was needed and is free, in bytes."},
            },
        }
    },
}
# What the models check beyond single fields.
_ONE_OF: dict[type[BaseModel], list[dict[str, Any]]] = {
    TokenizeRequest: [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
    ],
    Message: [
        {
            "required": ["content"],
            "properties": {"content": {"type": ["string", "array"]}, "tool_calls": {"type": "null"}},
        },
        {
            "required": ["tool_calls"],
            "properties": {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}},
        },
    ],
}


def document(model_name: str) -> dict[str, Any]:
    """OpenAPI 3.1 of a server of this model."""
    _, found = models_json_schema(
        [(model, "validation") for model in (ChatRequest, CompletionRequest, TokenizeRequest)],
        ref_template=_REF + "{model}",
    )
    for schema in found["$defs"].values():
        if "model" in schema["properties"]:
            schema["properties"]["model"] = {"enum": [model_name, None]}
    for model, cases in _ONE_OF.items():
        found["$defs"][model.__name__]["anyOf"] = cases
    name = {"name": "name", "in": "path", "required": True}
    session = [{**name, "schema": {"type": "string", "pattern": f"^{NAME}$"}}]
    paths = {
        "/v1/chat/completions": {"post": _asks("Answer a conversation", ChatRequest, "choices", streams=True)},
        "/v1/completions": {"post": _asks("Continue a text", CompletionRequest, "choices", streams=True)},
        "/tokenize": {"post": _asks("The tokens of a prompt", TokenizeRequest, "count", "needed_bytes")},
        "/v1/models": {"get": _does("The served model, in a list", "data")},
        "/v1/models/{name}": {
            "get": _does("The served model", "id", "max_model_len", refusals=["404"]),
            "parameters": [{**name, "schema": {"type": "string", "minLength": 1}, "example": model_name}],
        },
        "/v1/sessions": {"get": _does("Saved contexts", "data", refusals=["400"])},
        "/v1/sessions/{name}": {
            "post": _does("Save a context now", "id", "tokens", refusals=["400", "404", "503"]),
            "delete": _does("Remove a saved context", "id", "deleted", refusals=["400", "404"]),
            "parameters": session,
        },
        "/health": {"get": {**_does("Whether requests are answered", "status", refusals=["503"]), "security": []}},
        "/metrics": {"get": {**_text("Counters in Prometheus' format"), "security": []}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "lcconvert", "version": _version(), "description": f"Serves {model_name}."},
        "paths": paths,
        "components": {
            "schemas": {**found["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _version() -> str:
    try:
        return version("lcconvert")
    except PackageNotFoundError:  # a bare checkout
        return "0"


def _does(summary: str, *fields: str, refusals: list[str] | None = None) -> dict[str, Any]:
    """An operation that answers with an object that has `fields`."""
    answer = {"type": "object", "required": list(fields)}
    error = {"description": "Refused", "content": {"application/json": {"schema": {"$ref": _REF + "Error"}}}}
    good = {"description": "Done", "content": {"application/json": {"schema": answer}}}
    return {"summary": summary, "responses": {"200": good, **dict.fromkeys(["401", *(refusals or [])], error)}}


def _asks(summary: str, request: type[BaseModel], *fields: str, streams: bool = False) -> dict[str, Any]:
    """An operation with a JSON request."""
    operation = _does(summary, *fields, refusals=["400", "404", "408", "413", "415", "503", "504"])
    if streams:
        operation["responses"]["200"]["content"]["text/event-stream"] = {}
    schema = {"$ref": _REF + request.__name__}
    return {**operation, "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _text(summary: str) -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}}
    return {"summary": summary, "responses": {"200": {"description": "Done", "content": content}}}
