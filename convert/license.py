"""What a checkpoint says about its licence: in its provenance, its config, its model card or a licence text beside it.

Nothing is guessed from the model's name, and "unknown" counts as not declared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import TensorSource

KEYS = ("license", "license_name", "license_link")  # the Hub's names; the last two go with license "other"
_TEXTS = {
    "Apache License\n Version 2.0": "apache-2.0",
    "MIT License": "mit",
    "META LLAMA 3 COMMUNITY LICENSE": "llama3",
    "LLAMA 3.1 COMMUNITY LICENSE": "llama3.1",
    "LLAMA 3.2 COMMUNITY LICENSE": "llama3.2",
    "Llama 3.3 COMMUNITY LICENSE": "llama3.3",
}
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)


def source_license(source: TensorSource) -> dict[str, str]:
    """The declared licence of a checkpoint as `KEYS`, {} when it declares none."""
    folder = Path(getattr(source, "path", ""))
    card = folder / "README.md" if folder.is_dir() else None
    return declared_license(
        Sidecar.read(source).provenance,
        source.config,
        _front_matter(card.read_text(encoding="utf-8", errors="replace")) if card and card.is_file() else {},
        texts=(
            content.decode(errors="replace") for name, content in source.files.items() if name.startswith("LICENSE")
        ),
    )


def declared_license(*declarations: Mapping[str, Any], texts: Iterator[str]) -> dict[str, str]:
    """The first licence that is declared, else the first text that is recognised."""
    for declared in declarations:
        named = declared.get("license")
        if isinstance(named, str) and named.strip() and named.lower() != "unknown":
            rest = {key: declared[key] for key in KEYS[1:] if isinstance(declared.get(key), str)}
            return {"license": named.strip().lower(), **rest}
    for text in texts:
        head = re.sub(r"[ \t]+", " ", text[:2000])
        for phrase, identifier in _TEXTS.items():
            if phrase in head:
                return {"license": identifier}
    return {}


def _front_matter(card: str) -> Mapping[str, Any]:
    """The metadata at the top of a model card; {} when there is none or it is not YAML."""
    found = _FRONT_MATTER.match(card)
    try:
        value = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        value = None
    return value if isinstance(value, dict) else {}
