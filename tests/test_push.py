"""Uploading against a loopback Hub: what arrives, what is refused before any request, and what each failure says."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from fake_hub import FakeHub, running_hub
from huggingface_hub import ModelCard, parse_eval_result_entries
from reports import tiny_report
from safetensors.torch import save_file
from tiny import write_tiny

from lcconvert.convert.export import ExportConfig, export
from lcconvert.convert.extend import extend
from lcconvert.convert.extend_config import ExtendConfig
from lcconvert.convert.hashing import artifact_hash, record_files
from lcconvert.convert.push import PushConfig, plan_push, push
from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError
from lcconvert.runtime.sidecar import ContextClaim, Sidecar

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # inside huggingface_hub
TOKEN = "hf_" + "s3cret" * 6


hub_waits: list[float] = []  # seconds that somebody would have slept


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # read when huggingface_hub is imported, so setting the environment now would be too late
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(time, "sleep", hub_waits.append)
        yield hub
    hub_waits.clear()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    config = {"max_position_embeddings": 8192, "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e6}}
    (folder / "config.json").write_text(json.dumps(config))
    sidecar = Sidecar(
        variant="flash",
        context=ContextClaim(configured=8192),
        provenance={"source": "someone/base-model", "license": "apache-2.0"},
    )
    (folder / "lcconvert.json").write_bytes(sidecar.to_bytes())
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": torch.arange(12.0)}, folder / "model.safetensors")
    record_files(folder)
    return folder


def validated(folder: Path) -> Path:
    (folder / "validation").mkdir()
    report = tiny_report(artifact_hash(folder))
    (folder / "validation" / "report.json").write_text(report.model_dump_json())
    (folder / "validation" / "needles.png").write_bytes(b"\x89PNG picture")
    (folder / "training").mkdir()
    (folder / "training" / "loss.jsonl").write_text("{}\n")
    claim(folder, 4096)
    record_files(folder)
    return folder


def claim(folder: Path, validated: int | None) -> None:
    sidecar = Sidecar.parse((folder / "lcconvert.json").read_bytes(), "")
    context = ContextClaim(configured=8192, validated=validated)
    (folder / "lcconvert.json").write_bytes(sidecar.model_copy(update={"context": context}).to_bytes())


def test_every_file_arrives_with_a_card(hub: FakeHub, artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = push(validated(artifact), "me/demo", PushConfig(private=True))
    assert url == f"{hub.url}/me/demo"
    local = {p.relative_to(artifact).as_posix(): p.read_bytes() for p in artifact.rglob("*") if p.is_file()}
    assert hub.files == local
    assert {"README.md", "model.safetensors", "validation/needles.png"} <= set(hub.files)
    assert hub.private is True
    assert hub.commits == ["Upload with lcconvert"]
    card = ModelCard(hub.files["README.md"].decode()).data
    assert {(r.metric_type, r.metric_value) for r in card.eval_results} >= {("accuracy", 0.8), ("perplexity", 12.1825)}
    entries = parse_eval_result_entries(yaml.safe_load(hub.files[".eval_results/lcconvert.yaml"]))
    assert {entry.value for entry in entries} == {r.metric_value for r in card.eval_results}
    assert {token for call, token in hub.calls if "/blob/" not in call} == {f"Bearer {TOKEN}"}
    assert {token for call, token in hub.calls if "/blob/" in call} == {None}  # signed addresses; may be another host
    assert not any(TOKEN in text for text in (*capfd.readouterr(), url))


def test_pull_request_url(hub: FakeHub, artifact: Path) -> None:
    assert push(artifact, "me/demo", PushConfig(create_pr=True)) == f"{hub.url}/me/demo/discussions/1"


def test_a_branch_is_made_and_named_in_the_url(hub: FakeHub, artifact: Path) -> None:
    assert push(artifact, "me/demo", PushConfig(revision="v2")) == f"{hub.url}/me/demo/tree/v2"
    assert any(call.endswith("/branch/v2") for call, _ in hub.calls)
    assert any("/commit/v2" in call for call, _ in hub.calls)


def test_dry_run_lists_and_touches_nothing(hub: FakeHub, artifact: Path) -> None:
    before = sorted(artifact.rglob("*"))
    listing = push(artifact, "me/demo", PushConfig(dry_run=True))
    assert "model.safetensors" in listing
    assert "README.md" in listing
    assert listing.endswith("would go to me/demo")
    assert hub.calls == []
    assert sorted(artifact.rglob("*")) == before


REFUSALS = [(401, "login"), (403, "write access"), (409, "somebody else"), (418, "saying 'no such token")]


@pytest.mark.parametrize(("status", "word"), REFUSALS)
def test_refusals_are_one_sentence(
    hub: FakeHub,
    artifact: Path,
    status: int,
    word: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    hub.says = f"no such token {TOKEN}"  # a Hub that repeats it
    hub.fail[{401: "/api/", 403: "/preupload/", 409: "/commit/", 418: "/commit/"}[status]] = [status] * 9
    with pytest.raises(UserError, match=word) as caught:
        push(artifact, "me/demo", PushConfig())
    assert str(status) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not any(TOKEN in text for text in (*capfd.readouterr(), str(caught.value), caplog.text))
    assert hub.files == {}


@pytest.mark.parametrize("status", [500, 503])
def test_server_failure_then_a_rerun_finishes_without_sending_twice(hub: FakeHub, artifact: Path, status: int) -> None:
    hub.fail["/commit/"] = [status] * 4
    with pytest.raises(UserError, match=rf"failed \({status}\); run the same command again"):
        push(artifact, "me/demo", PushConfig())
    assert hub_waits == [5.0, 20.0, 60.0]
    assert hub.files == {}
    push(artifact, "me/demo", PushConfig())
    assert hub.files["model.safetensors"] == (artifact / "model.safetensors").read_bytes()
    assert sum(call.startswith("PUT") for call, _ in hub.calls) == 1


def test_pushing_again_commits_nothing(hub: FakeHub, artifact: Path) -> None:
    push(artifact, "me/demo", PushConfig())
    push(artifact, "me/demo", PushConfig())
    assert len(hub.commits) == 1


@pytest.mark.parametrize("where", ["/repos/create", "/preupload/", "/objects/batch", "/commit/"])
def test_a_busy_hub_is_waited_for(hub: FakeHub, artifact: Path, where: str) -> None:
    hub.fail[where] = [429, 429]
    hub.headers = {"Retry-After": "33"}
    push(artifact, "me/demo", PushConfig())
    assert "model.safetensors" in hub.files
    assert len(hub_waits) == 2
    assert min(hub_waits) >= 33


def test_ctrl_c_while_waiting_says_how_to_go_on(hub: FakeHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    hub.fail["/commit/"] = [503]
    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(Interrupted, match="run the same command again to go on"):
        push(artifact, "me/demo", PushConfig())


def test_a_hub_that_asks_for_an_hour_is_left_to_the_user(hub: FakeHub, artifact: Path) -> None:
    hub.fail["/commit/"] = [429]
    hub.headers = {"Retry-After": "3600"}
    with pytest.raises(UserError, match="slow down"):
        push(artifact, "me/demo", PushConfig())
    assert hub_waits == []


def test_a_pull_request_is_not_opened_twice(hub: FakeHub, artifact: Path) -> None:
    hub.fail["/commit/"] = [504]
    with pytest.raises(UserError, match=r"failed \(504\)"):
        push(artifact, "me/demo", PushConfig(create_pr=True))
    assert hub_waits == []


def test_an_upload_that_breaks_off_is_sent_again(hub: FakeHub, artifact: Path) -> None:
    hub.cut = 1
    push(artifact, "me/demo", PushConfig())
    assert hub.files["model.safetensors"] == (artifact / "model.safetensors").read_bytes()
    assert sum(call.startswith("PUT") for call, _ in hub.calls) == 2


def test_an_upload_that_keeps_breaking_off_is_taken_up_by_the_next_run(hub: FakeHub, artifact: Path) -> None:
    validated(artifact)  # with a picture, a second large file
    hub.part_size = 64
    hub.cut = 40
    with pytest.raises(UserError, match=r"broke off .*run the same command again"):
        push(artifact, "me/demo", PushConfig())
    assert hub.files == {}
    hub.cut = 0
    sent = len(hub.calls)
    push(artifact, "me/demo", PushConfig())
    assert hub.files["model.safetensors"] == (artifact / "model.safetensors").read_bytes()
    assert any("/complete/" in call for call, _ in hub.calls[sent:])


def test_only_the_part_that_broke_off_is_sent_again(hub: FakeHub, artifact: Path) -> None:
    hub.part_size = 64
    hub.cut = 1
    push(artifact, "me/demo", PushConfig())
    puts = [call for call, _ in hub.calls if call.startswith("PUT")]
    assert len(puts) == len(set(puts)) + 1
    assert hub.files["model.safetensors"] == (artifact / "model.safetensors").read_bytes()


def test_a_commit_that_came_between_is_not_mixed_with_ours(hub: FakeHub, artifact: Path) -> None:
    push(artifact, "me/demo", PushConfig())
    (artifact / "README.md").write_text("mine")
    hub.before_commit = lambda: hub.somebody_commits("config.json", b"theirs")
    with pytest.raises(UserError, match="changed by somebody else"):
        push(artifact, "me/demo", PushConfig())
    assert (hub.files["config.json"], hub.commits[-1]) == (b"theirs", "somebody else's")
    hub.before_commit = lambda: None
    push(artifact, "me/demo", PushConfig())
    assert hub.files["config.json"] == (artifact / "config.json").read_bytes()
    assert hub.files["README.md"] == b"mine"


def test_what_an_earlier_artifact_left_is_removed(hub: FakeHub, artifact: Path) -> None:
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "validation/report.json")
    kept = (".gitattributes", "other-q8_0.gguf", "LICENSE", "notes.txt")
    hub.files = dict.fromkeys((*stale, *kept), b"old")
    push(artifact, "me/demo", PushConfig())
    assert not set(stale) & set(hub.files)
    assert {hub.files[name] for name in kept} == {b"old"}


def test_private_does_not_silently_mean_public(hub: FakeHub, artifact: Path) -> None:
    hub.private = False
    with pytest.raises(UserError, match="exists and is public"):
        push(artifact, "me/demo", PushConfig(private=True))
    assert hub.files == {}


def test_a_card_that_the_hub_refuses(hub: FakeHub, artifact: Path) -> None:
    (artifact / "README.md").write_text("---\nbroken: [\n---\n")
    with pytest.raises(UserError, match=r"does not accept README\.md .*the YAML does not parse"):
        push(artifact, "me/demo", PushConfig())


CHANGES = {
    "changed: config.json": lambda folder: (folder / "config.json").write_text("{}"),
    "changed: model.safetensors": lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
    "missing: tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "extra: vocab.json": lambda folder: (folder / "vocab.json").write_text("{}"),
}


@pytest.mark.parametrize("named", CHANGES)
def test_files_that_are_not_what_was_converted_are_refused(artifact: Path, named: str) -> None:
    CHANGES[named](artifact)
    with pytest.raises(CheckFailed, match=named):
        plan_push(artifact, "me/demo", PushConfig())


def test_an_artifact_without_hashes_is_refused(artifact: Path) -> None:
    bare = Sidecar.parse((artifact / "lcconvert.json").read_bytes(), "").model_copy(update={"files": {}})
    (artifact / "lcconvert.json").write_bytes(bare.to_bytes())
    with pytest.raises(UserError, match="records no hashes"):
        plan_push(artifact, "me/demo", PushConfig())


@pytest.mark.parametrize(("validated_to", "fine"), [(4096, True), (8192, True), (2048, False), (None, False)])
def test_a_claim_that_the_report_does_not_make_is_refused(artifact: Path, validated_to: int | None, fine: bool) -> None:
    """8192: an earlier run over longer contexts, which a run to 4096 does not take back."""
    claim(validated(artifact), validated_to)
    if fine:
        plan_push(artifact, "me/demo", PushConfig())
    else:
        with pytest.raises(UserError, match=r"tokens were validated and validation/report\.json says 4096"):
            plan_push(artifact, "me/demo", PushConfig())


def test_a_claim_without_a_report_is_refused(artifact: Path) -> None:
    claim(artifact, 4096)
    with pytest.raises(UserError, match=r"4096 tokens were validated, but there is no validation/report\.json"):
        plan_push(artifact, "me/demo", PushConfig())


def run_command(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with an empty cache, talking to the fake Hub."""
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-m", "lcconvert.convert", *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)


