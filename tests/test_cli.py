"""The command line as a user meets it: help, examples, and one sentence with exit code 2 for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from lcconvert.convert.cli import Verb, cli, main
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lcconvert", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def call(capsys, monkeypatch):
    return lambda *args: run(capsys, monkeypatch, *args)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['lcconvert', '--help']\n"
        "from lcconvert.convert.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('LOADED', [m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout
    for verb in cli.commands:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_every_verb_shows_an_example_that_parses(verb: str, call) -> None:
    code, out, _ = call(verb, "--help")
    assert code == 0
    command = cli.commands[verb]
    assert isinstance(command, Verb)
    assert "Example: lcconvert" in out
    import shlex

    args = shlex.split(command.epilog or "")[2:]
    assert args[0] == verb
    command.make_context(verb, args[1:], resilient_parsing=False)


def test_every_verb_of_the_design_exists() -> None:
    wanted = "inspect extend quantize export serve ask session generate validate bench push run"
    assert set(cli.commands) == set(wanted.split())


def test_exit_codes_and_sentences(call, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        (UserError("x is 1, expected 2; set it"), 2, "lcconvert: x is 1, expected 2; set it"),
        (CheckFailed("needles 3 of 5, expected 4"), 1, "lcconvert: needles 3 of 5, expected 4"),
        (Interrupted("kept A.partial"), 130, "lcconvert: kept A.partial"),
        (KeyboardInterrupt(), 130, "lcconvert: interrupted; nothing was written"),
        (RuntimeError("boom"), 1, "lcconvert: unexpected RuntimeError: boom"),
    ]
    for error, expected, sentence in cases:

        def fail(error: BaseException = error, **_: object) -> None:
            raise error

        monkeypatch.setattr(cli.commands["inspect"], "callback", click.pass_context(lambda ctx, fail=fail, **_: fail()))
        code, out, err = call("inspect", "nothing")
        assert (code, out) == (expected, "")
        assert sentence in err
        assert "Traceback" not in err


def test_inspect_reports_rope_memory_and_faults(copy: Path, call) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    config["rope_parameters"]["original_max_position_embeddings"] = 2048
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    code, out, _ = call("inspect", str(copy), "--context", "1M", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["rope"]["kind"] == "yarn"
    assert report["plan_context"] == 2**20
    assert report["kv_bytes_per_token"]["bf16"] == 2 * 2 * 2 * 16 * 2
    faults = " ".join(report["faults"])
    for part in ("YaRN reaches 8192 tokens but max_position_embeddings is 16384", "model_max_length 2048", "beta_fast"):
        assert part in faults
    code, out, _ = call("inspect", str(copy))
    assert code == 0
    assert "fault: YaRN" in out


def test_inspect_of_widths_that_int4_cannot_hold(tmp_path: Path, call) -> None:
    folder = write_tiny(
        tmp_path / "odd", hidden_size=48, intermediate_size=100, num_attention_heads=3, num_key_value_heads=1
    )
    code, out, _ = call("inspect", str(folder), "--json")
    report = json.loads(out)
    assert code == 0
    assert set(report["plans"]) == set(report["longest_context"]) == {"16-bit", "pro"}
    assert "there is no flash variant" in " ".join(report["faults"])


def test_generate_streams_an_answer(tiny: Path, tmp_path: Path, call) -> None:
    prompt = tmp_path / "p.txt"
    prompt.write_text("a long text about towers")
    code, out, err = call("generate", str(tiny), "--prompt-file", str(prompt), "--prompt", "why?", "--max-tokens", "5")
    assert code == 0
    assert out.endswith("\n")
    assert "prefill of" in err
    again = call("generate", str(tiny), "--prompt-file", str(prompt), "--prompt", "why?", "--max-tokens", "5")
    assert again[1] == out


def _poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def _index(folder: Path, extra: dict[str, str]) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | extra}))


def _config(folder: Path, change: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


FAULTS = {
    "missing shard": (lambda f: _index(f, {"extra.weight": "model-2.safetensors"}), "model-2.safetensors is missing"),
    "absent tensor": (lambda f: _index(f, {"extra.weight": "model.safetensors"}), "extra.weight"),
    "truncated": (_truncate, "truncated"),
    "architecture": (lambda f: _config(f, {"architectures": ["Gpt"]}), "'Gpt'"),
    "rope type": (lambda f: _config(f, {"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}}), "'odd'"),
    "non-finite": (_poison, "model.layers.0.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", ["extend", "quantize", "export"])
def test_bad_sources_are_refused_in_a_sentence(fault: str, verb: str, copy: Path, tmp_path: Path, call) -> None:
    damage, message = FAULTS[fault]
    damage(copy)
    out = tmp_path / "out"
    options = {"extend": ["--context", "8k"], "quantize": ["--samples", "0", "--attention", "dense"], "export": []}
    code, _, err = call(verb, str(copy), "-o", str(out), *options[verb])
    sentences = [line for line in err.splitlines() if line.startswith("lcconvert: ")]
    assert code == 2
    assert len(sentences) == 1
    assert message in sentences[0]
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_bad_requests_are_refused_in_a_sentence(copy: Path, tmp_path: Path, call) -> None:
    out = str(tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "note").write_text("mine")
    cases = [
        (["extend", str(copy), "-o", out, "--context", "1k"], "2048"),
        (["extend", str(copy), "-o", out, "--context", "8k", "--method", "magic"], "'magic'"),
        (["extend", str(copy), "-o", str(full), "--context", "8k"], "full"),
        (["quantize", str(copy), "-o", out, "--group-size", "48", "--samples", "0", "--attention", "dense"], "48"),
        (["quantize", str(copy), "-o", out, "--variant", "turbo"], "'turbo'"),
        (["export", str(copy), "-o", out, "--format", "tflite"], "'tflite'"),
        (["inspect", str(tmp_path / "nowhere" / "x")], "nowhere"),
        (["inspect", str(copy), "--context", "lots"], "'lots'"),
        (["run", "unknown", "-o", out], "'unknown'"),
        (["generate", str(copy)], "no prompt"),
        (["serve", str(copy), "--port", "99999"], "99999"),
    ]
    for args, part in cases:
        code, _, err = call(*args)
        assert code == 2, args
        assert part in err, args
        assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "full"]
    assert (full / "note").read_text() == "mine"


def test_long_context_needs_a_tokenizer(copy: Path, tmp_path: Path, call) -> None:
    (copy / "tokenizer.json").unlink()
    code, _, err = call("extend", str(copy), "-o", str(tmp_path / "out"), "--context", "1M")
    assert code == 2
    assert "tokenizer" in err
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_port_in_use_is_told_before_the_model_loads(copy: Path, call) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (copy / "model.safetensors").unlink()  # reading it would be another error
        code, _, err = call("serve", str(copy), "--port", str(port))
    assert code == 2
    assert f"port {port}" in err


def test_a_tiny_model_goes_through_every_file_verb(tiny: Path, tmp_path: Path, call) -> None:
    """extend -> quantize (both) -> export: each reads what the one before wrote."""
    long = tmp_path / "long"
    assert call("extend", str(tiny), "-o", str(long), "--context", "8k")[0] == 0
    for variant in ("flash", "pro"):
        out = tmp_path / variant
        assert (
            call("quantize", str(long), "-o", str(out), "--variant", variant, "--samples", "1", "--length", "512")[0]
            == 0
        )
        assert call("generate", str(out), "--prompt", "hi", "--max-tokens", "3")[0] == 0
    assert call("export", str(tmp_path / "flash"), "-o", str(tmp_path / "onnx"), "--format", "onnx")[0] == 0
    assert (tmp_path / "onnx" / "model.onnx").is_file()
