"""A complete validation report with known numbers, for tests of what reads reports."""

from __future__ import annotations

from lcconvert.convert.results import (
    Agreement,
    AgreementBucket,
    Artifact,
    Claim,
    ContextPoint,
    Control,
    Cost,
    NeedleLength,
    Needles,
    Perplexity,
    Report,
    Setup,
    Text,
)


def tiny_report(sha256: str, *, validated: int | None = 4096) -> Report:
    text = Text(name="jargon", sha256="0" * 64, characters=1000)
    bucket = AgreementBucket(start=0, end=512, mean_kl=0.0312, p99_kl=0.25, top1=0.9531, nll=2.0, reference_nll=1.97)
    lengths = [
        NeedleLength(
            length=length, state="measured", n=5, contains=strict, strict=strict, low=0.4, high=1.0,
            relative=strict / 5, repetition=1.0, overlaps_perplexity=False,
        )
        for length, strict in ((1024, 5), (4096, 4))
    ]  # fmt: skip
    return Report(
        created="2026-01-02T03:04:05Z",
        seconds=12.5,
        artifact=Artifact(
            name="demo", sha256=sha256, bytes=98_765_432, variant="flash", family="llama", parameters=1000,
            native_context=2048, configured_context=8192,
        ),
        setup=Setup(
            device="cpu", dtype="float32", threads=2, kv_scheme="int4", attention="hybrid", versions={"torch": "2"}
        ),
        config={},
        haystack=text,
        needles=[Needles(
            wording="heldout", version="1", protocol="shared", prompt="chat", depths=[0.0, 0.5, 1.0], samples=1,
            max_new_tokens=16,
            cells=[], by_length=lengths, control=Control(n=3, silent=2, invented=1, other=0, guessed=0),
        )],
        perplexity=Perplexity(
            text=text, targets=256, plain=None, by_position=[],
            by_context=[
                ContextPoint(context=512, state="measured", nll=2.5, ppl=12.1825, change=None),
                ContextPoint(context=2048, state="out of memory", nll=None, ppl=None, change=None),
            ],
        ),
        agreement=Agreement(
            reference="base", reference_sha256="1" * 64, tokens=512, prefill=bucket, by_position=[bucket], decode=None,
            ppl_increase=0.0307,
        ),
        cost=[Cost(length=4096, state="measured", prefill_seconds=8.25, decode_tokens_per_second=21.5)],
        kv_bytes_per_token=6144.0,
        claim=Claim(validated=validated, short_length=1024, short_score=1.0, rule="85% of the score at 1,024 tokens"),
    )  # fmt: skip
