"""Uploads an artifact folder to the Hub, with a card written from what was measured.

All checks come before the first request, so a refused push has created nothing: every file is hashed again and must be
what the conversion wrote. Uploading is huggingface_hub's `upload_folder`: files already there are skipped, so an
interrupted push is resumed by running it again, which is also how a busy Hub is waited for. The access token is found
by huggingface_hub (environment or its login store), is no argument here and no part of any message.

Surprising rule: a stray file, here or on the Hub, is not let pass. Here it is an error: a forgotten optimizer state is
30 GB too much or something you did not mean to publish. There, what an earlier artifact left is removed in the same
commit: an engine that finds an old model.safetensors beside new shards loads the old one. *.gguf files stay.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from lcconvert.convert.card import EVAL_RESULTS, MARK, CardFacts, eval_results, model_card
from lcconvert.convert.hashing import artifact_hash, verify_files
from lcconvert.convert.license import declared_license
from lcconvert.convert.progress import say
from lcconvert.convert.results import REPORT, Report
from lcconvert.runtime.errors import Interrupted, UserError
from lcconvert.runtime.sidecar import NAME as SIDECAR
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import AUX_FILES
from lcconvert.runtime.units import format_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_ALLOWED = (
    {"config.json", "README.md", "genai_config.json", "model.onnx", "model.onnx.data", EVAL_RESULTS}
    | {"model.safetensors", "model.safetensors.index.json", "quantization.json", *AUX_FILES}
)  # fmt: skip
_ALLOWED_PATTERN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|[\w.-]+\.gguf")
_KEPT_PATTERN = re.compile(r"[\w.-]+\.gguf|README\.md|(LICENSE|NOTICE)(\.txt|\.md)?")  # on the Hub, though not here
_EVIDENCE_PATTERN = re.compile(r"(training|validation)/[\w.-]+\.(json|jsonl|html|png|csv)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
_BUSY = (408, 429, 500, 502, 503, 504)
_WAITS = (5.0, 20.0, 60.0)  # seconds before the upload is taken up again where it stopped
_LONGEST_WAIT = 300.0  # a Hub that asks for more is left to the user


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
    written: dict[str, str] = field(default_factory=dict)  # text by path: what is written into the folder before

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
    for name, text in plan.written.items():
        try:
            (src / name).parent.mkdir(exist_ok=True)
            (src / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{src}/{name} cannot be written ({error.strerror}); make the folder writable") from None
    return _upload(src, repo, config, [name for name, _ in plan.files])


def plan_push(src: Path, repo: str, config: PushConfig) -> PushPlan:
    """Checks everything that can be checked here. UserError for: no artifact, a file that is not part of one, an
    unknown licence, a validation that does not match, `create_pr` together with `revision`, a bad name. CheckFailed
    for: files that are not what the conversion wrote."""
    if not _HUB_ID.fullmatch(repo):
        raise UserError(f"repo is {repo!r}, expected owner/name as the Hub writes it")
    if config.base_model is not None and not _HUB_ID.fullmatch(config.base_model):
        raise UserError(f"base_model is {config.base_model!r}, expected owner/name as the Hub writes it")
    if config.create_pr and config.revision is not None:
        raise UserError("create_pr opens a pull request against main, so revision cannot be given with it; drop one")
    for needed in ("config.json", SIDECAR):
        if not (src / needed).is_file():
            raise UserError(f"{src} has no {needed}, so it is not an artifact; push the output folder of a conversion")
    files = dict(_contract_files(src))
    engine = _engine(src, files)
    model_config = _read_config(src)
    sidecar = Sidecar.parse((src / SIDECAR).read_bytes(), str(src))
    license = _license(src, model_config, sidecar, config.license)
    report = _matching_report(src, sidecar, verify_files(src))
    facts = CardFacts(
        repo=repo,
        license=license,
        base_model=config.base_model or _find_base(sidecar),
        config=model_config,
        sidecar=sidecar,
        report=report,
        pictures=[name for name in sorted(files) if name.endswith(".png")],
        engine=engine,
    )
    card: str | None = None
    readme = src / "README.md"
    if not readme.is_file() or MARK in readme.read_text(encoding="utf-8", errors="replace"):
        card = model_card(facts)
    results = eval_results(facts)
    written = {name: text for name, text in (("README.md", card), (EVAL_RESULTS, results)) if text is not None}
    files |= {name: len(text.encode()) for name, text in written.items()}
    if results is None:
        files.pop(EVAL_RESULTS, None)  # of an earlier push, when there was a report
    return PushPlan(repo, tuple(sorted(files.items())), card, written)


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
        allowed = _in_contract(name)
        if not allowed or path.is_symlink():
            reason = "a link" if allowed else "not part of an artifact"
            raise UserError(f"{src} holds {name}, which is {reason}; move it out of the folder before pushing")
        yield name, path.stat().st_size


def _in_contract(name: str) -> bool:
    return bool(name in _ALLOWED or _ALLOWED_PATTERN.fullmatch(name) or _EVIDENCE_PATTERN.fullmatch(name))


def _engine(src: Path, files: dict[str, int]) -> str:
    for suffix, engine in ((".safetensors", "safetensors"), (".onnx", "onnx"), (".gguf", "gguf")):
        if any(name.endswith(suffix) for name in files):
            return engine
    raise UserError(f"{src} holds no weights (*.safetensors, model.onnx or *.gguf); push a complete artifact")


def _matching_report(src: Path, sidecar: Sidecar, hashes: dict[str, str]) -> Report | None:
    """The validation report, if there is one; UserError when it was measured on other weights or claims other than
    lcconvert.json does. `hashes` are those of the artifact's files."""
    claimed = sidecar.context.validated
    if not (src / "validation" / REPORT).is_file():
        if claimed is not None:
            raise UserError(
                f"{src}/{SIDECAR} says that {claimed} tokens were validated, but there is no validation/{REPORT}; "
                "run `lcconvert validate` again"
            )
        return None
    report, found = Report.read(src / "validation"), artifact_hash(src, hashes)
    if report.artifact.sha256 != found:
        raise UserError(
            f"{src}/validation/{REPORT} was measured on weights {report.artifact.sha256[:12]}, but these are "
            f"{found[:12]}; run `lcconvert validate` again or remove the validation folder"
        )
    measured = report.claim.validated
    longest = max((row.length for needles in report.needles for row in needles.by_length), default=0)
    # a later run over short lengths only does not take back a longer claim, see write_claim
    kept = claimed is not None and measured == longest and claimed > longest
    if report.needles and claimed != measured and not kept:
        raise UserError(
            f"{src}/{SIDECAR} says that {claimed or 'no'} tokens were validated and validation/{REPORT} says "
            f"{measured or 'none'}; run `lcconvert validate` again"
        )
    return report


