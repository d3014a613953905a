"""The settings of `validate`, complete by themselves: what a recipe holds and what the command line fills in.

Kept apart from the work so that `--help` and recipe checking do not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.units import parse_count, parse_seconds

Tokens = Annotated[int, BeforeValidator(lambda value: parse_count(value, "token count")), Field(ge=1)]
TaskName = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa", "kv", "graphwalks", "copy", "mrcr", "nolima",
    "code_defines", "code_callers",
]  # fmt: skip
Wording = Literal["heldout", "training", "multikey"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _even_depths(value: Any) -> Any:
    """A lone whole number above 1 stands for that many depths, each in the middle of its share of the text."""
    items = value if isinstance(value, (tuple, list)) else (value,)
    if len(items) == 1 and str(items[0]).isdecimal() and (count := int(items[0])) > 1:
        return tuple(round((i + 0.5) / count, 6) for i in range(count))
    return items


class Thresholds(BaseModel):
    """Bars that decide the exit code, checked after the report is written; None asks nothing.

    keep, short_min: what a validated length must keep of the score at the shortest one, and what that must be at least;
    they decide the context written into the artifact, and how far a task counts as kept.
    context_min: the length that must be validated.
    needles_min: share of all needles found by the strict rule, at every length.
    ppl_max_increase, kl_max (mean, nats) and top1_min compare with the reference, so they need `against`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: Share = 0.85
    short_min: Share = 0.5
    context_min: Tokens | None = None
    needles_min: Share | None = None
    ppl_max_increase: float | None = None
    kl_max: float | None = None
    top1_min: Share | None = None


class ValidateConfig(BaseModel):
    """lengths: contexts in tokens of needles and tasks, reserved output included; empty asks neither.
    depths: 0 is right after the instruction, 1 right before the question; 20 means twenty even ones. samples: needle
    haystacks per length; 0 asks no needles.
    wordings: "heldout" sentences, "multikey" (the same, each with four near distractors, in the same haystack), and
    "training" (those of training, with keys it did not use, in a haystack of their own). The claim rests on the first.
    protocol: "shared" plants all depths in one haystack and prefills it once; "single" uses one haystack per needle.
    max_new_tokens: output reserved and allowed per answer.
    perplexity_context: the longest window; 512, 1K, 2K, ... below it are measured too; None measures no perplexity.
    perplexity_targets: the last tokens of the text, the same in every window.
    perplexity_text, haystack: a text file or folder; None is the bundled public-domain text.
    attention: "dense", "hybrid" or "hybrid-decode" instead of the artifact's own policy.
    against: a reference checkpoint to compare with on `agreement_tokens` tokens, `decode_tokens` of them decoded;
    `against_attention` is its policy, so that an artifact can be compared with itself read densely.
    beside: report folders of other runs, such as those of the source, whose scores and costs are drawn beside these.
    max_time: seconds ("12m") in which the run should end: no needle or task context is started that would take longer,
    by a cost model fitted to what was measured so far; what is left out is said.
    tasks: what else is asked at every length, `task_samples` times: RULER's eleven synthetic tasks; qa, about the
    documents of `qa_file`; kv (key-value lookup by position); graphwalks; copy (of repeated words); mrcr (which of
    several answers to one request); nolima (no word in common); and code_defines and code_callers, about the Python
    files of the folder `source_tree`.
    qa_file: JSON Lines of {"question", "answers", "text"}.
    prompt_cache: a folder that keeps built prompts for other runs with the same tokenizer.
    endpoint: the URL of an OpenAI-compatible server that answers the tasks instead of the checkpoint, which then
    only gives tokenizer and chat template; nothing but tasks is measured. endpoint_api: "completions" sends token ids,
    "chat" messages; endpoint_model: None takes the first one listed. Its key is read from LCCONVERT_API_KEY.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lengths: tuple[Tokens, ...] = (1024, 2048, 4096)
    depths: Annotated[tuple[Share, ...], BeforeValidator(_even_depths), Field(min_length=1)] = (0, 0.25, 0.5, 0.75, 1)
    wordings: Annotated[tuple[Wording, ...], Field(min_length=1)] = ("heldout",)
    samples: int = Field(1, ge=0)
    protocol: Literal["shared", "single"] = "shared"
    max_new_tokens: int = Field(24, ge=8)
    perplexity_context: Annotated[Tokens, Field(ge=512)] | None = 2048
    perplexity_targets: int = Field(256, ge=2, le=384)
    perplexity_text: Path | None = None
    haystack: Path | None = None
    attention: Literal["dense", "hybrid", "hybrid-decode"] | None = None
    against: str | None = None
    against_attention: Literal["dense", "hybrid", "hybrid-decode"] | None = None
    agreement_tokens: Annotated[Tokens, Field(ge=128)] = 2048
    decode_tokens: int = Field(64, ge=0, le=96)
    tasks: tuple[TaskName, ...] = ()
    task_samples: int = Field(5, ge=1)
    source_tree: Path | None = None
    qa_file: Path | None = None
    prompt_cache: Path | None = None
    endpoint: str | None = None
    endpoint_api: Literal["completions", "chat"] = "completions"
    endpoint_model: str | None = None
    beside: tuple[Path, ...] = ()
    seed: int = 0
    device: str | None = None
    max_time: Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)] | None = None
    thresholds: Thresholds = Thresholds()

    @model_validator(mode="after")
    def _consistent(self) -> ValidateConfig:
        for name in ("lengths", "depths"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise UserError(f"{name} is {list(values)}, expected rising values without repetition; reorder them")
        for name in ("tasks", "wordings"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{name} is {list(getattr(self, name))}, expected each once; remove the repetition")
        if self.tasks and not self.lengths:
            raise UserError(f"tasks is {list(self.tasks)} but lengths is empty; give lengths")
        if (code := [name for name in self.tasks if name.startswith("code_")]) and self.source_tree is None:
            raise UserError(f"the task {code[0]} asks about Python files; give their folder as source_tree")
        if "qa" in self.tasks and self.qa_file is None:
            raise UserError("the task qa asks the questions of a file; give it as qa_file")
        if self.endpoint is not None and (not self.tasks or self.against is not None):
            raise UserError("an endpoint answers tasks and nothing else; give tasks, and no `against`")
        if not (self.asks_needles or self.tasks) and self.perplexity_context is None and self.against is None:
            raise UserError("nothing is to be measured; give lengths, tasks, perplexity_context or against")
        bars = self.thresholds
        if self.against is None and (bars.ppl_max_increase, bars.kl_max, bars.top1_min) != (None, None, None):
            raise UserError("thresholds on perplexity increase, KL or top-1 need a reference; set `against`")
        for name in ("needles_min", "context_min"):
            if not self.asks_needles and getattr(bars, name) is not None:
                raise UserError(f"threshold {name} is set but no needles are asked; give lengths and samples")
        return self

    @property
    def asks_tasks(self) -> bool:
        return bool(self.tasks and self.lengths)

    @property
    def asks_needles(self) -> bool:
        return bool(self.lengths) and self.samples > 0 and self.endpoint is None
