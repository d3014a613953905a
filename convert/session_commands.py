"""What `lcconvert session` prints and asks a running server; the files themselves are `runtime/sessions.py`'s."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.sessions import SessionError, drop_session, file_of, list_sessions
from lcconvert.runtime.units import format_bytes

_SECONDS = 600


def render_sessions(folder: Path | None) -> str:
    """A line a session: name, tokens, bytes, when it was saved, or what is wrong with it."""
    folder, lines = _given(folder), []
    for name, saved in list_sessions(folder):
        if isinstance(saved, SessionError):
            lines.append(f"{name}: {saved}")
        else:
            when = datetime.fromtimestamp(saved.saved_at).isoformat(" ", "minutes")
            lines.append(f"{name}: {saved.tokens} tokens, {format_bytes(saved.size)}, saved {when}")
    return "\n".join(lines) or f"{folder} holds no sessions"


def drop(name: str | None, folder: Path | None) -> None:
    """Removes a saved session; UserError when there is none of that name."""
    if not drop_session(_given(folder), name or ""):
        raise UserError(f"{folder} has no session {name}; `lcconvert session list` names them")


def save(name: str | None, url: str, api_key: str | None) -> int:
    """Makes the server at `url` save what it keeps of a session; returns the tokens saved."""
    file_of(Path(), name or "")  # checks the name, before it becomes part of a URL
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url is {url!r}, expected http://HOST:PORT; give the address the server printed")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/sessions/{name}", headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
            return int(json.load(reply)["tokens"])
    except urllib.error.HTTPError as error:
        with error:
            said = error.read().decode("utf-8", "replace")
        try:
            reason = json.loads(said)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = f"HTTP status {error.code}"
        raise UserError(f"{url} does not save session {name}: {reason}") from None
    except OSError as error:
        raise UserError(f"{url} cannot be reached ({error}); give the --url that `lcconvert serve` printed") from None


def _given(folder: Path | None) -> Path:
    if folder is None:
        raise UserError("the session folder is missing; give the --session-dir of the server")
    return folder