def _license(src: Path, model_config: dict[str, Any], sidecar: Sidecar, given: str | None) -> dict[str, str]:
    """The licence by the Hub's identifier: the one given, else what the source declared."""
    if given is not None:
        if not _LICENSE_ID.fullmatch(given.lower()):
            raise UserError(
                f"license is {given!r}, expected the Hub's identifier for it, such as apache-2.0 or llama3.1"
            )
        return {"license": given.lower()}
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(src.glob("LICENSE*")))
    if found := declared_license(sidecar.provenance, model_config, texts=texts):
        return found
    raise UserError(
        f"the licence of {src} is unknown: neither {SIDECAR} nor LICENSE tells it; look at the source's page and give "
        "--license, for example apache-2.0"
    )


def _find_base(sidecar: Sidecar) -> str | None:
    """The Hub id the artifact came from, if its provenance names one."""
    for key in ("base_model", "source"):
        named = sidecar.provenance.get(key)
        if isinstance(named, str) and _HUB_ID.fullmatch(named):
            return named
    return None


def _upload(src: Path, repo: str, config: PushConfig, names: list[str]) -> str:
    """Sends the files and returns the URL. While the Hub is busy, waits and goes on; gives up in one sentence."""
    from huggingface_hub import HfApi

    api = HfApi(
        endpoint=os.environ.get("HF_ENDPOINT"),
        token=True,  # from where the library finds it, and no request without one
        library_name="lcconvert",
        library_version=version("lcconvert"),
    )
    try:
        return _persistently(api, src, repo, config, names)
    except KeyboardInterrupt:
        raise Interrupted(
            f"push stopped; files already sent to {repo} stay there, run the same command again to go on"
        ) from None


