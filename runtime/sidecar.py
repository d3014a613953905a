"""`lcconvert.json`: what an artifact needs beyond the HF files. KV scheme, attention policy, claims, provenance.

It stands apart from `quantization_config` because no other engine has a place for a 4-bit KV scheme or a block-sparse
policy, and unknown keys there can make an engine refuse the checkpoint.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.source import TensorSource

NAME = "lcconvert.json"
PAGE: Final = 128  # tokens a KV page holds; also the key-block size of the sparse prefill

Scheme = Literal["bf16", "fp8", "int4", "k8v4"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KVConfig(_Frozen):
    """How full pages are stored. `bf16` means unquantized: the compute dtype, which is float32 on a CPU."""

    scheme: Scheme = "bf16"
    page_size: Literal[128] = PAGE


class AttentionPolicy(_Frozen):
    """Which key blocks a prefill query tile attends to; decode is dense over the quantized pages.

    hybrid: `sink_blocks` first blocks, `local_blocks` up to the tile's own, and every block whose pooled score lies
    within ln(alpha) of the row's best; queries from `dense_last` tokens before the end attend to all. `alpha` is one
    number or [layer][query head]; smaller keeps more.
    """

    kind: Literal["dense", "hybrid"] = "dense"
    sink_blocks: int = Field(default=2, ge=1)
    local_blocks: int = Field(default=4, ge=1)
    dense_last: int = Field(default=512, ge=0)
    min_blocks: int = Field(default=0, ge=0)
    max_blocks: int | None = Field(default=None, ge=1)
    alpha: float | list[list[float]] = 0.01

    def alpha_of(self, layer: int, heads: int) -> list[float]:
        return [self.alpha] * heads if isinstance(self.alpha, float) else self.alpha[layer]


class ContextClaim(_Frozen):
    """Tokens: `configured` is what the RoPE fields reach, `validated` the longest length that passed `validate`."""

    configured: int = Field(ge=1)
    validated: int | None = None


class Sidecar(_Frozen):
    format: Literal[1] = 1
    variant: Literal["source", "extended", "pro", "flash"] = "source"
    kv: KVConfig = KVConfig()
    attention: AttentionPolicy = AttentionPolicy()
    context: ContextClaim
    provenance: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, source: TensorSource) -> Sidecar:
        """The sidecar of `source`, or plain defaults when it has none; UserError names a field that is wrong."""
        raw = source.files.get(NAME)
        if raw is None:
            return cls(context=ContextClaim(configured=source.config["max_position_embeddings"]))
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{source.name}/{NAME}: {field}: {first['msg']}; convert the checkpoint again") from None

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=2).encode() + b"\n"
