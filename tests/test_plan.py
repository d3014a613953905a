"""The memory plan against what is really allocated, and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.plan import VARIANTS, longest_context, plan_for_source, plan_variant
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy, Sidecar
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336}
LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA |= {"max_position_embeddings": 131072, "tie_word_embeddings": False}
GB = 10**9


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plan")
    tiny = write_tiny(root / "tiny")
    made = {"16-bit": tiny}
    for variant in ("flash", "pro"):
        config = QuantizeConfig(variant=variant, method="rtn", samples=1, length=256)
        made[variant] = quantize(str(tiny), root / variant, config)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_pages_are_counted_exactly(artifacts: dict[str, Path], variant: str) -> None:
    source = FolderSource(artifacts[variant])
    sidecar = Sidecar.read(source)
    plan = plan_for_source(
        source, sidecar.kv, sidecar.attention, 2048, gemm="fp8", dtype=torch.float32, gpu_bytes=80 * GB
    )
    engine = Engine.load(source, device="cpu", dtype=torch.float32)
    held = engine.memory()
    assert plan.weights == pytest.approx(held["weights"], rel=0.03)  # scales are counted as 16 bit
    seq = engine.new_sequence()
    engine.prefill(seq, [5] * 2048)
    full, pages = engine.pool.bytes / engine.pool.capacity, plan.context // PAGE
    dtype = 2 if engine.kv.scheme == "bf16" else 1  # the plan is for 16-bit pages, this pool is float32
    assert plan.kv_pages == pytest.approx(pages * full / dtype + engine.pool.exact_bytes, rel=0.01)


def test_what_does_not_fit_is_refused_before_anything_is_read(artifacts: dict[str, Path]) -> None:
    spec = ModelSpec.from_config(LLAMA)
    assert plan_variant(spec, "flash", 2**20, 80 * GB).fits
    assert not plan_variant(spec, "flash", 2**20, 80 * GB).offload
    lean = plan_variant(spec, "flash", 2**20, 51 * GB)
    assert lean.fits
    assert lean.offload  # hidden states go to the host
    assert lean.host_pinned == 2**33
    with pytest.raises(UserError, match=r"llama at 1M tokens needs 161 GB .*largest context that fits is \d+, ask"):
        plan_variant(spec, "16-bit", 2**20, 80 * GB).check("llama")


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(VARIANTS)), st.integers(20, 200))
def test_the_longest_context_is_the_longest(variant: str, gigabytes: int) -> None:
    spec = ModelSpec.from_config(LLAMA)
    longest = longest_context(spec, variant, gigabytes * GB)
    assert longest % PAGE == 0
    assert plan_variant(spec, variant, longest, gigabytes * GB).fits
    assert not plan_variant(spec, variant, longest + PAGE, gigabytes * GB).fits


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_peak_is_predicted(artifacts: dict[str, Path], variant: str) -> None:
    """On a tiny model the fixed parts weigh most; `lcconvert bench` compares at real size."""
    source = FolderSource(artifacts[variant])
    engine = Engine.load(source, device="cuda", attention=AttentionPolicy())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.prefill(engine.new_sequence(), [5] * 2000)
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20
    with pytest.raises(UserError, match="largest context that fits is"):
        Engine.load(source, device="cuda", gpu_bytes=10**6)
