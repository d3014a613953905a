"""The plan of memory against every allocation of a real pass of an 8B model's layers, run without data."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcconvert.convert.extend_config import ExtendConfig, Stage
from lcconvert.convert.extend_memory import Memory
from lcconvert.convert.host_adamw import DEVICE_BYTES
from lcconvert.convert.loss import TILE_ROWS, _TiledLoss
from lcconvert.convert.shapes import SHAPES
from lcconvert.convert.shelf import Shelf
from lcconvert.convert.streamed import Keep, Streaming, streamed_hidden
from lcconvert.convert.trainable import make_trainable
from lcconvert.runtime.linear import QuantLayout
from lcconvert.runtime.model import Decoder
from lcconvert.runtime.spec import ModelSpec

LAYERS, TOKENS = 2, 2**15
PLENTY = 2**50


class Allocations(TorchDispatchMode):
    """The most bytes that results of operations held at once; storages in `apart` do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self.apart: set[int] = set()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.apart:
                if storage._cdata in self._live and self._live[storage._cdata][0].expired():
                    self._forget(storage._cdata)
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._now += storage.nbytes()
        if self._now > self.peak:
            for key in [key for key, (storage, _) in self._live.items() if storage.expired()]:
                self._forget(key)
            self.peak = max(self.peak, self._now)
        return out

    def leave_out(self, tensor: torch.Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        self.apart.add(key)
        if key in self._live:
            self._forget(key)

    def _forget(self, key: int) -> None:
        self._now -= self._live.pop(key)[1]


@pytest.mark.parametrize(("rank", "place"), [(0, "device"), (16, "host")], ids=["full", "lora"])
def test_what_a_streamed_pass_allocates(rank: int, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec.from_config(SHAPES["llama-3.1-8b"] | {"num_hidden_layers": LAYERS})
    settings = {"context": TOKENS, "lora_rank": rank, "lora_train": ("norms",), "dtype": "bfloat16", "streamed": True}
    config = ExtendConfig(**settings, host_optimizer=not rank, stages=(Stage(steps=1, seq_len=TOKENS),))
    (stage,) = config.plan
    made = Allocations()
    # tensors without data have no addresses, by which the pass tells them apart
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: tensor.untyped_storage()._cdata)

    def host_buffer(shelf: Shelf, nbytes: int) -> torch.Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        made.leave_out(buffer)
        return buffer

    monkeypatch.setattr(Shelf, "_lock", host_buffer)
    with FakeTensorMode():
        decoder = Decoder(spec, QuantLayout())
        make_trainable(decoder, config, host_optimizer=not rank)
        for weight in decoder.parameters():
            made.leave_out(weight)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        streaming = Streaming(Shelf(torch.device("cpu")), [Keep(place, place)] * LAYERS, config.tile)
        with made, torch.autocast("cpu", torch.bfloat16):
            hidden = streamed_hidden(decoder, ids, ids, streaming)
            rows, weights = hidden[0][ids[0]], torch.zeros(TOKENS)  # all of them; which ones count is unknown
            loss = _TiledLoss.apply(rows, decoder.head_weight, weights, ids[0], None, None, TILE_ROWS)
            del hidden, rows
            loss.backward()
    moments = 0 if not rank else 2 * 4 * sum(w.numel() for w in decoder.parameters() if w.requires_grad)
    measured = made.peak + moments + sum(weight.nbytes for weight in decoder.parameters())
    limits = {"device": (PLENTY, PLENTY), "host": (2**30, PLENTY)}[place]
    memory = Memory(spec, config, *limits, host_optimizer=not rank).of(stage)
    assert memory.keeps == tuple(streaming.keeps)
    workspaces = 2**27 + DEVICE_BYTES * (not rank)  # of kernels, and of the update
    assert memory.device - workspaces == pytest.approx(measured, rel=0.15)
