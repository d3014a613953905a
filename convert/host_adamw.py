"""AdamW whose float32 weights and moments live in host memory, for models of which the GPU holds 16 bits a weight.

An 8B model trained in full needs 16 bytes a weight in the usual form, 128 GB. Here the device holds the weights and
their gradients in bfloat16 (32 GB) and the host 12 bytes a weight (96 GB). The update itself runs on the device: pieces
of weights and moments flow through it, one on its way in and one on its way out while a third is updated, at the speed
of the bus, so a step takes 2 x 12 bytes a weight over PCIe and no time of the CPU.

The numbers are those of `torch.optim.AdamW` on float32 weights with the same gradients; the device's weights are those
rounded once. Surprising rule: gradients are what autograd left, in the precision of the device's weights, so with
`accumulate` several of them are summed in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lcconvert.convert.shelf import lock_pages, unlock_pages

_PIECE = 2**25  # weights on the device at a time
_STREAMS = 3  # pieces under way
DEVICE_BYTES = _STREAMS * 20 * _PIECE  # at most, of a step: weight, moments and gradient in float32, and a temporary
_NAMES = ("weight", "exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` of the same arguments, but for where its state is. State is made at the first step."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._streams: list[torch.cuda.Stream] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        assert closure is None
        pieces = [
            (group, param, slice(start, start + _PIECE))
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
            for start in range(0, param.numel(), _PIECE)
        ]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._state_of(param)["step"] += 1
        if not pieces or not pieces[0][1].is_cuda:
            for piece in pieces:
                self._update(*piece)
            return
        device = pieces[0][1].device
        self._streams = self._streams or [torch.cuda.Stream(device) for _ in range(_STREAMS)]
        current = torch.cuda.current_stream(device)
        for number, piece in enumerate(pieces):  # each stream copies in, updates and copies out; the three overlap
            stream = self._streams[number % len(self._streams)]
            if number < len(self._streams):
                stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self._update(*piece)
        for stream in self._streams:
            current.wait_stream(stream)

    def _update(self, group: dict[str, Any], param: torch.Tensor, part: slice) -> None:
        state = self.state[param]
        host = [state[name][part] for name in _NAMES]
        weight, exp_avg, exp_avg_sq = here = [each.to(param.device, copy=True, non_blocking=True) for each in host]
        assert param.grad is not None
        grad = param.grad.view(-1)[part].float()
        beta1, beta2 = group["betas"]
        step = torch.full((), state["step"].item(), device=param.device)
        torch._fused_adamw_(
            [weight], [grad], [exp_avg], [exp_avg_sq], [], [step],
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip
        param.view(-1)[part] = weight
        for to, value in zip(host, here):
            to.copy_(value, non_blocking=True)

    def _state_of(self, param: torch.Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            for name in _NAMES:
                state[name] = lock_pages(torch.zeros(param.numel()), param.device)
            state["weight"].copy_(param.detach().view(-1))
        return state

    def state_dict(self) -> dict[str, Any]:
        for stream in self._streams:
            stream.synchronize()  # what is to be saved may be on its way
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As it was saved, taking the tensors over: PyTorch's own would turn them into the weights' precision, on their
        device."""
        params = [param for group in self.param_groups for param in group["params"]]
        states = state_dict["state"]
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state.clear()
        for number, state in states.items():
            param = params[number]
            for name, value in state.items():
                value = value.to("cpu", torch.float32)
                self.state[param][name] = value if name == "step" else lock_pages(value, param.device)

    def close(self) -> None:
        """Unlocks the host memory."""
        for state in self.state.values():
            for name in _NAMES:
                unlock_pages(state[name])
        self.state.clear()
