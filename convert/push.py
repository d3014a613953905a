"""Uploads an artifact folder to the Hub, with a card written from what was measured.

All checks come before the first request, so a refused push has created nothing. Uploading is huggingface_hub's
`upload_folder`: files already there are skipped, so an interrupted push is resumed by running it again. The access
token is found by huggingface_hub (environment or its login store), is no argument here and no part of any message.

Surprising rule: only what an artifact may contain is pushed, and a stray file is an error rather than skipped: a
forgotten optimizer state or pickled weight is either 30 GB too much or something you did not mean to publish.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from lcconvert.convert.card import MARK, CardFacts, model_card
from lcconvert.convert.hashing import artifact_hash
from lcconvert.convert.results import REPORT, Report
from lcconvert.runtime.errors import Interrupted, UserError
from lcconvert.runtime.sidecar import NAME as SIDECAR
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import AUX_FILES, TensorSource
from lcconvert.runtime.units import format_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ALLOWED = (
    {"config.json", "README.md", "NOTICE", "genai_config.json", "model.onnx", "model.onnx.data"}
    | {"model.safetensors", "model.safetensors.index.json", "quantization.json", *AUX_FILES}
)  # fmt: skip
_ALLOWED_PATTERN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|[\w.-]+\.gguf|(LICENSE|NOTICE)(\.txt|\.md)?")
_EVIDENCE_PATTERN = re.compile(r"(training|validation)/[\w.-]+\.(json|jsonl|html|png|csv)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE_TEXTS = {
    "Apache License\n Version 2.0": "apache-2.0",
    "MIT License": "mit",
    "META LLAMA 3 COMMUNITY LICENSE": "llama3",
    "LLAMA 3.1 COMMUNITY LICENSE": "llama3.1",
}


class PushConfig(BaseModel, frozen=True, extra="forbid"):
    """How to publish. `license` and `base_model` override what the artifact records about its source."""

    private: bool = False
    revision: str | None = None  # branch; None is main. Created when it does not exist
    create_pr: bool = False
    license: str | None = None  # the Hub's identifier, e.g. apache-2.0
    base_model: str | None = None  # a Hub id
    message: str = "Upload with lcconvert"
    dry_run: bool = False


@dataclass(frozen=True)
class PushPlan:
    """What would be uploaded: (path in the repo, bytes), sorted; and the card that goes with it."""

    repo: str
    files: tuple[tuple[str, int], ...]
    card: str | None  # None: the folder's README.md was edited by hand and is pushed as it is

    def listing(self) -> str:
        width = max(len(name) for name, _ in self.files)
        lines = [f"{name:<{width}}  {format_bytes(size)}" for name, size in self.files]
        total = format_bytes(sum(size for _, size in self.files))
        return "\n".join([*lines, f"{len(lines)} files, {total} would go to {self.repo}"])


def push(src: Path, repo: str, config: PushConfig) -> str:
    """Uploads folder `src` to the Hub model `repo` and returns its URL (of the pull request with `create_pr`).

    With `dry_run` nothing is written or sent and the listing of files and sizes is returned. Raises UserError, before
    any request, for whatever `plan_push` refuses; and for a Hub that refuses, limits, fails or cannot be reached.
    """
    plan = plan_push(src, repo, config)
    if config.dry_run:
        return plan.listing()
    if plan.card is not None:
        try:
            (src / "README.md").write_text(plan.card, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{src}/README.md cannot be written ({error.strerror}); make the folder writable") from None
    return _upload(src, repo, config, [name for name, _ in plan.files])


def plan_push(src: Path, repo: str, config: PushConfig) -> PushPlan:
    """Checks everything that can be checked here. UserError for: no artifact, a file that is not part of one, an
    unknown licence, a validation report of other weights, `create_pr` together with `revision`, a bad repo name."""
    if not _HUB_ID.fullmatch(repo):
        raise UserError(f"repo is {repo!r}, expected owner/name as the Hub writes it")
    if config.create_pr and config.revision is not None:
        raise UserError("create_pr opens a pull request against main, so revision cannot be given with it; drop one")
    for needed in ("config.json", SIDECAR):
        if not (src / needed).is_file():
            raise UserError(f"{src} has no {needed}, so it is not an artifact; push the output folder of a conversion")
    files = dict(_contract_files(src))
    model_config = _read_config(src)
    described = _Described(str(src), model_config, {SIDECAR: (src / SIDECAR).read_bytes()})
    sidecar = Sidecar.read(cast(TensorSource, described))
    report = _matching_report(src)
    facts = CardFacts(
        repo=repo,
        license=config.license or _find_license(src, model_config, sidecar),
        base_model=config.base_model or _find_base(sidecar),
        config=model_config,
        sidecar=sidecar,
        report=report,
        pictures=[name for name in sorted(files) if name.endswith(".png")],
        engine=_engine(src, files),
    )
    card: str | None = None
    readme = src / "README.md"
    if not readme.is_file() or MARK in readme.read_text(encoding="utf-8", errors="replace"):
        card = model_card(facts)
        files["README.md"] = len(card.encode())
    return PushPlan(repo, tuple(sorted(files.items())), card)


@dataclass(frozen=True)
class _Described:
    """What `Sidecar.read` looks at; an ONNX or GGUF artifact has no safetensors to open as a source."""

    name: str
    config: dict[str, Any]
    files: Mapping[str, bytes]


def _read_config(src: Path) -> dict[str, Any]:
    try:
        value = json.loads((src / "config.json").read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{src}/config.json is not a JSON object; push the output folder of a conversion")
    return value


def _contract_files(src: Path) -> Iterator[tuple[str, int]]:
    """Every file under `src` as (path in the repo, bytes); UserError names the first that is not an artifact's."""
    for path in sorted(src.rglob("*")):
        name = path.relative_to(src).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        allowed = name in _ALLOWED or _ALLOWED_PATTERN.fullmatch(name) or _EVIDENCE_PATTERN.fullmatch(name)
        if not allowed or path.is_symlink():
            reason = "a link" if allowed else "not part of an artifact"
            raise UserError(f"{src} holds {name}, which is {reason}; move it out of the folder before pushing")
        yield name, path.stat().st_size