def test_no_token_in_the_most_talkative_logs(hub: FakeHub, artifact: Path, tmp_path: Path) -> None:
    talkative = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "LCCONVERT_DEBUG": "1"}
    pushed = run_command(tmp_path, "push", str(artifact), "me/demo", **talkative)
    assert (pushed.returncode, pushed.stdout) == (0, f"{hub.url}/me/demo\n")
    hub.fail["/api/"] = [401] * 9
    refused = run_command(tmp_path, "--debug", "push", str(artifact), "me/demo", **talkative)
    assert refused.returncode == 2
    assert "/api/repos/create" in pushed.stderr  # it does say what it sends
    assert not any("s3cret" in text for text in (pushed.stderr, refused.stdout, refused.stderr))


def test_the_token_may_come_from_the_library_s_store(
    hub: FakeHub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match="no Hub token was found; run `hf auth login` or set HF_TOKEN"):
        push(artifact, "me/demo", PushConfig())
    assert hub.calls == []
    (tmp_path / "token").write_text("hf_stored")
    push(artifact, "me/demo", PushConfig())
    assert {token for call, token in hub.calls if "/blob/" not in call} == {"Bearer hf_stored"}


def test_what_was_pushed_can_be_fetched_and_verified(hub: FakeHub, artifact: Path, tmp_path: Path) -> None:
    push(validated(artifact), "me/demo", PushConfig())
    hub.files[".gitattributes"] = b"*.safetensors filter=lfs\n"
    fetched = run_command(tmp_path, "inspect", "--verify", "me/demo")
    assert (fetched.returncode, fetched.stdout) == (0, "me/demo: 5 files are as they were written\n")
    hub.somebody_commits("tokenizer.json", b"[]")
    changed = run_command(tmp_path, "inspect", "--verify", "me/demo")
    assert changed.returncode == 1
    assert "(changed: tokenizer.json)" in changed.stderr


