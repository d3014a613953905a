"""The plan of an extension: predictions against what was measured, what fits, and stages cut to a time."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import write_tiny

from lcconvert.convert.cli import cli
from lcconvert.convert.extend import extend
from lcconvert.convert.extend_config import ExtendConfig, Stage
from lcconvert.convert.extend_plan import CARDS, Cost, fit_time
from lcconvert.convert.recipe import load_recipe
from lcconvert.convert.shapes import SHAPES
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.units import parse_seconds

CARD = CARDS["h100"]
SMOL, LLAMA = (ModelSpec.from_config(SHAPES[name]) for name in ("smollm2-135m", "llama-3.1-8b"))


def config(*stages: Stage, **values: Any) -> ExtendConfig:
    return ExtendConfig(context="1M", stages=stages, data=("x",), dtype="bfloat16", **values)


@pytest.mark.parametrize(
    ("stage", "measured"),
    [
        (Stage(steps=1, seq_len="64k"), 1.56),
        (Stage(steps=1, seq_len="256k"), 21.1),
        (Stage(steps=1, seq_len="1M", questions=64, replay_share=0.2, batch_size=16), 20.0),
    ],
    ids=["64k", "256k", "on 1M"],
)
def test_predicts_the_seconds_that_were_measured(stage: Stage, measured: float) -> None:
    assert Cost(SMOL, config(stage), CARD).step_seconds(stage) == pytest.approx(measured, rel=0.15)


def test_what_does_not_fit_is_refused_with_the_longest_length_that_does() -> None:
    Cost(LLAMA, config(Stage(steps=1, seq_len="256k"), lora_rank=16), CARD).check_fits()
    too_long = Stage(steps=1, seq_len="1M")
    cost = Cost(LLAMA, config(too_long, lora_rank=16), CARD)
    longest = cost.longest(too_long)
    with pytest.raises(
        UserError, match=rf"stage 1 \(1 x 1M tokens\) .* longest seq_len that fits is {longest // 1024}K"
    ):
        cost.check_fits()
    for length, fitting in ((longest, True), (longest + 1024, False)):
        stage = too_long.model_copy(update={"seq_len": length})
        assert Cost(LLAMA, config(stage, lora_rank=16), CARD).memory(stage).fits == fitting
    none = Stage(steps=1)
    with pytest.raises(UserError, match="no seq_len fits"):
        Cost(LLAMA, config(none, host_optimizer=False), CARD).check_fits()


def test_several_cards_share_tokens_and_if_asked_weights() -> None:
    stage = Stage(steps=1, seq_len="64k")
    alone, eight = (Cost(LLAMA, config(stage, streamed=False, lora_rank=16), CARD, count) for count in (1, 8))
    assert eight.step_seconds(stage) == pytest.approx(alone.step_seconds(stage) / 8)
    assert not alone.memory(stage).fits
    assert eight.memory(stage).fits
    full = config(stage, streamed=False, host_optimizer=False)
    assert not Cost(LLAMA, full, CARD, 8).memory(stage).fits
    assert Cost(LLAMA, full, CARD, 8, sharded=True).memory(stage).fits


def test_streaming_and_adapters_make_room() -> None:
    """An 8B model on one card of 80 GB in a machine of 128 GiB, of which a sixth is left free."""
    plain = Cost(LLAMA, config(Stage(steps=1), streamed=False, host_optimizer=False), CARD)
    assert plain.longest(Stage(steps=1)) == 0
    whole = Stage(steps=1, seq_len="64k")
    full = Cost(LLAMA, config(whole), CARD)
    full.check_fits()
    assert full.host_optimizer
    assert 96e9 < full.memory(whole).host < 108 * 2**30
    long = Stage(steps=1, seq_len="256k")
    adapters = Cost(LLAMA, config(long, lora_rank=16), CARD)
    adapters.check_fits()
    assert not adapters.host_optimizer
    memory = adapters.memory(long)
    assert [keep.inputs for keep in memory.keeps] == ["host"] * 32
    assert memory.computed_again == 0
    assert memory.host < 108 * 2**30
    frozen_ends = Cost(LLAMA, config(long, lora_rank=16, lora_train=("norms",)), CARD)
    assert frozen_ends.longest(long) > adapters.longest(long) > 3 * 2**17


def test_what_fits_is_not_streamed() -> None:
    stage = Stage(steps=1, seq_len="256k")
    assert Cost(SMOL, config(stage), CARD).memory(stage).keeps == ()
    assert len(Cost(SMOL, config(stage, streamed=True), CARD).memory(stage).keeps) == SMOL.num_layers
    million = Stage(steps=1, seq_len="1M")
    assert Cost(SMOL, config(million), CARD).memory(million).keeps
    with pytest.raises(UserError, match="longest seq_len that fits"):
        Cost(SMOL, config(million, streamed=False), CARD).check_fits()


def test_replay_costs_less_than_the_long_rows_it_replaces() -> None:
    plain, replayed = (Stage(steps=1, seq_len="64k", replay_share=share) for share in (0.0, 0.5))
    cost = Cost(SMOL, config(plain), CARD)
    assert 0.5 * cost.step_seconds(plain) < cost.step_seconds(replayed) < 0.75 * cost.step_seconds(plain)


def test_stages_are_cut_in_proportion_to_the_time() -> None:
    stages = (Stage(steps=200, seq_len="16k", batch_size=4, warmup=10), Stage(steps=80, seq_len="64k", warmup=3))
    whole = config(*stages, max_time="1h")
    assert fit_time(whole, SMOL, CARD) is whole
    cut = fit_time(config(*stages, max_time="2m"), SMOL, CARD)
    assert 110 < Cost(SMOL, cut, CARD).seconds() <= 120
    first, second = (stage.steps for stage in cut.plan)
    assert first / second == pytest.approx(200 / 80, rel=0.1)
    with pytest.raises(UserError, match="one step of every stage takes 2 s"):
        fit_time(config(*stages, max_time="1s"), SMOL, CARD)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), (7.0, 7)])
def test_durations(text: Any, seconds: float) -> None:
    assert parse_seconds(text) == seconds


def test_a_duration_that_is_none() -> None:
    with pytest.raises(UserError, match="time is 'soon'"):
        parse_seconds("soon")


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    command = ["extend", str(source), "-o", str(tmp_path / "out"), "--context", "64k", "--dry-run"]
    train = ["--steps", "1000", "--seq-len", "4k", "--data", "unread"]
    result = CliRunner().invoke(cli, [*command, *train])
    assert result.exit_code == 0, result.output
    for part in ("2K -> 64K (scale 32)", "rope_theta = ", "1000", "1 x 4K", "minutes"):
        assert part in result.output
    assert "only the positions change" in CliRunner().invoke(cli, command).output
    cut = CliRunner().invoke(cli, [*command, *train, "--max-time", "0.03s"])
    assert "1000" not in cut.output.split("stage")[1]
    assert not (tmp_path / "out").exists()


def test_dry_run_of_a_recipe_and_options_over_it(tmp_path: Path) -> None:
    command = ["extend", str(write_tiny(tmp_path / "source")), "-o", str(tmp_path / "out"), "--dry-run"]
    result = CliRunner().invoke(cli, [*command, "--recipe", "smollm2-135m-1m"])
    assert result.exit_code == 0, result.output
    assert "2K -> 1M (scale 512)" in result.output
    assert all(part in result.output for part in ("x 16K ", "x 64K ", "256 on 1M "))
    assert "2K -> 512K" in CliRunner().invoke(cli, [*command, "--recipe", "pro", "--context", "512k"]).output


def test_the_recipe_for_one_h100_fits_its_half_hour() -> None:
    planned = fit_time(load_recipe("smollm2-135m-1m").extend, SMOL, CARD)
    cost = Cost(SMOL, planned, CARD)
    cost.check_fits()
    assert 600 < cost.seconds() <= 18 * 60


def test_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match="max_time plans by the speed of a GPU and this runs on cpu"):
        extend(
            str(source),
            tmp_path / "out",
            ExtendConfig(context="64k", steps=1, data=(str(tmp_path / "a.txt"),), max_time="1m", device="cpu"),
        )
    command = ["extend", str(source), "-o", str(tmp_path / "out"), "--context", "64k", "--dry-run", "--card", "abacus"]
    assert "card is 'abacus', expected one whose speed was measured: h100" in str(
        CliRunner().invoke(cli, command).exception
    )
