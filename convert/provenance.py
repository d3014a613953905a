"""Where an artifact came from and what made it, recorded so that the same conversion records the same bytes anywhere.

So a local source is its folder's name, not its path (which would also tell strangers about your disk); what identifies
it is the hash of its tensors or files. Clocks and host names are left out; thread count and device stay, because sums
depend on them.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lcconvert.convert.license import source_license
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import TensorSource


def origin(src: str, source: TensorSource) -> dict[str, Any]:
    """source, revision (the commit of a Hub id) and licence; what an earlier conversion recorded comes first."""
    recorded = Sidecar.read(source).provenance
    if "source" not in recorded:
        recorded = {**named_source(src, source), **recorded}
    return {**recorded, **source_license(source)}


def named_source(src: str, source: TensorSource) -> dict[str, str]:
    """What `src` was, opened as `source`: a name, and for a Hub id the commit it stood for."""
    if Path(src).expanduser().exists():
        return {"source": public_name(src)}
    repo, _, commit = source.name.partition("@")
    return {"source": repo, "revision": commit} if commit and src.partition("@")[0] == repo else {"source": src}


def public_name(subject: str) -> str:
    """The last part of a local path; a Hub id, package:NAME or module:NAME as it is."""
    path = Path(subject).expanduser()
    return path.resolve().name if path.exists() else subject


def made_with(device: torch.device | str | None, *packages: str) -> dict[str, Any]:
    """Versions of lcconvert, torch and `packages`, and the machine's part in the result."""
    device = torch.device(device or "cpu")
    machine: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    if device.type == "cpu":
        machine["threads"] = torch.get_num_threads()
    return {"versions": {name: version(name) for name in ("lcconvert", "torch", *packages)}, "machine": machine}