def test_every_conversion_is_inside_the_contract(tmp_path: Path, hub: FakeHub) -> None:
    source = write_tiny(tmp_path / "source")
    (source / "LICENSE.txt").write_text("MIT License")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    made = [
        extend(str(source), tmp_path / "extended", ExtendConfig(context="4k", device="cpu")),
        quantize(str(source), tmp_path / "flash", QuantizeConfig(samples=0, attention="dense", device="cpu")),
        *(export(str(source), tmp_path / kind, ExportConfig(format=kind)) for kind in ("safetensors", "onnx", "gguf")),
    ]
    for folder in made:
        push(folder, "me/demo", PushConfig(license=None if folder.name in ("extended", "flash") else "mit"))
        card = ModelCard(hub.files["README.md"].decode()).data
        assert card.license == ("apache-2.0" if folder.name in ("extended", "flash") else "mit")
        assert str(tmp_path) not in hub.files["README.md"].decode()


def test_object_store_that_keeps_refusing(hub: FakeHub, artifact: Path) -> None:
    hub.fail["/blob/"] = [403] * 9
    with pytest.raises(UserError, match=r"write access"):
        push(artifact, "me/demo", PushConfig())
    assert hub.files == {}


def test_rate_limit_on_the_object_store_is_retried(hub: FakeHub, artifact: Path) -> None:
    hub.fail["/blob/"] = [429]
    push(artifact, "me/demo", PushConfig())
    assert sum(call.startswith("PUT") for call, _ in hub.calls) == 2
    assert "model.safetensors" in hub.files


