"""Several processes train what one would, wherever a token lies; here two of gloo's, on the CPU."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_model
from tiny import write_tiny

from lcconvert.convert import shards, trainer
from lcconvert.convert.extend import ExtendConfig, Stage, extend
from lcconvert.convert.shards import Shards
from lcconvert.convert.trainer import saved_step
from lcconvert.runtime.errors import Interrupted
from lcconvert.runtime.source import FolderSource

STAGES = (
    Stage(steps=3, seq_len=300, lr=3e-4, retrieval_share=0.5, replay_share=0.3, accumulate=2),  # rows shared in two
    Stage(steps=2, seq_len=300, lr=3e-4, batch_size=2),  # a row each
    Stage(steps=1, seq_len=1024, lr=3e-4, questions=3, batch_size=3, prefix_attention="dense"),
)

GRADIENTS = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from lcconvert.convert import trainer
from lcconvert.convert.extend_config import ExtendConfig
from lcconvert.convert.shards import Shards
from lcconvert.convert.trainer import LossModule
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.source import FolderSource

dist.init_process_group("gloo")
shared = Shards(dist.get_world_size(), dist.get_rank(), dist.new_group(range(dist.get_world_size())))
draw = torch.Generator().manual_seed(1)
ids = torch.randint(4, 320, (4, 501), generator=draw)  # 501 tokens: the last chunk is padded
skips = torch.randint(0, 5000, (4, 2), generator=draw)  # PoSE: two jumps a row
positions = torch.arange(501).repeat(4, 1)
positions[:, 130:] += skips[:, :1]
positions[:, 377:] += skips[:, 1:]
weights = torch.rand(4, 501, generator=draw)
weights[1] = 0
weights[1, 140:145] = 1  # a row whose answers one process has alone
weights[:, 0] = 0
weights /= weights.sum(1, keepdim=True)
batch = {"ids": ids, "positions": positions, "weights": weights, "replay": torch.tensor([False, False, True, False])}

def gradients(module, shards):
    module.zero_grad()
    module.shards = shards
    loss = module(**batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters()}

def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

for family in sys.argv[5:]:
    original, other = (load_decoder(FolderSource(Path(family))) for _ in range(2))
    with torch.no_grad():
        other.layers[1].mlp.down_proj.weight.mul_(3)
    for checkpointing in (False, True):
        module = LossModule(original, checkpointing, other)
        loss, wanted = gradients(module, Shards())
        part, found = gradients(module, shared)
        for each in (part, *found.values()):
            dist.all_reduce(each)
            each /= shared.size
        same(part, loss)
        same(found, wanted)
    before = {name: weight.clone() for name, weight in original.state_dict().items()}
    for layer in original.layers:
        fully_shard(layer)
    fully_shard(module)
    part, found = gradients(module, shared)
    same({name: grad.full_tensor() for name, grad in found.items()}, wanted)
    same(trainer._whole(original, ExtendConfig(context="16k")).state_dict(), before)
    Path(family, f"same{shared.rank}").touch()
"""

EXTEND = """
import os, signal, sys
from pathlib import Path
from lcconvert.convert import prefix_tuning, trainer
from lcconvert.convert.extend import ExtendConfig, extend

class Killing(trainer.TrainingLog):
    def add(self, **row):
        super().add(**row)
        if row["step"] == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)

prefix_tuning._CHUNK = 256  # several stretches of the text that is read
trainer.TrainingLog = Killing
extend(sys.argv[1], Path(sys.argv[2]), ExtendConfig.model_validate_json(sys.argv[3]))
"""


