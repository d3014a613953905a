"""`lcconvert validate`: the evidence that an artifact works at the lengths it claims, in a form that can be checked.

Measures needles, tasks, perplexity, agreement with a reference, and cost; or tasks alone, answered by a server. Every
finished measurement is on disk before the next one starts, and a rerun goes on where the last one stopped. Left out
on purpose: judge models (scores are string comparisons), downloads (texts are local) and truncation (a prompt that does
not fit is an error).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lcconvert.convert.agreement import Reference, compare, read_reference
from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.claim import checks, context_claim, write_claim
from lcconvert.convert.code_questions import SourceTree
from lcconvert.convert.curves import own_curves
from lcconvert.convert.endpoint import Endpoint
from lcconvert.convert.hashing import WEIGHT_PATTERNS, artifact_hash, file_hash
from lcconvert.convert.haystack import Haystack, SentenceBank
from lcconvert.convert.needles import NeedlePlan, contexts, prompt_of, run_needles, tally
from lcconvert.convert.perplexity import key_window, run_perplexity, windows
from lcconvert.convert.progress import progress
from lcconvert.convert.provenance import public_name
from lcconvert.convert.qa import QaFile
from lcconvert.convert.report import PAGE_FILES, write_report
from lcconvert.convert.results import Agreement, Artifact, Check, Cost, Needles, Report, Setup, Text
from lcconvert.convert.samples import LOG, SampleLog, sample_key
from lcconvert.convert.task_runs import InProcess, TaskPlan, run_tasks, tally_tasks
from lcconvert.convert.tasks import Counter
from lcconvert.convert.validate_config import ValidateConfig
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError
from lcconvert.runtime.plan import kv_bytes_per_token
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.tokenizer import Tokenizer


def validate(src: str, out: Path | None, config: ValidateConfig) -> dict[str, Any]:
    """Measures `src`; writes samples.jsonl, report.json, report.html and pictures to `out` (default: `src`/validation).

    Returns the report as a dict of the schema results.Report. The lcconvert.json of an artifact folder gets the
    validated length. Raises UserError before anything is written, and CheckFailed for a missed threshold after the
    report is written.
    """
    started = time.perf_counter()
    if config.attention is not None and out is None:
        raise UserError(
            f"attention is {config.attention!r}, not the artifact's own policy; give -o, so that the report in the "
            "artifact stays one of the artifact"
        )
    subject = _Subject.open(src, config)
    reference = None if config.against is None else _open_reference(config.against, subject, config)
    haystack = Haystack.load(config.haystack)
    if config.endpoint is not None and out is None:
        raise UserError("the answers of an endpoint are not those of the artifact's folder; give -o FOLDER")
    text = haystack if config.perplexity_text == config.haystack else Haystack.load(config.perplexity_text)
    folder = Path(src) if Path(src).is_dir() else None
    out = _output_folder(src, folder, out)
    plan = NeedlePlan(
        config.lengths, config.depths, config.samples, config.protocol, config.max_new_tokens, config.seed,
        config.wordings,
    )  # fmt: skip
    bank = SentenceBank(haystack, subject.tokenizer)
    planned = contexts(plan, subject.tokenizer) if config.asks_needles else []
    for context in planned:  # these raise UserError for a text or a length that is too short
        if context.length == config.lengths[0] and context.sample == 0:
            prompt_of(context, plan, subject.tokenizer, bank)
    if tokens := max(config.perplexity_context or 0, config.agreement_tokens if reference else 0):
        text.excerpt(subject.tokenizer, tokens, "the measurement")
    base = subject.key_parts(haystack)
    if config.endpoint is not None:
        return _validate_endpoint(subject, haystack, config, base, out, started)
    counter, questions = Counter(subject.tokenizer), _questions(config, haystack)
    questions.check(counter, 0)
    beside = [own_curves(Report.read(path)) for path in config.beside]
    steps = 0
    if config.perplexity_context:
        steps = len(windows(config.perplexity_context))
        steps += key_window(config.perplexity_context, subject.native_context) is not None
    steps += sum(len(context.puzzle.questions) for context in planned) + (3 if reference else 0)
    steps += len(list(questions.cases()))
    deadline = started + config.max_time if config.max_time else None

    with _open_log(out) as log, progress("validate", steps, "results") as bar:
        compared = _Comparison(subject, reference, text, config, base, log, bar.advance) if reference else None
        if compared:
            compared.read_reference()  # before the subject is loaded: one model in memory at a time
        engine = Engine.load(
            subject.source, device=subject.device, dtype=subject.dtype, attention=subject.sidecar.attention,
            max_context=subject.longest,
        )  # fmt: skip
        agreement = compared.finish(engine) if compared else None
        perplexity = None
        if config.perplexity_context:
            perplexity = run_perplexity(
                engine, text, config.perplexity_context, config.perplexity_targets, subject.native_context, base, log,
                bar.advance,
            )  # fmt: skip
        needles, cost, tasks = list[Needles](), list[Cost](), None
        if planned:
            oom = run_needles(engine, bank, plan, planned, base, log, bar.advance, deadline)
            read = text.sha256 if config.perplexity_context else None
            needles, cost = tally(plan, planned, engine.tokenizer, base, log, oom, read)
        if config.asks_tasks:
            oom = run_tasks(InProcess(engine), counter, questions, base, log, bar.advance, deadline)
            tasks = tally_tasks(questions, counter, base, log, oom)

    claim = context_claim(needles, perplexity, config.thresholds)
    report = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
        artifact=subject.artifact(),
        setup=_setup(engine),
        config=_published(config),
        haystack=Text(name=haystack.name, sha256=haystack.sha256, characters=len(haystack.text)),
        needles=needles,
        tasks=tasks,
        perplexity=perplexity,
        agreement=agreement,
        cost=cost,
        kv_bytes_per_token=kv_bytes_per_token(subject.spec, engine.kv.scheme),
        claim=claim,
        checks=checks(config.thresholds, claim, needles, agreement),
        beside=beside,
    )
    if folder is not None and config.attention is None:
        write_claim(folder, claim, list(config.lengths) if config.asks_needles else [])
    return _finish(report, out)


def _questions(config: ValidateConfig, haystack: Haystack) -> TaskPlan:
    """The tasks to ask; none when the settings name none."""
    source = SourceTree.load(config.source_tree) if config.source_tree is not None else None
    asked = QaFile.load(config.qa_file) if config.qa_file is not None else None
    return TaskPlan(
        config.tasks, config.lengths, config.task_samples, config.seed, haystack.sentences, source, asked,
        config.prompt_cache, config.thresholds,
    )  # fmt: skip


def _validate_endpoint(
    subject: _Subject, haystack: Haystack, config: ValidateConfig, base: dict[str, Any], out: Path, started: float
) -> dict[str, Any]:
    """The tasks, answered by a server; `subject` gives tokenizer and template and is not loaded."""
    assert config.endpoint is not None
    counter, questions = Counter(subject.tokenizer), _questions(config, haystack)
    target = Endpoint(config.endpoint, config.endpoint_model, config.endpoint_api)
    questions.check(counter, target.margin)
    claim, beside = (
        context_claim([], None, config.thresholds),
        [own_curves(Report.read(path)) for path in config.beside],
    )
    # how the server computes is not known here
    shared = {name: base[name] for name in ("artifact", "haystack", "lcconvert")}
    base = {**shared, "endpoint": target.model, "api": target.api}
    deadline = started + config.max_time if config.max_time else None
    with _open_log(out) as log, progress("validate", len(list(questions.cases())), "results") as bar:
        oom = run_tasks(target, counter, questions, base, log, bar.advance, deadline)
        tasks = tally_tasks(questions, counter, base, log, oom)
    report = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
        artifact=subject.artifact(),
        setup=Setup(
            device="a server", dtype="unknown", threads=None, kv_scheme="unknown", attention="unknown",
            endpoint=target.model, versions=_versions(),
        ),
        config=_published(config),
        haystack=Text(name=haystack.name, sha256=haystack.sha256, characters=len(haystack.text)),
        tasks=tasks,
        perplexity=None,
        agreement=None,
        cost=[],
        kv_bytes_per_token=kv_bytes_per_token(subject.spec, subject.sidecar.kv.scheme),
        claim=claim,
        checks=checks(config.thresholds, claim, [], None),
        beside=beside,
    )  # fmt: skip
    return _finish(report, out)


def _finish(report: Report, out: Path) -> dict[str, Any]:
    """Writes the report and returns it; CheckFailed when it misses a threshold."""
    out.mkdir(parents=True, exist_ok=True)  # gone when nothing was measured in the time given
    write_report(report, out)
    if failed := [check for check in report.checks if not check.passed]:
        raise CheckFailed(f"{'; '.join(_missed(check) for check in failed)}; the report is in {out}")
    return report.model_dump(mode="json")


@dataclass(frozen=True)
class _Subject:
    """The checkpoint under test and how it will be run."""

    source: TensorSource
    spec: ModelSpec
    tokenizer: Tokenizer
    sidecar: Sidecar
    sha256: str
    weight_bytes: int
    device: torch.device
    dtype: torch.dtype
    longest: int  # tokens the engine must hold

    @classmethod
    def open(cls, src: str, config: ValidateConfig) -> _Subject:
        source = open_checkpoint(src)
        sidecar = _with_policy(Sidecar.read(source), config.attention)
        needed = [*config.lengths, config.perplexity_context or 1, config.agreement_tokens if config.against else 1]
        if max(needed) > sidecar.context.configured:
            raise UserError(
                f"{src} is configured for {sidecar.context.configured} tokens but {max(needed)} are to be validated; "
                "ask for shorter lengths or extend it first"
            )
        sha256, weight_bytes = identity(source)
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        spec = ModelSpec.from_config(source.config)
        tokenizer = Tokenizer.from_files(source.files)
        return cls(source, spec, tokenizer, sidecar, sha256, weight_bytes, device, dtype, max(needed))

    def key_parts(self, haystack: Haystack) -> dict[str, Any]:
        """What every measurement depends on: weights, cache scheme, attention policy, arithmetic, haystack, code."""
        return {
            "artifact": self.sha256,
            "kv": self.sidecar.kv.model_dump(),
            "attention": self.sidecar.attention.model_dump(),
            "dtype": str(self.dtype),
            "device": self.device.type,
            "haystack": haystack.sha256,
            "lcconvert": _version("lcconvert"),
        }

    @property
    def native_context(self) -> int:
        """The window before any extension, in tokens: by the provenance or the RoPE fields, else the configured one."""
        recorded = self.sidecar.provenance.get("native_context")
        return int(recorded or self.spec.rope.original_max_position or self.spec.max_position)

    def artifact(self) -> Artifact:
        return Artifact(
            name=public_name(self.source.name),
            sha256=self.sha256,
            bytes=self.weight_bytes,
            variant=self.sidecar.variant,
            family=self.spec.family,
            parameters=self.spec.parameters(),
            native_context=self.native_context,
            configured_context=self.sidecar.context.configured,
        )


class _Comparison:
    """The agreement with a reference, in two parts with the loading of the subject between them."""

    def __init__(
        self,
        subject: _Subject,
        reference: TensorSource,
        text: Haystack,
        config: ValidateConfig,
        base: dict[str, Any],
        log: SampleLog,
        advance: Callable[[], None],
    ):
        self.subject, self.source, self.text, self.config = subject, reference, text, config
        self.log, self.advance = log, advance
        self.sha256 = identity(reference)[0]
        self.policy = _with_policy(Sidecar.read(reference), config.against_attention).attention
        self.key = sample_key(
            **base, kind="agreement", reference=self.sha256, reference_attention=self.policy.model_dump(),
            text=text.sha256, tokens=config.agreement_tokens, decode_tokens=config.decode_tokens,
        )  # fmt: skip
        self.read: Reference | None = None

    def read_reference(self) -> None:
        if self.log.get(self.key) is None:
            tokens = self.config.agreement_tokens
            engine = Engine.load(
                self.source, device=self.subject.device, dtype=self.subject.dtype, attention=self.policy,
                max_context=tokens,
            )  # fmt: skip
            self.read = read_reference(engine, self.text.excerpt(engine.tokenizer, tokens, "agreement"))
        self.advance()

    def finish(self, engine: Engine) -> Agreement:
        row = self.log.get(self.key)
        if row is None:
            assert self.read is not None  # read_reference ran first
            ids = self.text.excerpt(engine.tokenizer, self.config.agreement_tokens, "agreement")
            if ids != self.read.ids:
                raise UserError(
                    f"the reference {self.source.name} splits text into other tokens than {engine.name}; compare "
                    "checkpoints that share a tokenizer"
                )
            row = self.log.add(self.key, {"kind": "agreement", **compare(engine, self.read, self.config.decode_tokens)})
            self.read = None
        self.advance()
        self.advance()
        fields = {name: row[name] for name in ("tokens", "prefill", "by_position", "decode", "ppl_increase")}
        return Agreement(reference=public_name(self.source.name), reference_sha256=self.sha256, **fields)


def _with_policy(sidecar: Sidecar, name: str | None) -> Sidecar:
    return sidecar if name is None else sidecar.model_copy(update={"attention": sidecar.attention.named(name)})


def _open_reference(src: str, subject: _Subject, config: ValidateConfig) -> TensorSource:
    reference = open_checkpoint(src)
    vocabulary = ModelSpec.from_config(reference.config).vocab_size
    if vocabulary != subject.spec.vocab_size:
        raise UserError(
            f"the reference {src} has a vocabulary of {vocabulary} but {subject.source.name} one of "
            f"{subject.spec.vocab_size}; compare checkpoints of one family"
        )
    if config.agreement_tokens > (limit := Sidecar.read(reference).context.configured):
        raise UserError(
            f"agreement_tokens is {config.agreement_tokens} but the reference {src} is configured for {limit}; "
            "compare on fewer tokens"
        )
    return reference


def _output_folder(src: str, folder: Path | None, out: Path | None) -> Path:
    """Where the report goes; UserError when it holds anything that is not ours."""
    if out is None:
        if folder is None:
            raise UserError(f"{src} is not a folder, so the report needs a place; give -o FOLDER")
        out = folder / "validation"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, expected a folder for the report; give another -o")
    ours = {LOG, *PAGE_FILES}
    if out.is_dir() and (foreign := sorted(p.name for p in out.iterdir() if p.name.removesuffix(".part") not in ours)):
        raise UserError(f"{out} holds {foreign[0]}, which is not part of a report; give an empty or new folder with -o")
    return out


@contextmanager
def _open_log(out: Path) -> Iterator[SampleLog]:
    """The log in `out`, made when absent. Ctrl-C says what is kept; a run that measured nothing leaves nothing."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with SampleLog(out / LOG) as log:
            try:
                yield log
            except KeyboardInterrupt:
                raise Interrupted(
                    f"validation stopped; {len(log)} finished results are kept in {out / LOG} and the one being "
                    "measured is lost; run the same command again to go on"
                ) from None
    finally:
        if not (out / LOG).stat().st_size:
            (out / LOG).unlink()
            for folder in made:
                folder.rmdir()


