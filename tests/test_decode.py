"""The decode step: several sequences at once, page-sparse reading, steps between the layers of a prefill, graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.sidecar import AttentionPolicy, KVConfig
from lcconvert.runtime.source import FolderSource

IDS = torch.randint(4, 320, (1600,), generator=torch.Generator().manual_seed(5)).tolist()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")  # with q/k norm


def load(folder: Path, device: str, *, share: float | None = None, pages: int = 1, scheme: str = "int4") -> Engine:
    policy = AttentionPolicy(decode_share=share, decode_pages=pages, decode_newest=1)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # a float32 step is not captured as a graph
    return Engine.load(FolderSource(folder), device=device, dtype=dtype, kv=KVConfig(scheme=scheme), attention=policy)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to rounding: the order of sums may differ."""
    return bool((a - b).norm() <= (1e-5 if a.device.type == "cpu" else 0.02) * b.norm())


@pytest.mark.parametrize("device", DEVICES)
def test_an_answer_does_not_depend_on_what_decodes_beside_it(folder: Path, device: str) -> None:
    """Three sequences of very different length in one step, over page borders, against each one alone."""
    lengths = (5, 383, 1500)

    def prefilled(engine: Engine) -> list:
        seqs = [engine.new_sequence() for _ in lengths]
        for seq, length in zip(seqs, lengths, strict=True):
            engine.prefill(seq, IDS[:length])
        return seqs

    together, alone = load(folder, device), load(folder, device)
    batch, single = prefilled(together), prefilled(alone)
    for step in range(4):
        tokens = [IDS[length + step] for length in lengths]
        rows = together.decode_batch(batch, tokens)
        for row, seq, token in zip(rows, single, tokens, strict=True):
            assert close(row, alone.decode(seq, token))
    assert [len(seq.pages) for seq in batch] == [0, 2, 10]
    with pytest.raises(ValueError, match="9 sequences in one step"):
        together.decode_batch(batch * 3, [1] * 9)


@pytest.mark.parametrize("device", DEVICES)
def test_sequences_take_turns(folder: Path, device: str) -> None:
    """Steps of one sequence between steps of another, freed and new ones too, change nothing (a graph keeps tables)."""
    engine, other = load(folder, device), load(folder, device)
    first, twin = engine.new_sequence(), other.new_sequence()
    for e, seq in ((engine, first), (other, twin)):
        e.prefill(seq, IDS[:700])
    for step in range(3):
        passing = engine.new_sequence()
        engine.prefill(passing, IDS[300 : 900 + 100 * step])
        engine.decode(passing, 7)
        assert torch.equal(engine.decode(first, IDS[700 + step]), other.decode(twin, IDS[700 + step]))
        engine.free(passing)


@pytest.mark.parametrize("device", DEVICES)
def test_page_sparse_decode(folder: Path, device: str) -> None:
    """All pages chosen: what dense decode gives. Few: close to it, not equal, and the newest pages are always read."""
    exact, all_pages, few = (load(folder, device, share=share) for share in (None, 1.0, 0.3))
    rows = []
    for engine in (exact, all_pages, few):
        seq = engine.new_sequence()
        engine.prefill(seq, IDS[:1500])
        rows.append(torch.stack([engine.decode(seq, token) for token in IDS[1500:1504]]))
    assert close(rows[1], rows[0])
    assert not close(rows[2], rows[0])
    assert (rows[2] - rows[0]).norm() / rows[0].norm() < 0.5
    with pytest.raises(UserError, match=r"decode_share is 0.3 but the KV scheme is 'bf16'.*use scheme 'int4'"):
        load(folder, device, share=0.3, scheme="bf16")


@pytest.mark.parametrize("device", DEVICES)
def test_others_decode_between_the_layers_of_a_prefill(folder: Path, device: str) -> None:
    engine, quiet = load(folder, device), load(folder, device)
    small, alone = engine.new_sequence(), quiet.new_sequence()
    engine.prefill(small, IDS[:200])
    quiet.prefill(alone, IDS[:200])
    answers: list[torch.Tensor] = []
    large = engine.new_sequence()
    logits = engine.prefill(
        large, IDS[:1500], progress=lambda done, total: answers.append(engine.decode(small, IDS[200 + done]))
    )
    for done, answer in enumerate(answers, 1):
        assert torch.equal(answer, quiet.decode(alone, IDS[200 + done]))
    assert torch.equal(logits, quiet.prefill(quiet.new_sequence(), IDS[:1500]))


@pytest.mark.gpu
def test_hidden_states_in_host_memory_change_nothing(folder: Path) -> None:
    near, far = load(folder, "cuda"), load(folder, "cuda")
    far.offload = True
    near.chunk = far.chunk = 256
    for begin, end in ((0, 1), (0, 1500), (300, 1600)):
        a, b = near.new_sequence(), far.new_sequence()
        assert torch.equal(near.prefill(a, IDS[begin:end]), far.prefill(b, IDS[begin:end]))
        assert torch.equal(near.decode(a, 9), far.decode(b, 9))
        near.free(a)
        far.free(b)