def launch(script: str, *arguments: str) -> list[int]:
    """What `accelerate launch --num_processes 2` does; the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment))
    return [process.wait() for process in started]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_tiny(folder / "source")
    (folder / "text").mkdir()
    for i in range(3):
        lines = (f"On day {j} the {'river' if i % 2 else 'wind'} was {j * i % 7} feet high.\n\n" for j in range(60))
        (folder / "text" / f"{i}.txt").write_text("".join(lines))
    return folder


def config(work: Path) -> ExtendConfig:
    return ExtendConfig(context="16k", data=(str(work / "text"),), stages=STAGES, save_every=2, device="cpu")


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training" / "loss.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(work: Path) -> list[str]:
    """Two processes compare gradients and then train until the third step; their arguments."""
    random_model("olmo3").save_pretrained(work / "windowed")  # a layer with a window and one without
    arguments = [str(work / "source"), str(work / "two"), config(work).model_dump_json(exclude={"steps"})]
    families = [str(work / "source"), str(work / "windowed")]
    assert launch(GRADIENTS + EXTEND, *arguments, "3", *families) == [-signal.SIGKILL] * 2
    return arguments


def test_loss_and_every_gradient(work: Path, killed: list[str]) -> None:
    for family in ("source", "windowed"):
        assert len(list((work / family).glob("same?"))) == 2


class Stopping(trainer.TrainingLog):
    def add(self, **row: Any) -> None:
        super().add(**row)
        if row["step"] == 4:
            signal.raise_signal(signal.SIGINT)


def test_two_processes_train_and_resume_as_one(work: Path, killed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = extend(str(work / "source"), work / "alone", config(work))
    assert saved_step(work / "two.partial") == 2
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "TrainingLog", Stopping)
        with pytest.raises(Interrupted, match="after step 4 of 6"):
            extend(str(work / "source"), work / "two", config(work))  # one goes on where two were killed
    assert launch(EXTEND, *killed, "0") == [0, 0]  # and two where one was stopped
    one, two = curve(alone), curve(work / "two")
    assert len(one) == len(two) == 6
    for ours, theirs in zip(two, one):
        assert ours == pytest.approx(theirs, rel=1e-4)
    weights, expected = FolderSource(work / "two"), FolderSource(alone)
    for name in expected.names():
        torch.testing.assert_close(weights.tensor(name), expected.tensor(name), rtol=1e-2, atol=1e-4)
    assert not [path.name for path in (work / "two").iterdir() if "state" in path.name]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_any_number_of_processes_holds_every_token_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gathering puts them back in order, scattering sums them."""
    x = torch.randn(2, 3, 2 * size * 4, 2, 5)  # K and V, rows, tokens, heads, width
    held = [torch.stack([Shards(size, rank).local(part) for part in x]) for rank in range(size)]
    assert sum(part.shape[2] for part in held) == x.shape[2]

    def all_gather(out: torch.Tensor, _: torch.Tensor, group: None) -> None:
        out.copy_(torch.cat(held))

    def reduce_scatter(out: torch.Tensor, parts: torch.Tensor, group: None) -> None:
        out.copy_(parts.unflatten(0, (size, -1))[rank])

    monkeypatch.setattr(shards, "_all_gather", all_gather)
    monkeypatch.setattr(shards, "_reduce_scatter", reduce_scatter)
    for rank in range(size):
        torch.testing.assert_close(shards._gather(held[rank], Shards(size, rank)), x)
        torch.testing.assert_close(shards._scatter(x, Shards(size, rank)), held[rank])


def test_padding_and_pieces() -> None:
    halves = [Shards(2, rank).local(torch.arange(1, 10)[None]) for rank in range(2)]
    assert [half.tolist() for half in halves] == [[[1, 2, 3, 0, 0, 0]], [[4, 5, 6, 7, 8, 9]]]
    dealt = [Shards(2, rank).dealt(torch.arange(5)) for rank in range(2)]
    assert [pieces.tolist() for pieces, _ in dealt] == [[0, 2, 4], [1, 3, 0]]
    assert [real.tolist() for _, real in dealt] == [[1, 1, 1], [1, 1, 0]]
    assert math.prod(dealt[0][1].shape) == 3
