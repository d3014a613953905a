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

POLICIES = ("dense", "hybrid", "hybrid-decode")
DECODE_SHARE = 0.04  # of the pages, where page-sparse decode is asked for by name

Scheme = Literal["bf16", "fp8", "int4", "k8v4"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KVConfig(_Frozen):
    """How full pages are stored. `bf16` means unquantized: the compute dtype, which is float32 on a CPU."""

    scheme: Scheme = "bf16"
    page_size: Literal[128] = PAGE


class AttentionPolicy(_Frozen):
    """Which key blocks a prefill query tile attends to, and which pages a decoded token does.

    hybrid: `sink_blocks` first blocks, `local_blocks` up to the tile's own, and every block whose score (against keys
    averaged over `pool` tokens) lies within ln(alpha) of the row's best; queries from `dense_last` tokens before the
    end attend to all. `alpha` is one number or [layer][query head]; smaller keeps more.

    Decode is dense over the quantized pages unless `decode_share` is set: then every KV head reads that share of its
    pages, the best by their bounds, at least `decode_pages` and always the `decode_newest` last ones.
    """

    kind: Literal["dense", "hybrid"] = "dense"
    sink_blocks: int = Field(default=2, ge=1)
    local_blocks: int = Field(default=4, ge=1)
    dense_last: int = Field(default=512, ge=0)
    min_blocks: int = Field(default=0, ge=0)
    max_blocks: int | None = Field(default=None, ge=1)
    alpha: float | list[list[float]] = 0.01
    pool: Literal[32, 64] = 32
    decode_share: float | None = Field(default=None, gt=0, le=1)
    decode_pages: int = Field(default=64, ge=1)
    decode_newest: int = Field(default=4, ge=1)

    def named(self, name: str) -> AttentionPolicy:
        """This policy as "dense", "hybrid" (sparse prefill) or "hybrid-decode" (page-sparse decode too)."""
        if name not in POLICIES:
            raise UserError(f"attention policy is {name!r}, expected {', '.join(POLICIES)}")
        kind = "dense" if name == "dense" else "hybrid"
        share = (self.decode_share or DECODE_SHARE) if name == "hybrid-decode" else None
        return self.model_copy(update={"kind": kind, "decode_share": share})

    def alpha_of(self, layer: int, heads: int) -> list[float]:
        return [self.alpha] * heads if isinstance(self.alpha, float) else self.alpha[layer]


class ContextClaim(_Frozen):
    """Tokens: `configured` is what the RoPE fields reach, `validated` the longest length that passed `validate`."""

    configured: int = Field(ge=1)
    validated: int | None = None


class Sidecar(_Frozen):
    """`prefill_gemm` is how layers with int4 weights multiply many rows: "fp8" expands weights and rounds activations
    to e4m3 where the GPU has it (elsewhere 16-bit is used); layers stored otherwise do as they are stored.

    `files` is the SHA-256 in hex of every file a conversion wrote, by its path in the folder, this one among them
    (less what may change in it); written last, when all of them are there."""

    format: Literal[1] = 1
    variant: Literal["source", "extended", "pro", "flash"] = "source"
    prefill_gemm: Literal["16-bit", "fp8"] = "16-bit"
    kv: KVConfig = KVConfig()
    attention: AttentionPolicy = AttentionPolicy()
    context: ContextClaim
    provenance: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def read(cls, source: TensorSource) -> Sidecar:
        """The sidecar of `source`, or plain defaults when it has none; UserError names a field that is wrong."""
        raw = source.files.get(NAME)
        if raw is None:
            return cls(context=ContextClaim(configured=source.config["max_position_embeddings"]))
        return cls.parse(raw, source.name)

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Sidecar:
        """The sidecar in `raw`, the file of the artifact `where`; UserError names a field that is wrong."""
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{where}/{NAME}: {field}: {first['msg']}; convert the checkpoint again") from None

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=2).encode() + b"\n"
