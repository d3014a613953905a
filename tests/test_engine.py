"""The engine over every KV scheme and policy, against dense attention on the exact cache; and its life cycle."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from lcconvert.runtime.answer import _cut_at_stop
from lcconvert.runtime.engine import Cancelled, ContextExceeded, Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.kv_cache import PagePool
from lcconvert.runtime.sampler import SamplingParams, sample
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy, KVConfig
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec

IDS = torch.randint(4, 320, (900,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose fp8 scales differ between K and V, between heads and from 1."""
    from safetensors.torch import load_file, save_file

    path = write_tiny(tmp_path_factory.mktemp("tiny"))
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([0.011, 0.023])
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([0.004, 0.007])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def load(folder: Path, scheme: str = "bf16", policy: AttentionPolicy | None = None) -> Engine:
    return Engine.load(FolderSource(folder), device="cpu", kv=KVConfig(scheme=scheme), attention=policy)


def run(engine: Engine, prefill: int, decode: int) -> torch.Tensor:
    """Logits after a prefill and after each decoded token, [1 + decode, V]."""
    seq = engine.new_sequence()
    rows = [engine.prefill(seq, IDS[:prefill])]
    rows += [engine.decode(seq, token) for token in IDS[prefill : prefill + decode]]
    return torch.stack(rows)


@pytest.mark.parametrize(("scheme", "tolerance"), [("fp8", 0.05), ("int4", 0.25), ("k8v4", 0.15)])
def test_quantized_cache_stays_close_and_prefill_is_exact(folder: Path, scheme: str, tolerance: float) -> None:
    exact, low = run(load(folder), 700, 80), run(load(folder, scheme), 700, 80)
    assert (exact[0] - low[0]).abs().max() <= 1e-5  # a prefill from nothing never sees the quantized pages
    error = (exact[1:] - low[1:]).norm() / exact[1:].norm()
    assert 0 < error < tolerance


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int4", "k8v4"])
def test_decode_equals_prefill_over_the_same_cache(folder: Path, scheme: str) -> None:
    """Paged decode and the dequantizing continuation prefill read the same pages, so they agree."""
    engine = load(folder, scheme)
    seq = engine.new_sequence()
    engine.prefill(seq, IDS[:600])
    other = engine.fork(seq)
    by_decode = [engine.decode(seq, token) for token in IDS[600:620]]
    by_prefill = engine.logits(engine.prefill(other, IDS[600:620], want="all"))
    assert (torch.stack(by_decode) - by_prefill).abs().max() <= 1e-4


@pytest.mark.parametrize("start", [0, 256, 300])
def test_hybrid_with_every_block_equals_dense(folder: Path, start: int) -> None:
    everything = AttentionPolicy(kind="hybrid", alpha=1e-30, dense_last=0)
    dense, hybrid = load(folder), load(folder, policy=everything)
    for engine in (dense, hybrid):
        engine.chunk = 256
    pair = []
    for engine in (dense, hybrid):
        seq = engine.new_sequence()
        if start:
            engine.prefill(seq, IDS[:start])
        pair.append(engine.prefill(seq, IDS[start:], want="all"))
    assert (pair[0] - pair[1]).abs().max() <= 2e-5


def test_hybrid_skips_far_blocks_but_not_the_end(folder: Path) -> None:
    """With alpha 1 only the best block, sinks and neighbours stay; the last `dense_last` queries see everything."""
    strict = AttentionPolicy(kind="hybrid", alpha=1.0, sink_blocks=1, local_blocks=1, dense_last=128)
    dense, hybrid = load(folder), load(folder, policy=strict)
    ids = IDS[:896]
    a = dense.prefill(dense.new_sequence(), ids, want="all")
    b = hybrid.prefill(hybrid.new_sequence(), ids, want="all")
    assert torch.equal(a[:128], b[:128])
    assert (a[400:760] - b[400:760]).abs().max() > 1e-3