def identity(source: TensorSource) -> tuple[str, int]:
    """SHA-256 that names the weights and config of a checkpoint (hashing.py), and the bytes of its weight files."""
    path = Path(getattr(source, "path", source.name))
    if path.is_file():
        return file_hash(path), path.stat().st_size
    weights = {file for pattern in WEIGHT_PATTERNS for file in path.glob(pattern)}
    return artifact_hash(path), sum(file.stat().st_size for file in weights)


def _setup(engine: Engine) -> Setup:
    on_gpu = engine.device.type == "cuda"
    return Setup(
        device=torch.cuda.get_device_name(engine.device) if on_gpu else platform.processor() or platform.machine(),
        dtype=str(engine.dtype).removeprefix("torch."),
        threads=None if on_gpu else torch.get_num_threads(),
        kv_scheme=engine.kv.scheme,
        attention=engine.attention.kind,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    named = {name: _version(name) for name in ("lcconvert", "torch", "triton", "tokenizers")}
    return named | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _published(config: ValidateConfig) -> dict[str, Any]:
    """The settings without paths of this machine: the report goes wherever the artifact goes."""
    settings = config.model_dump(mode="json")
    named = ("against", "haystack", "perplexity_text", "source_tree", "qa_file", "prompt_cache")
    if settings["endpoint"] is not None:
        settings["endpoint"] = "a server"  # its address is nobody's business; its model is in `setup`
    settings["beside"] = [public_name(path) for path in settings["beside"]]
    return settings | {key: public_name(settings[key]) for key in named if settings[key] is not None}


def _missed(check: Check) -> str:
    value = "not measured" if check.value is None else f"{check.value:.4g}"
    return f"{check.name} is {value}, the recipe asks for {check.limit:g}"
