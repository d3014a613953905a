"""The schema of `report.json`: everything a page, a picture, a table or a model card may say about an artifact.

The HTML report, the plots, the comparison table and the card read nothing but this, so a number that is not here cannot
be shown, and one that is shown can be checked. Seconds, bytes and tokens are plain numbers in those units; shares are
0..1; a NaN never appears (`None` means "not measured").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lcconvert.convert.validate_config import Wording
from lcconvert.runtime.errors import UserError

REPORT = "report.json"

# "not run" is what a time limit left out; "out of memory" is a finding, not a crash
CellState = Literal["measured", "out of memory", "not run"]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Artifact(_Row):
    name: str
    sha256: str  # convert/hashing.py: config.json and weights
    bytes: int  # weights on disk
    variant: str
    family: str
    parameters: int
    native_context: int  # the window before any extension
    configured_context: int


class Setup(_Row):
    device: str
    dtype: str
    threads: int | None  # CPU only
    kv_scheme: str
    attention: str
    endpoint: str | None = None  # model of the server that answered instead
    versions: dict[str, str]


class Text(_Row):
    name: str
    sha256: str
    characters: int


class NeedleCell(_Row):
    """One depth at one length. `contains` and `strict` count answers out of `n` by the rules of scoring.py."""

    length: int
    depth: float
    state: CellState
    n: int = 0
    contains: float = 0
    strict: int = 0
    wrong: int = 0
    empty: int = 0
    hit_cap: int = 0
    error: int = 0
    low: float = 0.0  # 95% Wilson interval of strict / n
    high: float = 1.0


class NeedleLength(_Row):
    """All depths of one length together; `relative` is strict / n over that of the shortest length."""

    length: int
    state: CellState
    n: int
    contains: float
    strict: int
    low: float
    high: float
    relative: float | None
    repetition: float  # 1.0: no sentence of the haystack was used twice
    overlaps_perplexity: bool


class Control(_Row):
    """Questions about a key that is not in the text. Any number is an invention; `other` counts answers that gave the
    value of a needle that was asked about under a different key, `guessed` those that gave the unplanted value."""

    n: int
    silent: int
    invented: int
    other: int
    guessed: int


class Needles(_Row):
    """One wording (needle_wordings.py). Shared haystacks hold the needles of "heldout" and "multikey" together."""

    wording: Wording
    version: str  # of the templates, part of every sample's key
    protocol: Literal["shared", "single"]
    prompt: Literal["chat", "completion"]
    depths: list[float]
    samples: int
    max_new_tokens: int
    cells: list[NeedleCell]
    by_length: list[NeedleLength]
    control: Control


class Third(_Row):
    """The samples whose planted answer lies in one third of the text: where a model loses things."""

    n: int
    strict: int


class TaskCell(_Row):
    """One task at one length. `score` is the mean by the task's metric, `strict` counts the samples that are right by
    the rule of scoring.py; `twin_kept` of the `twin_found` samples that were right at the
    shortest length are right here. `thirds`: beginning, middle, end, for tasks with one planted answer."""

    task: str
    length: int
    state: CellState
    n: int = 0
    score: float | None = None
    strict: int = 0
    wrong: int = 0
    empty: int = 0
    hit_cap: int = 0
    error: int = 0
    low: float = 0.0  # 95% Wilson interval of strict / n
    high: float = 1.0
    relative: float | None = None
    twin_found: int = 0
    twin_kept: int = 0
    thirds: list[Third]
    repetition: float = 1.0


class TaskControl(_Row):
    """Questions about what is not in the text: no answer, a made-up one, or that of the planted question."""

    n: int
    silent: int
    invented: int
    other: int
    error: int = 0

    @classmethod
    def outcomes(cls) -> tuple[str, ...]:
        return ("silent", "invented", "other", "error")


class Tasks(_Row):
    """`effective`: the longest length that keeps the share `keep` of the task's own score at the shortest one."""

    wording: str
    prompt: Literal["chat", "completion"]
    samples: int
    metrics: dict[str, str]
    max_new_tokens: dict[str, int]
    source_tree: str | None
    qa_file: str | None
    keep: float
    cells: list[TaskCell]
    effective: dict[str, int | None]
    control: TaskControl


class ContextPoint(_Row):
    """The same target tokens predicted with `context` tokens of window, targets included."""

    context: int
    state: CellState
    nll: float | None
    ppl: float | None
    change: float | None  # ppl over that of the shortest context, minus 1
    key_ppl: float | None = None  # of the key tokens alone: LongPPL


class PositionBucket(_Row):
    """Targets at positions start..end-1 of one forward; text difficulty differs between buckets."""

    start: int
    end: int
    nll: float
    ppl: float


class PlainPerplexity(_Row):
    context: int
    nll: float
    ppl: float


class Perplexity(_Row):
    text: Text
    targets: int
    key_window: int | None = None  # where key tokens were told from the others
    key_tokens: int = 0
    plain: PlainPerplexity | None
    by_context: list[ContextPoint]
    by_position: list[PositionBucket]


class AgreementBucket(_Row):
    """Positions start..end-1, or all of one path. KL is KL(reference || artifact) in nats."""

    start: int
    end: int
    mean_kl: float
    p99_kl: float
    top1: float
    nll: float
    reference_nll: float


class Agreement(_Row):
    reference: str
    reference_sha256: str
    tokens: int
    prefill: AgreementBucket
    by_position: list[AgreementBucket]
    decode: AgreementBucket | None  # through the quantized KV cache, token by token
    ppl_increase: float  # artifact over reference on the same tokens, minus 1


class Cost(_Row):
    """One context of `length` tokens. Peak is device memory on a GPU, resident memory of the process on a CPU."""

    length: int
    state: CellState
    prefill_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_bytes: int | None = None
    kv_bytes_per_token: float | None = None


class Claim(_Row):
    """`validated` is None when no length earns the claim; `rule` says in words what was asked.

    `by_perplexity` is what perplexity alone would say, by `perplexity_rule`: no claim, but shown beside it.
    """

    validated: int | None
    short_length: int | None
    short_score: float | None
    rule: str
    by_perplexity: int | None = None
    perplexity_rule: str = ""


class CurvePoint(_Row):
    """Share right by the strict rule with its 95% interval."""

    length: int
    share: float
    low: float
    high: float
    n: int


class Curve(_Row):
    name: str
    points: list[CurvePoint]


class Beside(_Row):
    """Another report, as far as it is drawn beside this one (convert/curves.py)."""

    label: str
    name: str
    sha256: str
    attention: str
    curves: list[Curve]
    cost: list[Cost]


class Check(_Row):
    name: str
    limit: float
    value: float | None
    passed: bool


class Report(_Row):
    format: Literal[2] = 2
    created: str  # ISO 8601, UTC
    seconds: float
    artifact: Artifact
    setup: Setup
    config: dict[str, Any]
    haystack: Text
    needles: list[Needles] = Field(default_factory=list)  # by wording; the claim rests on the first
    tasks: Tasks | None = None
    perplexity: Perplexity | None
    agreement: Agreement | None
    cost: list[Cost]
    kv_bytes_per_token: float  # by formula, for whole pages; `cost` has what was allocated
    claim: Claim
    checks: list[Check] = Field(default_factory=list)
    beside: list[Beside] = Field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Reads a report.json (or the folder that holds one); UserError names the file and the field at fault."""
        file = path / REPORT if path.is_dir() else path
        try:
            return cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); run `lcconvert validate` first") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{file}: {field}: {first['msg']}; run `lcconvert validate` again") from None
