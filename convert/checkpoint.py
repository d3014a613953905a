"""Opens whatever the user names as a checkpoint: an HF folder, a GGUF file, a Hub id, or the GGUF in a Python package.

A Hub id may end in @REVISION (a branch, tag or commit); the source's name says which commit that was.
Nothing is converted here and no weight is read: the result is a `TensorSource` that yields tensors one at a time, plain
ones in place of packed weights of other tools that the runtime has no kernel for.
From the Hub only safetensors, JSON and tokenizer files are fetched; pickled weights are never downloaded or opened.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from lcconvert.convert.gguf_source import GgufSource
from lcconvert.convert.import_quantized import decoded
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import QuantLayout
from lcconvert.runtime.source import FolderSource, TensorSource

_PACKAGE = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")  # of a model split over several files
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_HUB_PATTERNS = [
    *("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.json"),
    *("README.md", "LICENSE*", "NOTICE*"),  # the card names the licence
]
_FORMS = "give an HF checkpoint folder, a .gguf file, package:NAME or a Hub id such as owner/model or owner/model@v1"


def open_checkpoint(src: str | Path) -> TensorSource:
    """Opens `src`; UserError says what is wrong in one sentence."""
    text = str(src)
    if text.startswith(_PACKAGE):
        return GgufSource(_packaged_gguf(text.removeprefix(_PACKAGE)))
    path = Path(src).expanduser()
    if path.is_file():
        return _open_file(path)
    if path.is_dir():
        return _open_folder(path)
    if is_hub_id(text):
        folder = hub_folder(text)
        source = FolderSource(folder)
        source.name = f"{text.partition('@')[0]}@{folder.name}"  # the cache names the folder by its commit
        return _runnable(source)
    raise UserError(f"{text} does not exist; {_FORMS}")


def is_hub_id(text: str) -> bool:
    """Whether `text`, which is no local path, can be owner/model or owner/model@revision."""
    repo, at, revision = text.partition("@")
    named = _HUB_ID.fullmatch(repo) and Path(repo).suffix not in {".gguf", ".safetensors"} | _PICKLED
    return bool(named) and bool(revision or not at)


def hub_folder(name: str, *, whole: bool = False) -> Path:
    """The cached snapshot of a Hub id, fetched where it is not there yet: what a checkpoint needs, or all its files."""
    repo, _, revision = name.partition("@")
    return _download(repo, revision or None, None if whole else _HUB_PATTERNS)


def _open_folder(path: Path) -> TensorSource:
    if not (path / "config.json").is_file() and (packed := sorted(path.glob("*.gguf"))):
        packed = [file for file in packed if not _LATER_PART.search(file.name)] or packed
        if len(packed) != 1:
            names = ", ".join(file.name for file in packed)
            raise UserError(f"{path} holds {len(packed)} GGUF files ({names}); give the path of one of them")
        return GgufSource(packed[0])
    return _runnable(FolderSource(path))


def _runnable(source: FolderSource) -> TensorSource:
    """`source`, decoded if it is quantized as the runtime's kernels do not take it."""
    try:
        QuantLayout.from_config(source.config)
    except UserError:
        return decoded(source)
    return source


def _open_file(path: Path) -> TensorSource:
    if path.suffix == ".gguf":
        return GgufSource(path)
    if path.suffix in _PICKLED:
        raise UserError(
            f"{path} is a pickled checkpoint, which can run code when opened and is never read; "
            "save the model as safetensors first"
        )
    raise UserError(f"{path} is a single file that is not GGUF; {_FORMS}")


def _packaged_gguf(name: str) -> Path:
    """The one .gguf file of an installed distribution."""
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        raise UserError(f"package {name} is not installed; run `pip install {name}`") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UserError(f"package {name} holds {len(found)} .gguf files, expected exactly one; give the file's path")
    if not found[0].is_file():
        raise UserError(f"{found[0]} is missing though package {name} lists it; reinstall the package")
    return found[0]


def _download(repo: str, revision: str | None, patterns: list[str] | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(f"Hub model {repo} is gated; accept its terms on its page and run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repo} is neither a local path nor a Hub model you can read; check it or run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"Hub model {repo} has no revision {revision}; give a branch, tag or commit of it") from None
    except Exception as error:  # errors of the HTTP library below it pass through, and that library changes
        cause = error.__cause__
        if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, HfHubHTTPError):
            error = cause  # the Hub answered, with an error of its own
        elif isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            raise UserError(
                f"{repo} is not a local path and the Hub cannot be reached; check the path, or go online and repeat"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{repo} could not be fetched ({reason}); repeat, finished files are kept") from error
