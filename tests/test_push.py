"""Uploading against a loopback Hub: what arrives, what is refused before any request, and what each failure says."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from fake_hub import FakeHub, running_hub
from reports import tiny_report
from safetensors.torch import save_file

from lcconvert.convert.hashing import artifact_hash
from lcconvert.convert.push import PushConfig, plan_push, push
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.sidecar import ContextClaim, Sidecar

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # inside huggingface_hub
TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # read when huggingface_hub is imported, so setting the environment now would be too late
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield hub


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
    return folder


def validated(folder: Path) -> Path:
    (folder / "validation").mkdir()
    report = tiny_report(artifact_hash(folder))
    (folder / "validation" / "report.json").write_text(report.model_dump_json())
    (folder / "validation" / "needles.png").write_bytes(b"\x89PNG picture")
    (folder / "training").mkdir()
    (folder / "training" / "loss.jsonl").write_text("{}\n")
    return folder


def test_every_file_arrives_with_a_card(hub: FakeHub, artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = push(validated(artifact), "me/demo", PushConfig(private=True))
    assert url == f"{hub.url}/me/demo"
    local = {p.relative_to(artifact).as_posix(): p.read_bytes() for p in artifact.rglob("*") if p.is_file()}
    assert hub.files == local
    assert {"README.md", "model.safetensors", "validation/needles.png"} <= set(hub.files)
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
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


@pytest.mark.parametrize(("status", "word"), [(401, "login"), (403, "write access"), (409, "somebody else")])
def test_refusals_are_one_sentence(
    hub: FakeHub, artifact: Path, status: int, word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.fail[{401: "/api/", 403: "/preupload/", 409: "/commit/"}[status]] = [status] * 9
    with pytest.raises(UserError, match=word) as caught:
        push(artifact, "me/demo", PushConfig())
    assert str(status) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not any(TOKEN in text for text in (*capfd.readouterr(), str(caught.value)))
    assert hub.files == {}


def test_server_failure_then_a_rerun_finishes_without_sending_twice(hub: FakeHub, artifact: Path) -> None:
    hub.fail["/commit/"] = [503] * 9
    with pytest.raises(UserError, match=r"failed \(503\); run the same command again"):
        push(artifact, "me/demo", PushConfig())
    assert hub.files == {}
    hub.fail.clear()
    push(artifact, "me/demo", PushConfig())
    assert hub.files["model.safetensors"] == (artifact / "model.safetensors").read_bytes()
    assert sum(call.startswith("PUT") for call, _ in hub.calls) == 1


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


def test_offline_mode(artifact: Path) -> None:
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
    with pytest.raises(UserError, match="was measured on weights"):
        plan_push(artifact, "me/demo", PushConfig())


def test_licence_is_asked_for_when_unknown(artifact: Path) -> None:
    bare = Sidecar(context=ContextClaim(configured=8192))
    (artifact / "lcconvert.json").write_bytes(bare.to_bytes())
    with pytest.raises(UserError, match="--license"):
        plan_push(artifact, "me/demo", PushConfig())
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


def test_pull_request_with_a_revision_is_refused(artifact: Path) -> None:
    with pytest.raises(UserError, match="create_pr"):
        plan_push(artifact, "me/demo", PushConfig(create_pr=True, revision="v2"))
