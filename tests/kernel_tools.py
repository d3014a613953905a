"""What kernel tests share: the device fixture, poisoned allocations, the plain attention every kernel is held to."""

import pytest
import torch

from lcconvert.kernels import backend


@pytest.fixture(name="device", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run_on(request, monkeypatch):
    """Runs the test's kernels as Triton: by the interpreter on "cpu", compiled on "cuda". Fresh memory holds NaN."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if request.param == "cpu" and not backend.interpreted:
        pytest.skip("Triton compiles on this machine; the interpreter would need TRITON_INTERPRET=1")
    plain = torch.empty

    def poisoned(*args, **kwargs):
        tensor = plain(*args, **kwargs)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
        elif tensor.is_floating_point():
            tensor.fill_(torch.nan)
        else:
            tensor.fill_(min(torch.iinfo(tensor.dtype).max, 2**30))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    with backend.force("triton"):
        yield request.param


@pytest.fixture(name="vast")
def storage(device):
    """A storage of 2^31 + 2^25 bytes or 16-bit elements that costs only what is touched (all of it on a GPU)."""
    return lambda dtype: torch.zeros(1, dtype=dtype, device=device).new_empty(2**31 + 2**25)


def dense_attention(q, k, v, q_offset):
    """float64 causal attention of q [T, Hq, D] at q_offset.. over k, v [S, Hkv, D] -> [T, Hq, D]."""
    allowed = torch.arange(k.shape[0], device=q.device) <= torch.arange(len(q), device=q.device)[:, None] + q_offset
    return masked_attention(q, k, v, allowed.expand(q.shape[1], -1, -1))


def masked_attention(q, k, v, allowed):
    """float64 attention where allowed [Hq, T, S] says so."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k) / q.shape[2] ** 0.5
    p = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", p, v)


def close(got, want, tolerance):
    """Largest difference within `tolerance` of the largest wanted value; a NaN anywhere fails."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= tolerance, f"relative error {error:.3g} over {tolerance}"
