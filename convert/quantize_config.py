"""The settings of `quantize`, complete by themselves: what a recipe holds and what the command line fills in.

Kept apart from the work so that `--help` and recipe checking do not import torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.units import parse_count

Tokens = Annotated[int, BeforeValidator(lambda value: parse_count(value, "token count")), Field(ge=1)]
Bytes = Annotated[int, BeforeValidator(lambda value: parse_count(value, "byte size")), Field(ge=1)]
Scheme = Literal["bf16", "fp8", "int4", "k8v4"]


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
    seed: int = Field(0, ge=0)
    device: str | None = None
    max_shard: Bytes = 2 * 10**9

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
