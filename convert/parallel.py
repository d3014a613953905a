"""The processes that train together: what each one takes of a step, what they agree on, and which one writes.

`accelerate launch` starts them and accelerate joins them: whole weights in each (DDP), or sharded ones (FSDP2, where
`--use_fsdp --fsdp_version 2` asks for it). A step is the same rows whatever their number. Rows that are computed
together are dealt out as far as their number allows, and what is left of the processes share a row, by sequence
(`shards`): 8 GPUs and a batch of 2 are two groups, each of which holds one row in 4 parts. accelerate's own
`ParallelismConfig` with cp_size says otherwise. Every process thus holds the same number of tokens.

Surprising rule: a process's loss counts its own tokens times the number that share a row, so that the mean over all
processes, which is also what their gradients become, is the loss of the whole batch.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, extract_model_from_parallel
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lcconvert.convert.shards import Shards
from lcconvert.runtime.errors import UserError


def start_process(device: str) -> PartialState:
    """Joins the processes of the launcher, if there is one, and gives this one its GPU; may be called again."""
    return PartialState(cpu=torch.device(device).type == "cpu")


def sharding_asked() -> bool:
    """Whether the launcher wants sharded weights."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def make_accelerator(device: torch.device, mixed_precision: str) -> Accelerator:
    """accelerate as the launcher asked for it; UserError for what training here has no use for."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it is global: an earlier run may have chosen otherwise
    sharded = sharding_asked()
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=mixed_precision,
        fsdp_plugin=_sharding() if sharded else None,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # else gradients exist twice
    )
    accelerator.register_save_state_pre_hook(_save_unwrapped)
    accelerator.register_load_state_pre_hook(_load_unwrapped)
    if device.type == "cuda" and mixed_precision == "no" and accelerator.num_processes > 1:
        raise UserError("dtype is float32, expected bfloat16 where several GPUs share sequences; leave dtype out")
    asked = getattr(accelerator, "parallelism_config", None)
    for kind in ("tp_size", "sp_size"):
        if asked and getattr(asked, kind, 1) > 1:
            raise UserError(
                f"accelerate was started with {kind} {getattr(asked, kind)}, expected 1; sequences are shared by "
                "cp_size and weights by FSDP"
            )
    return accelerator


def _save_unwrapped(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
    """Names without DDP's prefix, so that another number of processes can go on."""
    weights[:] = [{name.removeprefix("module."): each for name, each in state.items()} for state in weights]


def _load_unwrapped(models: list[nn.Module], folder: str) -> None:
    models[:] = [extract_model_from_parallel(model) for model in models]


def _sharding() -> FullyShardedDataParallelPlugin:
    """FSDP2 by layers. Weights travel as they are stored and are cast where they are used, as on one GPU."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    version = int(os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        raise UserError(f"accelerate was started with FSDP version {version}, expected 2; add --fsdp_version 2")
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Layer"],
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,  # every process has read the weights
    )


class Processes:
    """The processes of `accelerator`, of which there may be one."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.count, self.index = accelerator.num_processes, accelerator.process_index
        self.writes = accelerator.is_main_process
        self.sharded_weights = accelerator.distributed_type.value == "FSDP"
        self._groups: dict[int, Shards] = {}

    def shards(self, rows: int) -> Shards:
        """How a sequence is shared where `rows` of them are computed together."""
        asked = getattr(self.accelerator, "parallelism_config", None)
        size = asked.cp_size if asked and asked.cp_size > 1 else self.count // math.gcd(self.count, rows)
        if rows % (self.count // size):
            raise UserError(
                f"{self.count} processes with cp_size {size} compute {self.count // size} rows at a time, which do not "
                f"divide batch_size {rows}; change one of them"
            )
        if size not in self._groups:
            self._groups[size] = self._grouped(size)
        return self._groups[size]

    def _grouped(self, size: int) -> Shards:
        """Neighbouring processes share a sequence. The group is its own, as gradients travel at the same time."""
        if size == 1:
            return Shards()
        groups = [dist.new_group(range(first, first + size)) for first in range(0, self.count, size)]
        return Shards(size, self.index % size, groups[self.index // size])

    def loader(self, rows: Dataset[dict[str, torch.Tensor]], batch_size: int) -> Any:
        """Batches of `batch_size` rows, of which this process gets its part, on its device."""
        shares = self.count // self.shards(batch_size).size
        return prepare_data_loader(
            DataLoader(rows, batch_size=batch_size),
            self.accelerator.device,
            num_processes=shares,
            process_index=self.index * shares // self.count,
            split_batches=True,
            put_on_device=True,
        )

    def dealt(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's rows of a batch of any size; the mean of all processes' row means is that of the batch."""
        count = len(batch["ids"])
        rows, real = Shards(self.count, self.index).dealt(torch.arange(count))
        share = real * (len(rows) * self.count / count)
        mine = {name: value[rows] for name, value in batch.items()}
        return mine | {"weights": mine["weights"] * share[:, None]}

    def mean(self, value: torch.Tensor) -> float:
        return float(self.accelerator.reduce(value.detach().float(), "mean"))

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process; all must ask at the same place."""
        if self.count == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)


def whole_weights(weight: torch.Tensor) -> torch.Tensor:
    """A weight in one piece; where it is sharded all processes must ask for it."""
    gather = getattr(weight, "full_tensor", None)
    return gather() if gather else weight
