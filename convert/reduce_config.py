"""The settings of depth reduction, apart from the work so that `--help` and recipe checking do not import torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from lcconvert.convert.extend_config import Seconds, Stage

# Most rows are compared with the whole model; the retrieval among them keeps what finds things in long contexts.
HEALING = Stage.model_validate(
    {"steps": 2000, "seq_len": 8192, "batch_size": 8, "lr": 4e-4, "warmup": 40, "replay_share": 0.8,
     "retrieval_share": 0.2}
)  # fmt: skip


class ReduceConfig(BaseModel):
    """share: of the layers that go. data: text to heal on, as `extend` reads it. stages: how it is healed, cut to
    `max_time` (seconds or "10m") on a GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(gt=0.0, lt=1.0)
    data: tuple[str, ...] = Field(min_length=1)
    stages: tuple[Stage, ...] = Field((HEALING,), min_length=1)
    max_time: Seconds | None = 600.0
    seed: int = Field(0, ge=0)
