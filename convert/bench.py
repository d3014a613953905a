"""`lcconvert bench`: what a context costs on this machine, of an artifact or of a shape with random weights.

Random weights make the speed of a model measurable where its checkpoint is not: the tensors are packed as the variant
stores them and made on the device. Several contexts share one model and one KV pool, reserved for the longest. The
alternatives (dense PyTorch attention, transformers) run afterwards in the same process, when that model is gone.
"""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from lcconvert.convert.bench_compare import compare_sdpa, compare_transformers
from lcconvert.convert.bench_measure import measure_ceilings, measure_decode, measure_prefill, warm_up, ways_to_decode
from lcconvert.convert.bench_report import Ceilings, Compared, Decode, Growth, Model, Prefill, Report, WarmUp
from lcconvert.convert.bench_target import Target, load_target, random_target
from lcconvert.convert.bench_work import fixed_density_policy
from lcconvert.convert.claim import replace_file
from lcconvert.convert.cost import is_out_of_memory
from lcconvert.convert.shapes import read_shape
from lcconvert.runtime.errors import Interrupted, UserError
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.units import format_bytes, format_count

_DENSITY = 0.04
_COMPARE_CONTEXT = 2**17


class BenchConfig(BaseModel):
    """What to measure. `src` is an artifact, `kv` and `attention` replace its own settings; `shape` is a name or a
    folder with a config.json, of which `variant`, `policy` and `density` make the rest. Tokens and bytes are numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    src: str | None = None
    shape: str | None = None
    random_weights: bool = False
    variant: Literal["flash", "pro", "16-bit"] | None = None
    context: tuple[Annotated[int, Field(ge=1)], ...] = ()
    policy: Literal["dense", "hybrid", "hybrid-decode"] | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    decode: Annotated[int, Field(ge=0)] = 64
    gpu_memory: int | None = None
    compare: tuple[Literal["sdpa", "transformers"], ...] = ()
    compare_context: Annotated[int, Field(ge=1)] | None = None
    kv: str | None = None
    attention: str | None = None
    device: str | None = None

    @property
    def contexts(self) -> list[int]:
        """Shortest first; 4K for an artifact and 1M for a shape when none is given."""
        return sorted(set(self.context)) or [2**20 if self.shape else 2**12]

    @property
    def room(self) -> int:
        """Tokens of a sequence after its prompt: both ways to decode, and the page that fills up meanwhile."""
        return 2 * self.decode + PAGE

    @property
    def kind(self) -> str:
        """The policy of a shape: what `quantize` gives the variant, unless another one is asked for."""
        return self.policy or ("hybrid" if (self.variant or "flash") == "flash" else "dense")


@dataclass
class _Run:
    """What has been measured so far; the file is written anew as it grows, so that a late failure costs only itself."""

    config: BenchConfig
    device: torch.device
    out: Path | None
    ceilings: Ceilings | None
    model: Model
    warm_up: WarmUp | None = None
    prefill: list[Prefill] = field(default_factory=list)
    decode: list[Decode] = field(default_factory=list)
    compare: list[Compared] = field(default_factory=list)

    def report(self) -> Report:
        assert self.warm_up is not None
        return Report(
            lcconvert=_version("lcconvert") or "unknown",
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            torch=torch.__version__,
            triton=_version("triton"),
            arguments=self.config.model_dump(mode="json"),
            ceilings=self.ceilings,
            model=self.model,
            warm_up=self.warm_up,
            prefill=self.prefill,
            decode=self.decode,
            growth=_growth(self.prefill),
            compare=self.compare,
        )

    def save(self) -> None:
        if self.out is not None:
            replace_file(self.out, json.dumps(self.report().as_dict(), indent=2).encode() + b"\n")

    def kept(self) -> str:
        """What to say of the file when the run ends early."""
        return f"; {self.out} holds what was measured before" if self.out is not None and self.prefill else ""


def bench(config: BenchConfig, out: Path | None = None) -> Report:
    """Runs everything asked for and writes it to `out`.

    UserError before any work when the request makes no sense or cannot fit; later when memory runs out all the same.
    """
    _check(config)
    if out is not None:
        _check_writable(out)
    device = _device(config.device)
    shape = read_shape(config.shape) if config.shape else None
    if shape is not None:
        ModelSpec.from_config(shape)  # refuses what this decoder does not compute
    limits = measure_ceilings(device)
    with _gpu_share(device, config.gpu_memory):
        run = _measure(config, _target(config, shape, device), limits, out)
        _free(device)
        try:
            for method in dict.fromkeys(config.compare):
                assert shape is not None
                run.compare.append(_compared(config, method, shape, limits, device))
                run.save()
                _free(device)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted{run.kept()}") from None
    return run.report()


def _check(config: BenchConfig) -> None:
    """UserError for settings that do not belong together."""
    if config.src is not None and config.shape is not None:
        raise UserError(f"both an artifact ({config.src}) and --shape {config.shape} are given; give one of them")
    if config.src is None and config.shape is None:
        raise UserError("there is nothing to measure; give an artifact, or --shape NAME --random-weights")
    if config.src is not None:
        shape_only = ("random_weights", "variant", "policy", "density", "compare", "compare_context")
        if given := [name for name in shape_only if getattr(config, name)]:
            raise UserError(f"{_flag(given[0])} belongs to --shape; {config.src} has its own, leave it out")
        return
    if not config.random_weights:
        raise UserError(f"--shape {config.shape} names no weights; add --random-weights, or give an artifact instead")
    if given := [name for name in ("kv", "attention") if getattr(config, name)]:
        raise UserError(f"{_flag(given[0])} belongs to an artifact; a shape takes --variant and --policy")
    if config.kind == "hybrid-decode" and (config.variant or "flash") != "flash":
        raise UserError(
            f"--policy hybrid-decode chooses pages by the bounds of int4 keys, which --variant {config.variant} does "
            "not have; use --variant flash or --policy hybrid"
        )
    if config.density is not None and config.kind == "dense":
        raise UserError(f"--density is {config.density} but the policy is dense; add --policy hybrid or leave it out")
    if config.compare_context is not None and not config.compare:
        raise UserError("--compare-context is given without --compare; add --compare sdpa or --compare transformers")
    if "transformers" in config.compare and importlib.util.find_spec("transformers") is None:
        raise UserError("--compare transformers needs transformers, which is not installed; pip install transformers")


def _check_writable(out: Path) -> None:
    """UserError when the result could not be written to `out`, said before the run instead of after it."""
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; give another name")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out is {out}, whose folder does not exist; create it")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise UserError(f"--device is {name!r}, expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda but no NVIDIA GPU is usable here; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def _gpu_share(device: torch.device, limit: int | None) -> Iterator[None]:
    """Makes a GPU look as if it had `limit` bytes: PyTorch refuses to allocate more."""
    if device.type != "cuda" or limit is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if limit > total:
        raise UserError(f"--gpu-memory is {format_bytes(limit)}, this GPU has {format_bytes(total)}; give less")
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _target(config: BenchConfig, shape: dict[str, Any] | None, device: torch.device) -> Target:
    longest = config.contexts[-1]
    if shape is None:
        assert config.src is not None
        return load_target(
            config.src, longest, config.decode, kv=config.kv, attention=config.attention, device=device,
            gpu_bytes=config.gpu_memory,
        )  # fmt: skip
    return random_target(
        config.shape or "", shape, config.variant or "flash", _policy(config), longest + config.room, device=device,
        gpu_bytes=config.gpu_memory,
    )  # fmt: skip


def _policy(config: BenchConfig) -> AttentionPolicy:
    if config.kind == "dense":
        return AttentionPolicy()
    density = config.density or _DENSITY
    policy = fixed_density_policy(config.contexts[-1], density)
    return policy.model_copy(update={"decode_share": density}) if config.kind == "hybrid-decode" else policy


def _measure(config: BenchConfig, target: Target, limits: Ceilings | None, out: Path | None) -> _Run:
    """The model itself, every context; the model is gone when this returns."""
    engine = target.engine
    ways = ways_to_decode(engine) if config.decode else []
    run = _Run(config, engine.device, out, limits, _describe(target))
    context = config.contexts[-1]
    try:
        run.warm_up = warm_up(engine, [step for _, step in ways], context)
        for context in config.contexts:
            seq = engine.new_sequence()
            plan = target.plan if context == config.contexts[-1] else None
            run.prefill.append(measure_prefill(engine, seq, context, limits, fp8=target.fp8, plan=plan))
            for policy, step in ways:
                run.decode.append(measure_decode(engine, seq, context, step, policy, config.decode, limits))
            engine.free(seq)
            run.save()
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted{run.kept()}") from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{engine.name} ran out of memory at {format_count(context)} tokens, give a smaller --context{run.kept()}"
        ) from None
    return run


def _describe(target: Target) -> Model:
    engine = target.engine
    exclude = {"alpha"} if isinstance(engine.attention.alpha, list) else set()
    return Model(
        name=engine.name,
        parameters=engine.spec.parameters(),
        weight_bytes=engine.memory()["weights"],
        variant=target.variant,
        dtype=str(engine.dtype).removeprefix("torch."),
        gemm=engine.gemm,
        kv=engine.kv.scheme,
        kv_bytes_per_token=engine.kv_bytes_per_token(),
        policy=engine.attention.model_dump(mode="json", exclude=exclude),
    )


def _compared(
    config: BenchConfig, method: str, shape: dict[str, Any], limits: Ceilings | None, device: torch.device
) -> Compared:
    context, longest = config.compare_context or _COMPARE_CONTEXT, config.contexts[-1]
    if method == "sdpa":
        return compare_sdpa(shape, context, longest=longest, limits=limits, device=device, gpu_bytes=config.gpu_memory)
    return compare_transformers(shape, context, device=device)


def _free(device: torch.device) -> None:
    """Gives back what the last model held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _growth(rows: list[Prefill]) -> Growth | None:
    if len(rows) < 2:
        return None
    return Growth(tokens=rows[-1].context / rows[0].context, seconds=rows[-1].seconds / rows[0].seconds)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
