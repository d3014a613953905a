"""What the server sends, in OpenAI's shapes: answers whole and in pieces, usage, models, sessions, token lists.

Apart from `protocol.py`, which says what may be asked. The classes hold what the bodies of one answer share: its id,
its time, its model. Nothing here knows the engine; texts and numbers come in, dicts go out.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from lcconvert.runtime.sessions import Saved, SessionError


@dataclass(frozen=True)
class TokenLogprob:
    """The natural-log probability of one token; `text` as the tokenizer shows the token alone. `top`: the likeliest
    tokens in its place."""

    text: str
    logprob: float
    top: list[TokenLogprob] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        return {**self._entry(), "top_logprobs": [other._entry() for other in self.top]}

    def _entry(self) -> dict[str, Any]:
        whole = "\ufffd" not in self.text  # a token can be part of a character; it then has no text of its own
        return {"token": self.text, "logprob": self.logprob, "bytes": list(self.text.encode()) if whole else None}


def usage_body(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


@dataclass(frozen=True)
class Part:
    """What is sent at once: text, calls of tools, why the answer ended, log-probabilities of tokens (None: not asked).

    The parts of a stream add up to the one part of a whole answer.
    """

    text: str
    finish: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


class ChatAnswer:
    """Bodies of one chat answer."""

    prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._calls = 0  # sent so far

    def whole(self, part: Part, usage: dict[str, Any]) -> dict[str, Any]:
        return {"object": self.name, **self._head, "choices": [self._choice(part)], "usage": usage}

    def opening(self) -> dict[str, Any] | None:
        """What a stream says before the first piece of text, if anything."""
        return self._chunk({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def piece(self, part: Part) -> dict[str, Any]:
        return self._chunk(self._piece_choice(part))

    def notice(self, **fields: Any) -> dict[str, Any]:
        """A chunk without text: usage at the end, progress during prefill."""
        return {"object": self.chunk_name, **self._head, "choices": [], **fields}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {"object": self.chunk_name, **self._head, "choices": [choice]}

    def _choice(self, part: Part) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": part.text}
        if part.calls:
            message |= {"content": part.text or None, "tool_calls": part.calls}
        return {"index": 0, "message": message, "finish_reason": part.finish, "logprobs": _chat_logprobs(part)}

    def _piece_choice(self, part: Part) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": part.text} if part.text or (part.finish is None and not part.calls) else {}
        if part.calls:
            delta["tool_calls"] = [{"index": self._calls + number, **call} for number, call in enumerate(part.calls)]
            self._calls += len(part.calls)
        return {"index": 0, "delta": delta, "finish_reason": part.finish, "logprobs": _chat_logprobs(part)}


class CompletionAnswer(ChatAnswer):
    """Bodies of one text completion."""

    prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._offset = 0  # characters whose log-probabilities were sent

    def opening(self) -> None:
        return None

    def _choice(self, part: Part) -> dict[str, Any]:
        return {"index": 0, "text": part.text, "finish_reason": part.finish, "logprobs": self._logprobs(part)}

    _piece_choice = _choice

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if part.logprobs is None:
            return None
        offsets = []
        for entry in part.logprobs:
            offsets.append(self._offset)
            self._offset += len(entry.text)
        # several tokens can have the same text; the likeliest, which comes first, stands for them
        tops = [{other.text: other.logprob for other in reversed(entry.top)} for entry in part.logprobs]
        return {
            "tokens": [entry.text for entry in part.logprobs],
            "token_logprobs": [entry.logprob for entry in part.logprobs],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }


def _chat_logprobs(part: Part) -> dict[str, Any] | None:
    return None if part.logprobs is None else {"content": [entry.body() for entry in part.logprobs]}


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
