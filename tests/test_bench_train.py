"""`bench --train`: the trainer's own step, measured, in text and JSON."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import write_tiny

from lcconvert.convert.bench_train import TrainBenchConfig, bench_train
from lcconvert.convert.cli import cli
from lcconvert.runtime.errors import UserError


def test_measures_steps_of_a_shape(tmp_path: Path) -> None:
    shape = str(write_tiny(tmp_path / "shape", "qwen2"))  # a head of its own
    command = ["bench", "--train", "--shape", shape, "--context", "512", "--context", "1k", "--steps", "2"]
    out = tmp_path / "bench.json"
    result = CliRunner().invoke(cli, [*command, "--lora-rank", "4", "--streamed", "--tile", "256", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert all(part in result.output for part in ("LoRA of rank 4", "1K tokens", "tokens/s", "peak GPU", "host"))
    short, long = json.loads(out.read_text())["steps"]
    assert (short["context"], long["context"], len(long["seconds"])) == (512, 1024, 2)
    assert long["loss"] == pytest.approx(5.8, abs=0.5)  # ln 320: nothing can be known of random tokens
    assert long["grad_norm"] > 0
    assert long["model_flop"] > 2 * short["model_flop"]  # attention
    assert short["flop_by_6n"] > short["model_flop"]  # most weights are frozen
    assert long["predicted_seconds"] is None
    with pytest.raises(UserError, match="exists and is not overwritten"):
        bench_train(TrainBenchConfig(shape=shape), out)


def test_streamed_and_whole_have_the_same_loss(tmp_path: Path) -> None:
    shape = str(write_tiny(tmp_path / "shape"))
    whole = TrainBenchConfig(shape=shape, context=(700,), steps=2)
    streamed = whole.model_copy(update={"streamed": True, "host_optimizer": True, "tile": 256})
    losses = [bench_train(each)["steps"][0] for each in (whole, streamed)]
    for figure in ("loss", "grad_norm"):
        assert losses[0][figure] == pytest.approx(losses[1][figure], rel=1e-4)


def test_options_of_other_benches_are_refused() -> None:
    command = ["bench", "--train", "--shape", "smollm2-135m", "--decode", "8"]
    assert "unknown key 'decode'" in str(CliRunner().invoke(cli, command).exception)
