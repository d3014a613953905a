"""Serves an artifact for real, in a process of its own, asks one question over HTTP and records the answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from lcconvert.runtime.errors import CheckFailed

if TYPE_CHECKING:
    from lcconvert.convert.recipe import ServeCheck

START_SECONDS = 300


def serve_once(artifact: Path, out: Path, check: ServeCheck) -> None:
    """Writes `out`: question, answer, usage and seconds, as JSON. CheckFailed when the server does not answer."""
    command = [sys.executable, "-m", "lcconvert.convert", "serve", str(artifact), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip().rpartition(" ")[2]
            if not url.startswith("http"):
                raise CheckFailed(f"`lcconvert serve {artifact}` did not start; run it to see why")
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


def _ask(url: str, check: ServeCheck) -> dict:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": check.question}],
        "max_tokens": check.max_tokens,
        "temperature": 0,
    }
    models = json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=START_SECONDS))
    body["model"] = models["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=START_SECONDS))