def test_fork_shares_pages_and_free_returns_them(folder: Path) -> None:
    engine = load(folder, "int4")
    seq = engine.new_sequence()
    engine.prefill(seq, IDS[:700])
    twin = engine.fork(seq)
    assert twin.pages == seq.pages
    first = engine.decode(twin, 9)
    engine.decode(seq, 11)
    assert torch.equal(engine.decode(engine.fork(seq), 5), engine.decode(seq, 5))
    held = len(engine.pool.unused)
    engine.free(twin)
    assert len(engine.pool.unused) == held  # seq still holds them
    engine.free(seq)
    again = engine.new_sequence()
    engine.prefill(again, IDS[:700])
    assert torch.equal(engine.decode(again, 9), first)


def test_cancelled_prefill_leaves_the_sequence_as_it_was(folder: Path) -> None:
    engine = load(folder, "int4")
    seq, plain = engine.new_sequence(), engine.new_sequence()
    engine.prefill(seq, IDS[:333])
    engine.prefill(plain, IDS[:333])
    unused = None
    seen: list[int] = []
    for _ in range(2):
        with pytest.raises(Cancelled):
            engine.prefill(seq, IDS[333:900], progress=lambda done, _: seen.append(done), cancelled=lambda: bool(seen))
        seen.clear()
        unused = unused or len(engine.pool.unused)
    engine.chunk, asked = 128, itertools.count()
    with pytest.raises(Cancelled):  # among the five chunks of the first layer
        engine.prefill(seq, IDS[333:900], progress=lambda done, _: seen.append(done), cancelled=lambda: next(asked) > 3)
    assert not seen
    assert len(engine.pool.unused) == unused
    assert seq.length == 333
    assert torch.equal(engine.prefill(seq, IDS[333:500]), engine.prefill(plain, IDS[333:500]))


def test_context_is_a_hard_limit(folder: Path) -> None:
    engine = Engine.load(FolderSource(folder), device="cpu", max_context=256)
    seq = engine.new_sequence()
    with pytest.raises(ContextExceeded, match="257 tokens, the limit is 256"):
        engine.prefill(seq, IDS[:257])
    with pytest.raises(UserError, match="prompt is empty"):
        engine.prefill(seq, [])
    engine.prefill(seq, IDS[:256])
    with pytest.raises(ContextExceeded, match="full at 256"):
        engine.decode(seq, 5)
    with pytest.raises(ContextExceeded, match="configured for 2K tokens, 4K were asked for"):
        Engine.load(FolderSource(folder), device="cpu", max_context=4096)


@pytest.mark.parametrize(
    ("value", "message"), [(0.0, "0.0.*positive"), (float("nan"), "nan.*positive"), (None, "has no")]
)
def test_bad_kv_scales_are_refused(folder: Path, tmp_path: Path, value: float | None, message: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.v_scale"
    if value is None:
        del tensors[name]
    else:
        tensors[name][1] = value
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name}.*{message}" if value is not None else f"{message} {name}"):
        load(tmp_path, "fp8")


def test_generate_is_greedy_stops_and_counts(folder: Path) -> None:
    engine = load(folder)
    engine.eos_ids = frozenset()
    pieces = list(engine.generate(IDS[:50], SamplingParams(max_tokens=12)))
    assert len(pieces) == 12
    assert pieces[-1].finish == "length"
    assert all(p.finish is None for p in pieces[:-1])
    text = "".join(p.text for p in pieces)
    assert text == engine.tokenizer.decode([p.token for p in pieces])
    assert all(p.logprob <= 0 for p in pieces)
    stop = text[4:6]
    stopped = list(engine.generate(IDS[:50], SamplingParams(max_tokens=12, stop=(stop,))))
    assert "".join(p.text for p in stopped) == text[: text.index(stop)]
    assert stopped[-1].finish == "stop"
    engine.eos_ids = frozenset({pieces[3].token})
    ended = list(engine.generate(IDS[:50], SamplingParams(max_tokens=12)))
    assert ended[-1].finish == "stop"
    assert len(ended) <= 4
    assert engine.pool.users.count(0) == engine.pool.capacity  # everything was given back


