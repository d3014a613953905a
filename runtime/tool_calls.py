"""Calls of tools, found in what a model wrote, while it is being written.

Models are trained to write a call as JSON, {"name": ..., "arguments": {...}}, in one of two ways: between <tool_call>
tags, once or several times, with text around (Qwen, Hermes, SmolLM), or as the whole answer, alone or in a list
("parameters" for "arguments" in Llama; Mistral's and Llama's marks before it are control tokens, which have no text).
Other notations stay text. The surprising rule: what only looks like a call, because its JSON is broken or names no
offered tool, is given out as the text it is; nothing the model wrote is lost.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class ToolCallReader:
    """Takes the text of one answer piece by piece; gives back the text that is no call, and the calls."""

    def __init__(self, tools: Collection[str]) -> None:
        """`tools`: the names that may be called."""
        self._tools = tools
        self._held = ""
        self._begun = False  # whether text was seen that an answer made of calls alone would not have
        self.found = False

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """The text that is certainly no call, and the calls that are complete; all of both when this is the last."""
        self._held += text
        if not self._begun:
            start = self._held.lstrip()[:1]
            if start in ("", "{", "[") and not last:
                return "", []
            if start in ("{", "["):
                calls = self._calls(self._held)
                self.found = bool(calls)
                return ("" if calls else self._held), calls
            self._begun = True
        out, calls = "", []
        while (at := self._held.find(_OPEN)) >= 0:
            end = self._held.find(_CLOSE, at)
            if end < 0 and not last:
                return self._after_call(out + self._give(at)), calls
            inside = self._held[at + len(_OPEN) : end if end >= 0 else None]
            stop = end + len(_CLOSE) if end >= 0 else len(self._held)
            if some := self._calls(inside):
                out += self._give(at)
                self._give(stop - at)
                calls += some
                self.found = True
            else:
                out += self._give(stop)
        keep = 0 if last else _beginning(self._held)
        return self._after_call(out + self._give(len(self._held) - keep)), calls

    def _give(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text

    def _after_call(self, text: str) -> str:
        """Line breaks between calls are part of the notation."""
        return "" if self.found and not text.strip() else text

    def _calls(self, text: str) -> list[dict[str, Any]]:
        """OpenAI's form of what `text` calls, empty unless all of it is calls of offered tools."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = []
        for call in found if isinstance(found, list) else [found]:
            if not isinstance(call, dict) or call.get("name") not in self._tools:
                return []
            arguments = call.get("arguments", call.get("parameters", {}))
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            function = {"name": call["name"], "arguments": arguments}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return calls


def _beginning(text: str) -> int:
    """How much of the end of `text` may be the beginning of an opening tag."""
    return next((size for size in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:size])), 0)
