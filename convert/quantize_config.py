"""The settings of `quantize`, complete by themselves: what a recipe holds and what the command line fills in.

Kept apart from the work so that `--help` and recipe checking do not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lcconvert.convert.reduce_config import ReduceConfig
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.units import parse_count

Tokens = Annotated[int, BeforeValidator(lambda value: parse_count(value, "token count")), Field(ge=1)]
Bytes = Annotated[int, BeforeValidator(lambda value: parse_count(value, "byte size")), Field(ge=1)]
Scheme = Literal["bf16", "fp8", "int4", "k8v4"]


class Gate(BaseModel):
    """What quantization may cost against the 16-bit source on held-out text; None asks nothing.

    lengths: tokens of text, each measured by itself. text: as `validate` reads it; None is the bundled text, of which
    calibration reads another part. ppl_max_increase (a share), kl_max (mean nats a token) and top1_min are of the
    artifact as it is served, kv_kl_max of its KV cache alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lengths: Annotated[tuple[Annotated[Tokens, Field(ge=512)], ...], Field(min_length=1)] = (2048,)
    text: Path | None = None
    ppl_max_increase: float | None = None
    kl_max: float | None = None
    kv_kl_max: float | None = None
    top1_min: float | None = None


# What the variants are held to where nothing else is said.
USUAL_GATES = {
    "pro": Gate.model_validate({"ppl_max_increase": 0.01, "kl_max": 0.01}),
    "flash": Gate.model_validate({"ppl_max_increase": 0.09, "kv_kl_max": 0.02}),
}


class QuantizeConfig(BaseModel):
    """variant: "flash" has int4 weights, "pro" fp8 weights.
    group_size: inputs that share an int4 scale; None takes the largest of 128, 64, 32 that divides every layer.
    method: "gptq" compensates rounding errors from calibration, "rtn" only rounds.
    kv: how the KV cache is stored; None: int4 for flash, fp8 for pro.
    attention: prefill policy; None: hybrid for flash, dense for pro.
    attention_mass: share of the exact attention that each head of the hybrid policy keeps on calibration text.
    calibration: text files, folders, .jsonl or .parquet; empty is the bundled public-domain text.
    samples, length: calibration windows and their tokens; samples 0 quantizes without data (and then by "rtn").
    damp: share of the mean diagonal that GPTQ adds to its matrix, raised until it factorizes.
    ignore: linear layers left in 16 bit, by name or `re:` pattern; embeddings and head always are.
    wide: linear layers of flash stored in fp8 instead of int4, likewise. Engines that fuse q, k and v, or gate and up,
    want such neighbours in one format.
    reduce: first take out layers and heal what is left; the 16-bit result is kept beside the artifact, as NAME-reduced,
    and is what the gate compares with.
    gate: measure the loss against the source when all is written; a missed bar is an error that leaves the artifact.
    inputs: what fp8 layers, and int4 layers on a GPU that has fp8, multiply with in prefill: rows rounded to "fp8" by
    token, or as they are, in "16-bit": slower, and nearer to the source, which small models need.
    bits_per_weight: flash: the mean over the linear layers that are quantized, scales included, up to which the parts
    that lose most are stored in fp8 too; None adds none to `wide`. Measured on calibration text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Literal["flash", "pro"] = "flash"
    group_size: Annotated[int, Field(ge=8)] | None = None
    method: Literal["gptq", "rtn"] = "gptq"
    kv: Scheme | None = None
    attention: Literal["dense", "hybrid"] | None = None
    attention_mass: float = Field(0.95, gt=0.0, lt=1.0)
    calibration: tuple[str, ...] = ()
    samples: int = Field(4, ge=0)
    length: Annotated[Tokens, Field(ge=128)] = 2048
    damp: float = Field(0.05, gt=0.0, le=1.0)
    ignore: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    inputs: Literal["fp8", "16-bit"] = "fp8"
    bits_per_weight: float | None = Field(None, gt=4.0, lt=8.0)
    reduce: ReduceConfig | None = None
    gate: Gate | None = None
    seed: int = Field(0, ge=0)
    device: str | None = None
    max_shard: Bytes = 2 * 10**9

    @model_validator(mode="after")
    def _consistent(self) -> QuantizeConfig:
        if self.bits_per_weight is not None and self.variant != "flash":
            raise UserError(f"bits_per_weight is {self.bits_per_weight:g} but variant is {self.variant}; leave it out")
        if self.bits_per_weight is not None and not self.samples:
            raise UserError("bits_per_weight is kept by what layers lose on text but samples is 0; give samples >= 1")
        return self

    @property
    def kv_scheme(self) -> Scheme:
        """UserError when the scheme needs calibrated scales and there is nothing to calibrate on."""
        scheme = self.kv or ("int4" if self.variant == "flash" else "fp8")
        if scheme in ("fp8", "k8v4") and not self.samples:
            raise UserError(
                f"samples is 0 but KV scheme {scheme!r} needs scales calibrated on text; give samples >= 1, "
                "or kv int4 or bf16"
            )
        return scheme

    @property
    def attention_kind(self) -> Literal["dense", "hybrid"]:
        """UserError when the hybrid policy is wanted and there is nothing to calibrate it on."""
        kind = self.attention or ("hybrid" if self.variant == "flash" else "dense")
        if kind == "hybrid" and not self.samples:
            raise UserError(
                "samples is 0 but the hybrid attention policy is calibrated per head on text; give samples >= 1, "
                "or attention dense"
            )
        return kind
