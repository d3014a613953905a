"""Serves an artifact for real, in a process of its own, asks one question over HTTP and records the answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcconvert.runtime.errors import CheckFailed

if TYPE_CHECKING:
    from lcconvert.convert.recipe import ServeCheck

ANSWER_SECONDS = 600


def serve_once(artifact: Path, out: Path, check: ServeCheck) -> None:
    """Writes `out`: question, answer, usage and seconds, as JSON. CheckFailed when the server does not answer."""
    command = [sys.executable, "-m", "lcconvert.convert", "serve", str(artifact), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            url = server.stdout.readline().strip().rpartition(" ")[2]
            if not url.startswith("http"):
                reason = (server.stderr.read().strip().splitlines() or ["no output"])[-1]
                raise CheckFailed(f"`lcconvert serve {artifact}` did not start ({reason}); run it to see more")
            started = time.monotonic()
            reply = _ask(url, check)
            seconds = time.monotonic() - started
        finally:
            server.send_signal(signal.SIGINT)
    record = {
        "question": check.question,
        "answer": reply["choices"][0]["message"]["content"],
        "finish_reason": reply["choices"][0]["finish_reason"],
        "usage": reply["usage"],
        "seconds": round(seconds, 2),
    }
    out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _ask(url: str, check: ServeCheck) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=ANSWER_SECONDS) as reply:
        model = json.load(reply)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": check.question}],
        "max_tokens": check.max_tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
        return json.load(reply)
