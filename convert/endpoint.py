"""An OpenAI-compatible server as the one who answers: the same questions for any engine that speaks HTTP.

`completions` sends token ids, so the server reads exactly what an in-process run reads, the beginning of the answer
included; a server that counts another number of prompt tokens has cut or added some, and that stops the run. `chat` is
for servers without that route: their own template applies, and the beginning of the answer ends the user's message.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lcconvert.convert.needles import Answer
from lcconvert.convert.scoring import Kind
from lcconvert.convert.tasks import Ask, TaskPrompt
from lcconvert.runtime.errors import UserError

Asker = Callable[[int, list[str], Kind, int], Answer]

KEY_VARIABLE = "LCCONVERT_API_KEY"
_SECONDS = 3600.0  # a prompt of a million tokens takes its time
_TRIES = 3
_CUT = 32  # prompt tokens a chat server may count less than we do before it must have truncated


class Endpoint:
    """`url` with or without /v1; `model` None: the first that the server lists. UserError when it does not answer."""

    def __init__(self, url: str, model: str | None, api: Literal["completions", "chat"]):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"endpoint is {url!r}, expected a URL such as http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.api = api
        # tokens by which a chat prompt stays shorter: its last line is not in our template
        self.margin = 16 if api == "chat" else 0
        self.model = model or self._listed()

    @contextmanager
    def reading(self, prompt: TaskPrompt) -> Iterator[Asker]:
        """Yields a function that asks question i of `prompt`."""

        def ask(i: int, references: list[str], kind: Kind, max_new_tokens: int) -> Answer:
            return self._ask(prompt, i, max_new_tokens)

        yield ask

    def _ask(self, prompt: TaskPrompt, i: int, max_new_tokens: int) -> Answer:
        body: dict[str, Any] = {"model": self.model, "max_tokens": max_new_tokens, "temperature": 0}
        ids = prompt.context + prompt.tails[i]
        if self.api == "completions":
            body["prompt"] = ids
        else:
            body["messages"] = [{"role": "user", "content": _message(prompt.stem, prompt.asks[i])}]
        started = time.perf_counter()
        try:
            reply = self._request("completions" if self.api == "completions" else "chat/completions", body)
        except _Refused as refused:
            return Answer("", 0, "stop", 0.0, str(refused))
        seconds = time.perf_counter() - started
        try:
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            text = choice["text"] if self.api == "completions" else choice["message"]["content"] or ""
            finish = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"{self.url} answered something other than a {self.api} object: {str(reply)[:200]}"
            ) from None
        self._check_count(len(ids), usage.get("prompt_tokens"))
        tokens = usage.get("completion_tokens") or 0
        return Answer(text, tokens, "length" if finish == "length" else "stop", seconds)

    def _check_count(self, sent: int, counted: int | None) -> None:
        if counted is None or counted == sent or (self.api == "chat" and counted > sent - _CUT):
            return
        raise UserError(
            f"{self.url} counted {counted} prompt tokens where {sent} were meant: it cuts or adds some, so its score "
            "would not be one of this length; serve the model that SRC names, with a context as long as the prompt"
        )

    def _listed(self) -> str:
        models = self._request("models", None).get("data") or []
        if not models:
            raise UserError(f"{self.url} lists no model; name one with --endpoint-model")
        return str(models[0]["id"])

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        for attempt in range(1, _TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                    return dict(json.load(reply))
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace").strip()
                if error.code in (400, 413, 422) and body is not None:
                    raise _Refused(f"HTTP {error.code}: {said[:300]}") from None
                reason = f"HTTP {error.code}: {said[:200]}"
                if error.code in (401, 403):
                    raise UserError(f"{self.url} refuses ({reason}); put its key in {KEY_VARIABLE}") from None
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, ValueError) as error:  # no connection, a broken one, or not JSON
                reason = str(getattr(error, "reason", error))
            if attempt < _TRIES:
                time.sleep(2.0**attempt)
        raise UserError(
            f"{self.url}/{path} does not answer ({reason}); see that it runs, then run the same command again: "
            "finished results are kept"
        )


class _Refused(Exception):
    """The server will not take this prompt, most often because it is too long for it."""


def _message(stem: str, ask: Ask) -> str:
    return f"{stem}{ask.question}\n\n{ask.prefix}"
