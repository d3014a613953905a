"""Fine-tuning: it learns, it resumes number for number after a kill, and it stops cleanly on Ctrl-C and NaN."""

import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny

from lcconvert.convert import trainer
from lcconvert.convert.corpus import Corpus
from lcconvert.convert.extend import ExtendConfig, Stage, extend
from lcconvert.convert.rows import StageRows
from lcconvert.convert.shelf import Shelf
from lcconvert.convert.streamed import Keep, Streaming
from lcconvert.convert.trainer import LossModule, learning_rate
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.tokenizer import Tokenizer

STAGES = (
    Stage(steps=5, seq_len=512, batch_size=2, lr=3e-3, warmup=1),
    Stage(steps=4, seq_len=768, accumulate=2, lr=1e-3),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_tiny(folder / "source")
    (folder / "text").mkdir()
    for i in range(6):
        lines = (f"On day {j} the {'river' if i % 2 else 'wind'} was {j * i % 7} feet high.\n\n" for j in range(60))
        (folder / "text" / f"{i}.txt").write_text("".join(lines))
    return folder


def config(work: Path, **overrides: Any) -> ExtendConfig:
    values: dict[str, Any] = {"context": "64k", "data": (str(work / "text"),), "stages": STAGES, "save_every": 2}
    return ExtendConfig(**{**values, "device": "cpu", **overrides})


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training" / "loss.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(work: Path) -> Path:
    """One uninterrupted run."""
    return extend(str(work / "source"), work / "whole", config(work))


STEP = random.SystemRandom().randint(1, 8)  # any step will do; a failure shows which it was

KILLED = """
import os, signal, sys
from pathlib import Path
from lcconvert.convert import parallel, trainer
from lcconvert.convert.extend import ExtendConfig, extend

how, number = sys.argv[4], int(sys.argv[5])
saves = 0

class Killing(trainer.TrainingLog):
    def add(self, **row):
        super().add(**row)
        if how == "step" and row["step"] == number:
            os.kill(os.getpid(), signal.SIGKILL)

class Accelerator(parallel.Accelerator):
    def save_state(self, folder):
        global saves
        super().save_state(folder)
        saves += 1
        if how == "save" and saves == number:
            os.kill(os.getpid(), signal.SIGKILL)

trainer.TrainingLog, parallel.Accelerator = Killing, Accelerator
extend(sys.argv[1], Path(sys.argv[2]), ExtendConfig.model_validate_json(sys.argv[3]))
"""


def test_what_a_training_leaves(work: Path, whole: Path) -> None:
    rows = curve(whole)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["stage"] for row in rows] == [0] * 5 + [1] * 4
    assert rows[4]["tokens"] == 5 * 2 * 512
    assert rows[-1]["tokens"] == 5 * 2 * 512 + 4 * 2 * 768
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert (whole / "training" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not [path.name for path in whole.iterdir() if path.name.startswith(trainer.STATE)]
    assert not (work / "whole.partial").exists()
    provenance = Sidecar.read(FolderSource(whole)).provenance
    assert provenance["training"]["steps"] == 9
    assert provenance["config"]["method"] == "theta"  # the default when training
    source, trained = FolderSource(work / "source"), FolderSource(whole)
    assert all(not torch.equal(trained.tensor(n), source.tensor(n).bfloat16()) for n in source.names() if "proj" in n)


def test_bfloat16_forward_trains_float32_weights(work: Path, whole: Path) -> None:
    short = config(work, stages=(Stage(steps=2, seq_len=512, batch_size=2, lr=3e-3, warmup=1),), dtype="bfloat16")
    rows, exact = curve(extend(str(work / "source"), work / "sixteen", short)), curve(whole)
    assert rows[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-2)
    assert rows[0]["loss"] != exact[0]["loss"]


def test_it_learns(work: Path) -> None:
    steps = config(
        work, stages=(Stage(steps=30, seq_len=512, batch_size=2, lr=3e-3, retrieval_share=0.0),), save_every=0
    )
    rows = curve(extend(str(work / "source"), work / "learnt", steps))
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]


