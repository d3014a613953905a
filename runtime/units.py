"""Token counts and byte sizes as people write them: `1M`, `128k`, `80g`, `1048576`.

Token counts are binary (`1M` is 1,048,576, as context lengths are); byte sizes are binary too (`80g` is 80 GiB).
"""

from __future__ import annotations

import re

from lcconvert.runtime.errors import UserError

_FACTOR = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_count(text: str | int, what: str = "size") -> int:
    """Parses a positive token count or byte size; raises UserError naming `what` and the text otherwise."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if not match or (value := float(match[1]) * _FACTOR[match[2]]) != int(value) or value < 1:
        raise UserError(f"{what} is {text!r}, expected a positive size such as 8192, 128k or 1M")
    return int(value)


def parse_seconds(text: str | float) -> float:
    """Parses a duration such as `90s`, `20m`, `1.5h`, or seconds without a unit."""
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text.lower())
    if not match:
        raise UserError(f"time is {text!r}, expected a duration such as 90s, 20m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def format_count(n: int) -> str:
    """Shortest exact form: 1048576 -> `1M`, 131072 -> `128K`, 1000 -> `1000`."""
    for letter in "GMK":
        factor = _FACTOR[letter.lower()]
        if n >= factor and n % factor == 0:
            return f"{n // factor}{letter}"
    return str(n)


def format_bytes(n: float) -> str:
    """Decimal units, three figures: 98362432 -> `98.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if unit != "B" else f"{int(n)} B"
        n /= 1000
    return f"{n:.3g} TB"
