"""How files stand in a prompt: each after a line with its path, a sentence before them and one after.

One wording for `ask` and for the page of the server, which gets it from there.
"""

from __future__ import annotations

from collections.abc import Iterable

BEFORE = "These are the files of a folder, each after a line with its path.\n\n"
AFTER = "Answer from these files, and name the files that the answer is from by their paths.\n\nQuestion: "
_HEADER = "===== {path} =====\n"
_BROKEN = "\u200b"  # zero-width space
WORDING = {"before": BEFORE, "after": AFTER, "header": _HEADER, "broken": _BROKEN}  # for the page


def file_part(path: str, text: str, control_tokens: Iterable[str] = ()) -> str:
    """One file of a prompt. `control_tokens` of the model that stand in it are broken by a zero-width space, so that no
    file can end the message it is in."""
    part = _HEADER.format(path=path) + text.rstrip() + "\n\n"
    for token in control_tokens:
        part = part.replace(token, token[:1] + _BROKEN + token[1:])
    return part
