"""The streamed training pass: the same loss and gradients as the plain one, wherever things are kept."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from lcconvert.convert import host_adamw
from lcconvert.convert import shelf as shelves
from lcconvert.convert.extend_config import ExtendConfig
from lcconvert.convert.host_adamw import HostAdamW
from lcconvert.convert.lora import add_lora
from lcconvert.convert.loss import weighted_cross_entropy
from lcconvert.convert.shapes import SHAPES, random_decoder
from lcconvert.convert.shelf import Shelf
from lcconvert.convert.streamed import Keep, Streaming, streamed_hidden
from lcconvert.convert.trainable import make_trainable
from lcconvert.convert.trainer import LossModule
from lcconvert.runtime.linear import QuantLayout
from lcconvert.runtime.model import Decoder, load_decoder
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec

IDS = torch.arange(2 * 150).view(2, 150) * 7 % 320
POSITIONS = (torch.arange(150) * 3).expand(2, -1)  # with skips


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(request.param), request.param, num_hidden_layers=3)


def loss_and_gradients(decoder: Decoder, hidden: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.full((2 * 149,), 1 / 298)
    loss = weighted_cross_entropy(hidden[:, :-1].flatten(0, 1), decoder.head_weight, IDS[:, 1:].flatten(), weights)
    trained = [weight for weight in decoder.parameters() if weight.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("keep", [Keep(), Keep("host", "host"), Keep("host", "again"), Keep("device", "again")])
def test_equals_the_plain_pass(source: Path, keep: Keep, adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "_SMALL", 1000)
    decoder = load_decoder(FolderSource(source))
    decoder.requires_grad_(True)
    if adapters:
        add_lora(decoder, 4, 8.0, ("norms",), 0)
        for name, weight in decoder.named_parameters():
            if name.endswith(".up"):
                weight.data.normal_(0, 0.1)
    plain = loss_and_gradients(decoder, decoder(IDS, POSITIONS))
    shelf = Shelf(torch.device("cpu"))
    for _ in range(2):  # the second pass reuses the first one's buffers
        hidden = streamed_hidden(decoder, IDS, POSITIONS, Streaming(shelf, [keep, Keep(), keep], tile=64))
        torch.testing.assert_close(loss_and_gradients(decoder, hidden), plain, rtol=1e-5, atol=1e-6)
    layer = 2 * 150 * 64 * 4 * {"host": 1, "device": 0}[keep.inputs]  # bytes of an input
    attention = IDS.numel() * decoder.spec.q_size * 4 if keep.attention == "host" else 0
    assert shelf.host_bytes >= 2 * (layer + attention)  # of the first and the last layer


def test_bfloat16_forward_over_float32_adapters(source: Path) -> None:
    """Under autocast no gradient may be lost to a weight that was cast while none was wanted."""
    decoder = load_decoder(FolderSource(source))
    config = ExtendConfig(context="64k", lora_rank=4, lora_train=("norms",), dtype="bfloat16")
    optimizer = make_trainable(decoder, config, host_optimizer=False)
    for name, weight in decoder.named_parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16), name
        if name.endswith(".up"):
            weight.data.normal_(0, 0.1)
    assert not isinstance(optimizer, HostAdamW)
    streaming = Streaming(Shelf(torch.device("cpu")), [Keep("host", "host")] * 3, tile=64)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = streamed_hidden(decoder, IDS, POSITIONS, streaming)
    loss, *found = loss_and_gradients(decoder, hidden)
    decoder.float()
    exact, *wanted = loss_and_gradients(decoder, decoder(IDS, POSITIONS))
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    for ours, theirs in zip(found, wanted):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_adamw_is_adamw(source: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32 weights it gives the numbers of PyTorch's; of 16-bit ones those, rounded. It saves and resumes."""
    monkeypatch.setattr(host_adamw, "_PIECE", 1000)
    config = ExtendConfig(context="64k", dtype=dtype)
    ours, theirs, resumed = (load_decoder(FolderSource(source)) for _ in range(3))
    for decoder in (ours, theirs, resumed):
        decoder.to(torch.bfloat16).float()
    optimizer, again = (make_trainable(each, config, host_optimizer=True) for each in (ours, resumed))
    exact = make_trainable(theirs, config.model_copy(update={"dtype": "float32"}), host_optimizer=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for group in (*optimizer.param_groups, *exact.param_groups, *again.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        for a, b, c in zip(ours.parameters(), theirs.parameters(), resumed.parameters()):
            a.grad = torch.randn(a.shape, generator=generator).to(a.dtype)
            b.grad, c.grad = a.grad.float(), a.grad.clone()
        if step == 2:
            resumed.load_state_dict(ours.state_dict())
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        exact.step()
        if step >= 2:
            again.step()
    for a, b, c in zip(ours.parameters(), theirs.parameters(), resumed.parameters()):
        assert a.dtype == getattr(torch, dtype)
        torch.testing.assert_close(optimizer.state[a]["weight"].view(a.shape), b.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(a, optimizer.state[a]["weight"].view(a.shape).to(a.dtype))
        assert torch.equal(a, c)


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "full"])
def test_on_a_gpu(whole: bool) -> None:
    """Copies beside the work, 16 bits and the kernels of a GPU: still the loss and gradients of the plain pass."""
    small = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
    spec = ModelSpec.from_config(SHAPES["llama-3.1-8b"] | small | {"num_key_value_heads": 2, "vocab_size": 4096})
    device = torch.device("cuda")
    config = ExtendConfig(context="64k", lora_rank=0 if whole else 8, tile=1024)
    decoder = random_decoder(spec, QuantLayout(), device, torch.float32)
    optimizer = make_trainable(decoder, config, host_optimizer=whole)
    for name, weight in decoder.named_parameters():
        if name.endswith(".up"):
            weight.data.normal_(0, 0.02)
    length = 10_000
    batch = {
        "ids": torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(0)).to(device),
        "positions": torch.arange(length, device=device)[None],
        "weights": torch.full((1, length), 1 / length, device=device),
        "replay": torch.zeros(1, dtype=torch.bool, device=device),
    }
    module = LossModule(decoder.train(), checkpoint_layers=True)
    trained = [weight for weight in decoder.parameters() if weight.requires_grad]

    def loss_and_gradients(streaming: Streaming | None) -> tuple[float, list[torch.Tensor]]:
        module.streaming = streaming
        with torch.autocast("cuda", torch.bfloat16):
            loss = module(**batch)
        return loss.item(), [grad.float() for grad in torch.autograd.grad(loss, trained)]

    loss, plain = loss_and_gradients(None)
    shelf = Shelf(device)
    for keep in (Keep("host", "host"), Keep("host", "again"), Keep(), Keep("host", "host")):
        streamed, found = loss_and_gradients(Streaming(shelf, [keep] * 4, tile=1024))
        assert streamed == pytest.approx(loss, rel=1e-3)
        for ours, theirs in zip(found, plain):
            assert (ours - theirs).norm() < 0.05 * theirs.norm()
    shelf.close()
    if not whole:
        return
    exact = [weight.detach().float().requires_grad_() for weight in trained]
    theirs = torch.optim.AdamW(exact, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for group in optimizer.param_groups:
        group |= {"lr": 1e-3, "weight_decay": 0.0}
    for _ in range(3):
        for weight, copied in zip(trained, exact):
            weight.grad = torch.randn_like(weight)
            copied.grad = weight.grad.float()
        optimizer.step()
        theirs.step()
    for weight, copied in zip(trained, exact):
        master = optimizer.state[weight]["weight"]
        torch.testing.assert_close(master.cuda().view(copied.shape), copied.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(weight.cpu(), master.view(weight.shape).bfloat16())
    optimizer.close()
