"""From measurements to statements: the context an artifact may claim, and whether it passes the bars of a recipe.

The claim is relative to the model itself: the longest length up to which every tested length keeps 85% of the score at
the shortest one. RULER's fixed bar of 85.6 says nothing about a small model; and a model that misses half of its short
needles earns no claim, because 85% of nothing is nothing. A recipe may set other shares. What perplexity alone would
claim is said beside it, since the two differ just where a window ends.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from lcconvert.convert.results import Agreement, Check, Claim, Needles, Perplexity
from lcconvert.convert.validate_config import Thresholds
from lcconvert.runtime.sidecar import NAME, Sidecar
from lcconvert.runtime.source import FolderSource

_RISE = 0.05  # perplexity of the same targets over the best so far that still counts as no harm


def context_claim(sections: list[Needles], perplexity: Perplexity | None, bars: Thresholds) -> Claim:
    """The validated length, by the strict rule and the first of `sections`, with the words that say what it means."""
    rule = (
        f"every tested length up to it finds at least {bars.keep:.0%} of the needles found at the shortest one, "
        f"where at least {bars.short_min:.0%} are found"
    )
    by_perplexity = perplexity_claim(perplexity) if perplexity is not None else None
    perplexity_rule = (
        f"the perplexity of the same tokens rises by no more than {_RISE:.0%} as the context grows up to it"
    )
    rows = sections[0].by_length if sections else []
    measured = [row for row in rows if row.n]
    if not measured or measured[0] != rows[0]:
        return Claim(
            validated=None, short_length=None, short_score=None, rule=rule, by_perplexity=by_perplexity,
            perplexity_rule=perplexity_rule,
        )  # fmt: skip
    short = measured[0].strict / measured[0].n
    validated = longest_kept([(row.length, row.strict, row.n) for row in rows], bars)
    return Claim(
        validated=validated,
        short_length=measured[0].length,
        short_score=short,
        rule=rule,
        by_perplexity=by_perplexity,
        perplexity_rule=perplexity_rule,
    )


def perplexity_claim(perplexity: Perplexity) -> int | None:
    """The longest window up to which perplexity stays near the best of the shorter ones."""
    kept, best = None, math.inf
    for point in perplexity.by_context:
        if point.ppl is None or point.ppl > (1 + _RISE) * best:
            break
        kept, best = point.context, min(best, point.ppl)
    return kept


def longest_kept(rows: list[tuple[int, int, int]], bars: Thresholds) -> int | None:
    """The longest length up to which `keep` of the first length's score is kept; rows are (length, right, asked)."""
    _, right, asked = rows[0]
    short = right / asked if asked else 0.0
    kept = None
    if short >= bars.short_min:
        for length, right, asked in rows:
            if not asked or right / asked < bars.keep * short:
                break
            kept = length
    return kept


def checks(bars: Thresholds, claim: Claim, needles: list[Needles], agreement: Agreement | None) -> list[Check]:
    """One row per bar that is set; what could not be measured does not pass."""
    rows = []
    if bars.needles_min is not None:
        # a length that ran out of memory or time is a length at which nothing was found
        lengths = needles[0].by_length if needles else []
        worst = min((row.strict / row.n if row.n else 0.0 for row in lengths), default=None)
        passed = worst is not None and worst >= bars.needles_min
        rows.append(Check(name="needles_min", limit=bars.needles_min, value=worst, passed=passed))
    if bars.context_min is not None:
        reached = claim.validated
        passed = reached is not None and reached >= bars.context_min
        rows.append(Check(name="context_min", limit=bars.context_min, value=reached, passed=passed))
    increase = agreement.ppl_increase if agreement is not None else None
    kl = agreement.prefill.mean_kl if agreement is not None else None
    top1 = agreement.prefill.top1 if agreement is not None else None
    for name, limit, value in (("ppl_max_increase", bars.ppl_max_increase, increase), ("kl_max", bars.kl_max, kl)):
        if limit is not None:
            rows.append(Check(name=name, limit=limit, value=value, passed=value is not None and value <= limit))
    if bars.top1_min is not None:
        passed = top1 is not None and top1 >= bars.top1_min
        rows.append(Check(name="top1_min", limit=bars.top1_min, value=top1, passed=passed))
    return rows


def write_claim(folder: Path, claim: Claim, tested: list[int]) -> None:
    """Puts the validated length into the artifact's lcconvert.json, if it has one, in one step.

    A run over short lengths only does not take back a longer claim that it never tested.
    """
    path = folder / NAME
    if not tested or not path.is_file():
        return
    sidecar = Sidecar.read(FolderSource(folder))
    validated, before = claim.validated, sidecar.context.validated
    if before is not None and validated == max(tested) and before > validated:
        return
    context = sidecar.context.model_copy(update={"validated": validated})
    replace_file(path, sidecar.model_copy(update={"context": context}).to_bytes())


def replace_file(path: Path, content: bytes) -> None:
    """Writes `content` so that a reader sees the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