def test_unreachable_hub(hub: FakeHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/me/demo broke off"):
        push(artifact, "me/demo", PushConfig())


def test_offline_mode(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(artifact, "me/demo", PushConfig())


@pytest.mark.parametrize("stray", ["pytorch_model.bin", "model.safetensors.partial", "training_state/optimizer.pt"])
def test_files_outside_the_contract_are_refused(artifact: Path, stray: str) -> None:
    (artifact / stray).parent.mkdir(exist_ok=True)
    (artifact / stray).write_bytes(b"x")
    with pytest.raises(UserError, match="which is not part of an artifact"):
        plan_push(artifact, "me/demo", PushConfig())


def test_links_are_refused(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    (artifact / "LICENSE").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="LICENSE, which is a link"):
        plan_push(artifact, "me/demo", PushConfig())


@pytest.mark.parametrize("needed", ["config.json", "lcconvert.json", "model.safetensors"])
def test_incomplete_folders_are_refused(artifact: Path, needed: str) -> None:
    (artifact / needed).unlink()
    with pytest.raises(UserError, match=needed.partition(".")[2]):
        plan_push(artifact, "me/demo", PushConfig())


def test_report_of_other_weights_is_refused(artifact: Path) -> None:
    validated(artifact)
    save_file({"w": torch.ones(12)}, artifact / "model.safetensors")
    record_files(artifact)
    with pytest.raises(UserError, match="was measured on weights"):
        plan_push(artifact, "me/demo", PushConfig())


def test_licence_is_asked_for_when_unknown(artifact: Path) -> None:
    for provenance in ({}, {"license": "unknown"}):
        bare = Sidecar(context=ContextClaim(configured=8192), provenance=provenance)
        (artifact / "lcconvert.json").write_bytes(bare.to_bytes())
        record_files(artifact)
        with pytest.raises(UserError, match="--license"):
            plan_push(artifact, "me/demo", PushConfig())
    with pytest.raises(UserError, match="expected the Hub's identifier"):
        plan_push(artifact, "me/demo", PushConfig(license="Apache License 2.0"))
    assert "license: mit" in str(plan_push(artifact, "me/demo", PushConfig(license="mit")).card)
    (artifact / "LICENSE").write_text("\n        Apache License\n      Version 2.0, January 2004\n")
    assert "license: apache-2.0" in str(plan_push(artifact, "me/demo", PushConfig()).card)


def test_a_card_edited_by_hand_is_kept(artifact: Path) -> None:
    (artifact / "README.md").write_text("mine")
    plan = plan_push(artifact, "me/demo", PushConfig())
    assert plan.card is None
    assert ("README.md", 4) in plan.files


@pytest.mark.parametrize("repo", ["demo", "me/demo/x", "me/../x", ""])
def test_bad_repo_names(artifact: Path, repo: str) -> None:
    with pytest.raises(UserError, match="expected owner/name"):
        plan_push(artifact, repo, PushConfig())


def test_bad_base_model(artifact: Path) -> None:
    with pytest.raises(UserError, match="base_model is 'base', expected owner/name"):
        plan_push(artifact, "me/demo", PushConfig(base_model="base"))


def test_pull_request_with_a_revision_is_refused(artifact: Path) -> None:
    with pytest.raises(UserError, match="create_pr"):
        plan_push(artifact, "me/demo", PushConfig(create_pr=True, revision="v2"))
