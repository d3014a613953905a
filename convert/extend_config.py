"""The settings of `extend`, complete by themselves: what a recipe holds and what the command line fills in.

Kept apart from the work so that `--help` and recipe checking do not import torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.units import parse_count, parse_seconds

Method = Literal["linear", "ntk", "theta", "yarn", "longrope", "llama3"]
METHODS: tuple[str, ...] = get_args(Method)
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]
Tokens = Annotated[int, BeforeValidator(lambda value: parse_count(value, "token count")), Field(ge=1)]


REPLAY_TOKENS = 2048
_SHORTEST_TEXT = 1024  # facts, and room at the end for a question
REPLAY_ROW = 8 * REPLAY_TOKENS  # beside every update of a stage with questions


class Stage(BaseModel):
    """One stretch of training at one real length. Tokens per optimizer step: seq_len * batch_size * accumulate,
    on however many GPUs.

    lr: peak AdamW rate; it rises over `warmup` steps and falls to a tenth of itself by the stage's end (cosine).
    pose_chunks: most chunks a window is cut into to reach the context; 1 trains the real length only.
    contiguous_share: windows left uncut, so that short prompts stay as good as they were.
    retrieval_share: windows that are synthetic retrieval with loss on the answers; the others are plain text.
    replay_share: windows that are plain text in short pieces of at most REPLAY_TOKENS, each from position 0, whose loss
    is the divergence from the original model: they hold short prompts where they were, whatever the text is.
    questions: 0 trains on windows. Otherwise a step reads seq_len real tokens once, without gradient and by the policy
    `prefix_attention`, and trains on so many questions about facts in them, batch_size in an update; replay_share is
    then the weight of eight pieces of REPLAY_TOKENS beside them, and the settings of windows have no meaning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1)
    seq_len: Annotated[Tokens, Field(ge=256)] = 4096
    batch_size: int = Field(1, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0)
    warmup: int = Field(0, ge=0)
    pose_chunks: int = Field(8, ge=1, le=16)
    contiguous_share: float = Field(0.3, ge=0.3, le=1.0)
    retrieval_share: float = Field(0.5, ge=0.0, le=1.0)
    replay_share: float = Field(0.0, ge=0.0, le=1.0)
    questions: int = Field(0, ge=0)
    prefix_attention: Literal["dense", "hybrid"] = "hybrid"

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.retrieval_share + self.replay_share > 1.0:
            raise ValueError(
                f"retrieval_share {self.retrieval_share} and replay_share {self.replay_share} are more than all windows"
            )
        if self.questions and self.seq_len < _SHORTEST_TEXT:
            raise ValueError(
                f"seq_len is {self.seq_len} and questions are asked about a text of at least {_SHORTEST_TEXT} tokens; "
                "give a longer seq_len, or leave questions out"
            )
        return self

    @property
    def rows(self) -> int:
        return self.steps * (1 if self.questions else self.accumulate * self.batch_size)


class ExtendConfig(Stage):
    """`context` is the target in tokens ("1M"). Either the flat stage fields describe one stage, or `stages` several.

    method None: yarn without training, theta with it. factors: longrope's slow-down per rotary pair.
    attention_factor: what yarn and longrope multiply cos and sin by, instead of their papers' formulas; the formulas
    sharpen short prompts too, and cost perplexity there when little or nothing is trained.
    data: text files, folders, .jsonl with a "text" field, .parquet with a "text" column, any of them as .gz, or
    `module:NAME` for the source text of an installed Python module.
    upsample_long: documents of 16K characters and more are met this many times as often as shorter ones of their entry.
    skip_bad: pass over unreadable files and lines, and record them, instead of stopping.
    held_out: text files or folders that validation uses; a training document that shares a paragraph with them, or with
    the bundled haystack, is left out.
    max_time: seconds ("20m"): stages are shortened alike until training takes no longer, by speeds measured on an H100.
    lora_rank: 0 trains every weight; otherwise adapters of this rank on q, k, v and o, scaled by lora_alpha / lora_rank
    and merged at the end, and beside them the weights that `lora_train` names.
    streamed: layer by layer in tiles of `tile` tokens, with what waits for the backward pass in host memory where the
    GPU has no room; None: stages that do not fit otherwise.
    host_optimizer: float32 weights and moments live in host memory, the GPU holds weights and gradients in the
    precision of the forward pass; None: when nothing less makes all stages fit.
    dtype: what the forward pass computes in; weights that learn are float32 (see host_optimizer), the others have this
    precision, the weights written bfloat16.
    """

    context: Tokens
    method: Method | None = None
    factors: tuple[float, ...] | None = None
    attention_factor: Annotated[float | None, Field(gt=0)] = None
    data: tuple[str, ...] = ()
    upsample_long: float = Field(1.0, ge=1.0)
    skip_bad: bool = False
    held_out: tuple[str, ...] = ()
    steps: int = Field(0, ge=0)
    stages: tuple[Stage, ...] = ()
    seed: int = Field(0, ge=0)
    save_every: int = Field(50, ge=0, description="steps or two minutes between checkpoints; 0: none but when stopped")
    max_time: Seconds | None = None
    lora_rank: int = Field(0, ge=0)
    lora_alpha: float = Field(16.0, gt=0)
    lora_train: tuple[Literal["norms", "embeddings"], ...] = ("norms", "embeddings")
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = True
    streamed: bool | None = None
    tile: int = Field(8192, ge=64)
    host_optimizer: bool | None = None
    device: str | None = None
    dtype: Annotated[str | None, Field(pattern="^(float32|bfloat16)$")] = None

    @property
    def plan(self) -> tuple[Stage, ...]:
        """The stages to train, in order; empty when only the positions change."""
        if self.stages and self.steps:
            raise UserError(f"both steps ({self.steps}) and stages ({len(self.stages)}) are given; keep one of the two")
        if self.stages or not self.steps:
            return self.stages
        return (Stage(**{name: getattr(self, name) for name in Stage.model_fields}),)

    @property
    def resolved_method(self) -> Method:
        return self.method or ("theta" if self.plan else "yarn")

    def training_identity(self) -> dict[str, Any]:
        """Everything a half-finished training depends on; a resumed run must agree in all of it."""
        fixed = self.model_dump(
            mode="json", exclude={"save_every", "device", "gradient_checkpointing", "tile", "stages", "steps"}
        )
        return {
            **fixed,
            "method": self.resolved_method,
            "stages": [stage.model_dump(mode="json") for stage in self.plan],
        }