def _persistently(api: HfApi, src: Path, repo: str, config: PushConfig, names: list[str]) -> str:
    from huggingface_hub.errors import HTTPError

    waits = iter(_WAITS)
    while True:
        try:
            return _send(api, src, repo, config, names)
        except ValueError as error:  # the library's word for metadata that the Hub refuses
            if "README.md" not in str(error):
                raise
            raise UserError(
                f"the Hub does not accept README.md ({' '.join(_masked(error).split())}); correct its metadata"
            ) from None
        except (RuntimeError, OSError, HTTPError) as error:
            # what fails while a file is being sent comes wrapped in a RuntimeError
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            wait = next(waits, None)
            if wait is None or (pause := _pause(cause, wait, config)) is None:
                raise _explained(cause, repo, api.endpoint) from None
        say(f"push: the Hub is busy; going on in {pause:.0f} s")
        time.sleep(pause)


def _pause(error: BaseException, wait: float, config: PushConfig) -> float | None:
    """Seconds to wait before going on: `wait`, or longer if the Hub says so. None: going on would not help."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in _BUSY:
        return None
    if config.create_pr and error.response.status_code != 429:
        return None  # the pull request may exist already, and going on would open another
    asked = error.response.headers.get("Retry-After", "")
    wait = max(wait, float(asked)) if asked.isdigit() else wait
    return wait if wait <= _LONGEST_WAIT else None


def _send(api: HfApi, src: Path, repo: str, config: PushConfig, names: list[str]) -> str:
    api.create_repo(repo, private=config.private, exist_ok=True)
    if config.revision not in (None, "main") and not str(config.revision).startswith("refs/"):
        api.create_branch(repo, branch=str(config.revision), exist_ok=True)
    there = api.model_info(repo, revision=config.revision)
    if config.private and there.private is False:
        raise UserError(f"{repo} exists and is public; make it private in its settings, or push without --private")
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=src,
        commit_message=config.message,
        revision=config.revision,
        create_pr=config.create_pr,
        # files of two artifacts must not mix, so the commit is refused when somebody else's came between
        parent_commit=None if config.create_pr else there.sha,
        allow_patterns=names,
        delete_patterns=_stale(there, names) or None,
    )
    if config.create_pr and commit.pr_url:
        return str(commit.pr_url)
    url = f"{api.endpoint}/{repo}"
    return url if config.revision is None else f"{url}/tree/{config.revision}"


def _stale(there: ModelInfo, names: list[str]) -> list[str]:
    """The files on the Hub that an artifact may contain and this one does not."""
    found = [sibling.rfilename for sibling in there.siblings or []]
    return [n for n in found if n not in names and _in_contract(n) and not _KEPT_PATTERN.fullmatch(n)]


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
        "command again, finished files are not sent twice"
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
        return f"the Hub failed ({status}); run the same command again, finished files are not sent twice"
    said = f", saying {_masked(server_message).splitlines()[0]!r}" if server_message else ""
    return f"the Hub refused the upload to {repo} ({status}){said}"


def _masked(message: object) -> str:
    """What the Hub said, without the token, should it repeat it."""
    from huggingface_hub import get_token

    token = get_token()
    return str(message).replace(token, "***") if token else str(message)