def _engine(src: Path, files: dict[str, int]) -> str:
    for suffix, engine in ((".safetensors", "safetensors"), (".onnx", "onnx"), (".gguf", "gguf")):
        if any(name.endswith(suffix) for name in files):
            return engine
    raise UserError(f"{src} holds no weights (*.safetensors, model.onnx or *.gguf); push a complete artifact")


def _matching_report(src: Path) -> Report | None:
    """The validation report, if there is one; UserError when it was measured on other weights."""
    if not (src / "validation" / REPORT).is_file():
        return None
    report, found = Report.read(src / "validation"), artifact_hash(src)
    if report.artifact.sha256 != found:
        raise UserError(
            f"{src}/validation/{REPORT} was measured on weights {report.artifact.sha256[:12]}, but these are "
            f"{found[:12]}; run `lcconvert validate` again or remove the validation folder"
        )
    return report


def _find_license(src: Path, model_config: dict[str, Any], sidecar: Sidecar) -> str:
    """The licence the source declared, by the Hub's identifier; a recognised LICENSE text counts."""
    for declared in (sidecar.provenance.get("license"), model_config.get("license")):
        if isinstance(declared, str) and declared:
            return declared.lower()
    if (src / "LICENSE").is_file():
        head = re.sub(r"[ \t]+", " ", (src / "LICENSE").read_text(encoding="utf-8", errors="replace")[:2000])
        for text, identifier in _LICENSE_TEXTS.items():
            if text in head:
                return identifier
    raise UserError(
        f"the licence of {src} is unknown: neither {SIDECAR} nor LICENSE tells it; look at the source's page and give "
        "--license, for example apache-2.0"
    )


def _find_base(sidecar: Sidecar) -> str | None:
    """The Hub id the artifact came from, if its provenance names one; a local path is not a base model."""
    for key in ("base_model", "source"):
        named = sidecar.provenance.get(key)
        if isinstance(named, str) and _HUB_ID.fullmatch(named) and not Path(named).exists():
            return named
    return None


def _upload(src: Path, repo: str, config: PushConfig, names: list[str]) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="lcconvert")
    try:
        return _send(api, src, repo, config, names)
    except KeyboardInterrupt:
        raise Interrupted(
            f"push stopped; files already sent to {repo} stay there, run the same command again to go on"
        ) from None
    except RuntimeError as error:  # what fails while a file is being sent comes wrapped in one
        raise _explained(error.__cause__ or error, repo, api.endpoint) from None
    except (OSError, HTTPError) as error:
        raise _explained(error, repo, api.endpoint) from None


def _send(api: HfApi, src: Path, repo: str, config: PushConfig, names: list[str]) -> str:
    api.create_repo(repo, private=config.private, exist_ok=True)
    if config.revision not in (None, "main") and not str(config.revision).startswith("refs/"):
        api.create_branch(repo, branch=str(config.revision), exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=src,
        commit_message=config.message,
        revision=config.revision,
        create_pr=config.create_pr,
        allow_patterns=names,
    )
    if config.create_pr and commit.pr_url:
        return str(commit.pr_url)
    url = f"{api.endpoint}/{repo}"
    return url if config.revision is None else f"{url}/tree/{config.revision}"


def _explained(error: BaseException, repo: str, endpoint: str) -> UserError:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalTokenNotFoundError):
        return UserError(f"no Hub token was found; run `hf auth login` or set HF_TOKEN to push to {repo}")
    if isinstance(error, OfflineModeIsEnabled):
        return UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if isinstance(error, HfHubHTTPError):
        return UserError(_sentence(error.response.status_code, repo, error.server_message))
    return UserError(
        f"the upload to {endpoint}/{repo} broke off ({type(error).__name__}); check the network and run the same "
        "command again, what was sent is not sent twice"
    )


def _sentence(status: int, repo: str, server_message: str | None) -> str:
    if status == 401:
        return f"the Hub does not accept the token for {repo} (401); run `hf auth login` with a token that can write"
    if status == 403:
        return f"the token may not write to {repo} (403); use one with write access, or a name of your own"
    if status == 404:
        return f"the Hub knows no {repo} that this token can see (404); check the name and the token"
    if status in (409, 412):
        return f"{repo} was changed by somebody else during the upload ({status}); run the same command again"
    if status == 429:
        return "the Hub asks to slow down (429); wait some minutes and run the same command again"
    if status >= 500:
        return f"the Hub failed ({status}); run the same command again, what was sent is not sent twice"
    said = f", saying {server_message.splitlines()[0]!r}" if server_message else ""
    return f"the Hub refused the upload to {repo} ({status}){said}"
