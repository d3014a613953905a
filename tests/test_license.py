"""The licence is what the source declares, wherever it does, and nothing when it does not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcconvert.convert.license import source_license
from lcconvert.runtime.sidecar import ContextClaim, Sidecar
from lcconvert.runtime.source import FolderSource

OTHER = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


def checkpoint(folder: Path, **files: str) -> FolderSource:
    folder.mkdir(exist_ok=True)
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    config = {"max_position_embeddings": 64} | json.loads(files.pop("config", "{}"))
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / {"card": "README.md", "text": "LICENSE.txt", "sidecar": "lcconvert.json"}[name]).write_text(text)
    return FolderSource(folder)


def sidecar(**provenance: str) -> str:
    return Sidecar(context=ContextClaim(configured=64), provenance=provenance).to_bytes().decode()


def card(metadata: str) -> str:
    return f"---\n{metadata}\n---\n# A model\n\n---\nlicense: wrong\n---\n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, {}),
        ({"config": '{"license": "Apache-2.0"}'}, {"license": "apache-2.0"}),
        ({"card": card("license: mit")}, {"license": "mit"}),
        ({"card": card("license: other\nlicense_name: mine\nlicense_link: LICENSE")}, OTHER),
        ({"card": card("license: unknown")}, {}),
        ({"card": card("tags: [a")}, {}),
        ({"card": card("license: [mit, apache-2.0]")}, {}),
        ({"card": "# No metadata\n\nlicense: mit\n"}, {}),
        ({"card": "---\r\nlicense: mit\r\n---\r\n"}, {"license": "mit"}),
        ({"text": APACHE}, {"license": "apache-2.0"}),
        ({"text": "All rights reserved."}, {}),
        ({"sidecar": sidecar(license="llama3.1"), "card": card("license: mit")}, {"license": "llama3.1"}),
        ({"card": card("license: mit"), "text": APACHE}, {"license": "mit"}),
    ],
)
def test_where_it_is_declared(tmp_path: Path, files: dict[str, str], found: dict[str, str]) -> None:
    assert source_license(checkpoint(tmp_path / "model", **files)) == found