@pytest.mark.parametrize(
    ("how", "number", "saved", "logged"),
    [
        ("step", STEP, (STEP - 1) // 2 * 2, STEP),  # the log is ahead of the checkpoint: it is cut
        ("save", 3, 4, 6),  # the new checkpoint is written but not marked: the one before it counts
    ],
    ids=["step", "save"],
)
def test_killed_and_resumed_gives_the_same_bytes(
    work: Path, whole: Path, how: str, number: int, saved: int, logged: int
) -> None:
    out = work / f"killed-{how}"
    arguments = [str(work / "source"), str(out), config(work).model_dump_json(exclude={"steps"}), how, str(number)]
    process = subprocess.run([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    partial = out.with_name(out.name + ".partial")
    assert trainer.saved_step(partial) == saved
    assert len(curve(partial)) == logged
    resumed = extend(str(work / "source"), out, config(work))
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(path.relative_to(resumed) for path in resumed.rglob("*") if path.is_file())
    assert [str(name) for name in names if (whole / name).read_bytes() != (resumed / name).read_bytes()] == []


@pytest.mark.gpu
def test_killed_on_a_gpu_and_resumed_gives_the_same_weights_to_rounding(work: Path) -> None:
    settings = config(work, device="cuda", streamed=True, host_optimizer=True, tile=256)
    unbroken = extend(str(work / "source"), work / "gpu", settings)
    out = work / "gpu-killed"
    arguments = [str(work / "source"), str(out), settings.model_dump_json(exclude={"steps"}), "step", "6"]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -signal.SIGKILL
    resumed = FolderSource(extend(str(work / "source"), out, settings))
    for name in resumed.names():
        expected = FolderSource(unbroken).tensor(name).float()
        torch.testing.assert_close(resumed.tensor(name).float(), expected, rtol=2e-2, atol=2e-3)


def test_ctrl_c_saves_at_the_border_and_says_how_to_resume(
    work: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping(trainer.TrainingLog):
        def add(self, **row: Any) -> None:
            super().add(**row)
            if row["step"] in (3, 7):  # within the first and the second stage
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "TrainingLog", Stopping)
        for step in (3, 7):
            with pytest.raises(Interrupted, match=rf"stopped after step {step} of 9, .* repeat the same command"):
                extend(str(work / "source"), work / "stopped", config(work))
            assert trainer.saved_step(work / "stopped.partial") == step
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(UserError, match="another seed"):
        extend(str(work / "source"), work / "stopped", config(work, seed=1))
    assert trainer.saved_step(work / "stopped.partial") == 7
    assert curve(extend(str(work / "source"), work / "stopped", config(work))) == curve(whole)


def test_nan_stops_and_names_the_step(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = trainer.weighted_cross_entropy

    def failing(*args: Any) -> torch.Tensor:
        calls.append(1)
        return plain(*args) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(trainer, "weighted_cross_entropy", failing)
    with pytest.raises(
        CheckFailed, match=r"at step 4, on text of .*/[0-5]\.txt.*, is not finite; the checkpoint of step 2 is kept"
    ):
        extend(str(work / "source"), work / "nan", config(work))
    assert trainer.saved_step(work / "nan.partial") == 2
    assert len(curve(work / "nan.partial")) == 3


@pytest.fixture(scope="module")
def batch(work: Path) -> dict[str, torch.Tensor]:
    tokenizer = Tokenizer.from_files(FolderSource(work / "source").files)
    corpus = Corpus.read([str(work / "text")], tokenizer, need=10**5, seed=0)
    stage = Stage(steps=1, batch_size=4, seq_len=700)
    rows = StageRows(stage, corpus, tokenizer, 2**16, 0, 0, 0)
    made = [rows[i] for i in range(4)]
    return {key: torch.stack([row[key] for row in made]) for key in made[0]}


def loss_and_gradients(module: LossModule, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = module(**batch)
    return loss.detach(), list(torch.autograd.grad(loss, list(module.parameters())))


def test_checkpointing_layers_changes_nothing(work: Path, batch: dict[str, torch.Tensor]) -> None:
    decoder = load_decoder(FolderSource(work / "source")).train()
    plain = loss_and_gradients(LossModule(decoder, False), batch)
    torch.testing.assert_close(loss_and_gradients(LossModule(decoder, True), batch), plain)


def test_streaming_changes_nothing(work: Path, batch: dict[str, torch.Tensor]) -> None:
    decoder = load_decoder(FolderSource(work / "source")).train()
    plain = loss_and_gradients(LossModule(decoder, False), batch)
    module = LossModule(decoder, False)
    module.streaming = Streaming(Shelf(torch.device("cpu")), [Keep("host", "host"), Keep("host", "again")], tile=1024)
    torch.testing.assert_close(loss_and_gradients(module, batch), plain, rtol=1e-5, atol=1e-6)


def test_a_streamed_training_with_its_optimizer_in_the_host_is_the_same_and_resumes(
    work: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping(trainer.TrainingLog):
        def add(self, **row: Any) -> None:
            super().add(**row)
            if row["step"] == 6:
                signal.raise_signal(signal.SIGINT)

    settings = config(work, streamed=True, host_optimizer=True, tile=256)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "TrainingLog", Stopping)
        with pytest.raises(Interrupted):
            extend(str(work / "source"), work / "streamed", settings)
    with pytest.raises(UserError, match="another host_optimizer"):
        extend(str(work / "source"), work / "streamed", settings.model_copy(update={"host_optimizer": False}))
    rows, plain = curve(extend(str(work / "source"), work / "streamed", settings)), curve(whole)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], rel=1e-4)


def test_loss_is_the_mean_of_rows(work: Path, batch: dict[str, torch.Tensor]) -> None:
    module = LossModule(load_decoder(FolderSource(work / "source")), False)
    with torch.no_grad():
        together = module(**batch)
        alone = [module(**{key: value[i : i + 1] for key, value in batch.items()}) for i in range(4)]
        logits = module.decoder.logits(module.decoder(batch["ids"], batch["positions"]))[:, :-1]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none")
    torch.testing.assert_close(together, (expected * batch["weights"][:, 1:]).sum() / 4)


def test_replayed_rows_are_compared_with_the_teacher_in_short_pieces(
    work: Path, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "REPLAY_TOKENS", 256)
    decoder, teacher = load_decoder(FolderSource(work / "source")), load_decoder(FolderSource(work / "source"))
    module = LossModule(decoder, False, teacher)
    assert len(list(module.parameters())) == len(list(decoder.parameters()))
    with torch.no_grad():
        plain = module(**{key: value[1:2] for key, value in batch.items()})
        replay = torch.tensor([True, False])
        two = {key: value[:2] for key, value in batch.items()} | {"replay": replay}
        torch.testing.assert_close(module(**two), plain / 2)  # the teacher itself diverges by nothing
        decoder.layers[0].mlp.down_proj.weight.mul_(3.0)
        plain = module(**{key: value[1:2] for key, value in batch.items()})
        pieces = batch["ids"][0, :512].view(2, 256)
        said, wanted = (each.logits(each(pieces)).log_softmax(-1) for each in (decoder, teacher))
        expected = torch.nn.functional.kl_div(said, wanted, log_target=True, reduction="sum") / 512
        assert expected > 0.01
        torch.testing.assert_close(module(**two), (plain + expected) / 2)


def test_replay_holds_the_model_where_it_was(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same text, a training with replay ends closer to the original model than one without."""
    drift = []
    before = FolderSource(work / "source")
    original = load_decoder(before)
    ids = torch.randint(4, 320, (2, 512), generator=torch.Generator().manual_seed(1))
    for share in (0.0, 0.5):
        stage = Stage(steps=12, seq_len=512, batch_size=2, lr=3e-3, retrieval_share=0.0, replay_share=share)
        out = extend(str(work / "source"), work / f"replay{share}", config(work, stages=(stage,), save_every=0))
        trained = load_decoder(FolderSource(out))
        with torch.no_grad():
            said, wanted = (each.logits(each(ids)).log_softmax(-1) for each in (trained, original))
        drift.append(torch.nn.functional.kl_div(said, wanted, log_target=True, reduction="batchmean").item())
    assert drift[1] < 0.8 * drift[0]


def test_learning_rate() -> None:
    stage = Stage(steps=10, lr=1.0, warmup=3)
    rates = [learning_rate(stage, step) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(Stage(steps=1, lr=1.0), 0) == 1.0