def test_seed_decides_the_tokens(folder: Path) -> None:
    engine = load(folder)
    hot = SamplingParams(temperature=1.5, seed=7, max_tokens=16)
    first = [p.token for p in engine.generate(IDS[:40], hot)]
    assert first == [p.token for p in engine.generate(IDS[:40], hot)]
    assert first != [p.token for p in engine.generate(IDS[:40], SamplingParams(1.5, seed=8, max_tokens=16))]


def test_sampling_keeps_only_the_allowed() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    drawn = {sample(logits, SamplingParams(1.0, top_p=0.7), generator)[0] for _ in range(200)}
    assert drawn == {0, 1}
    assert {sample(logits, SamplingParams(1.0, top_k=3), generator)[0] for _ in range(200)} == {0, 1, 2}
    for nearly_greedy in (SamplingParams(1.0, top_p=0.0), SamplingParams(1e-30)):
        assert {sample(logits, nearly_greedy, generator)[0] for _ in range(50)} == {0}
    token, logprob = sample(logits, SamplingParams(), generator)
    assert token == 0
    assert logprob == pytest.approx(-0.6931, abs=1e-3)


@given(st.text("ab#", max_size=12), st.lists(st.text("ab#", min_size=1, max_size=3), max_size=3))
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str]) -> None:
    given_out, held = "", ""
    for char in text:
        out, held, stopped = _cut_at_stop(held + char, tuple(stops))
        given_out += out
        if stopped:
            break
    else:
        given_out += held
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert given_out == text
    else:  # stopped at the first completed stop string
        seen = text[: min(ends)]
        assert given_out == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["new", "grow", "fork", "free"]), st.integers(1, 400)), max_size=12))
def test_pages_are_never_shared_by_accident_or_lost(actions: list[tuple[str, int]]) -> None:
    spec = ModelSpec.from_config(
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        | {"num_attention_heads": 1, "vocab_size": 8, "max_position_embeddings": 4096}
    )
    pool = PagePool(spec, KVConfig(), device=torch.device("cpu"), dtype=torch.float32)
    live = []
    from lcconvert.runtime.kv_cache import StagedAppend

    for action, size in actions:
        if action == "new" or not live:
            live.append(pool.new_sequence())
        elif action == "fork":
            live.append(pool.fork(live[size % len(live)]))
        elif action == "free":
            pool.free(live.pop(size % len(live)))
        else:
            seq = live[size % len(live)]
            rows = torch.zeros(seq.length + size, 1, 8)
            staged = StagedAppend(pool, seq, [1] * size)
            staged.store(0, rows, rows)
            staged.commit()
        for seq in live:
            assert len(seq.pages) == max(seq.length - PAGE, 0) // PAGE
            assert 0 <= seq.tail_length < PAGE
        counts = [sum(page in seq.pages for seq in live) for page in range(pool.capacity)]
        assert counts == pool.users
        assert sorted(pool.unused) == [page for page, users in enumerate(counts) if not users]


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int4", "k8v4"])
@pytest.mark.parametrize("kind", ["dense", "hybrid"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.03)])
def test_gpu_equals_cpu(folder: Path, scheme: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Triton kernels and PyTorch's GPU attention against the plain CPU path, whole engine, relative error of logits."""
    policy = AttentionPolicy(kind=kind, alpha=1e-30 if kind == "hybrid" else 0.01, dense_last=64)
    source = FolderSource(folder)
    cpu = run(load(folder, scheme, policy), 700, 80)
    gpu = Engine.load(source, device="cuda", dtype=dtype, kv=KVConfig(scheme=scheme), attention=policy)
    error = (run(gpu, 700, 80).cpu() - cpu).norm() / cpu.norm()
    assert error < tolerance
