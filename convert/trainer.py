"""Fine-tunes the decoder on the planned stages, through accelerate, and can be stopped and resumed at any step.

A checkpoint holds weights, optimizer, random states and the step; rows and learning rates are functions of the step, so
a run that was killed and resumed draws the same loss curve, number for number, as one that was not. Under
`accelerate launch` several GPUs train together (`parallel`); one alone is the case of a single process.

Surprising rule: the loss is averaged over rows, not tokens. A retrieval row has a dozen answer tokens and a text row
thousands; by tokens the answers would not count.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from lcconvert.convert.corpus import Corpus
from lcconvert.convert.extend_config import REPLAY_TOKENS, ExtendConfig, Stage
from lcconvert.convert.extend_plan import Cost, card_here
from lcconvert.convert.host_adamw import HostAdamW
from lcconvert.convert.lora import add_lora, merge_lora
from lcconvert.convert.loss import weighted_cross_entropy, weighted_divergence
from lcconvert.convert.parallel import Processes, make_accelerator, sharding_asked, whole_weights
from lcconvert.convert.prefix_tuning import Prefix, hidden_after, read_prefix
from lcconvert.convert.progress import progress
from lcconvert.convert.rows import StageRows
from lcconvert.convert.shards import Shards
from lcconvert.convert.shelf import Shelf
from lcconvert.convert.stopping import SavingTimes, stop_at_border
from lcconvert.convert.streamed import Streaming, streamed_hidden
from lcconvert.convert.trainable import compute_dtype, make_trainable
from lcconvert.convert.training_log import TrainingLog
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError
from lcconvert.runtime.model import Decoder
from lcconvert.runtime.sidecar import AttentionPolicy
from lcconvert.runtime.tokenizer import Tokenizer

STATE = "training_state"  # in the work folder; gone from the finished artifact
HOW_TO_RESUME = "repeat the same command to go on from there"
_REPLAY_PIECES = 32  # short pieces in one forward pass: 64K tokens at most
_NEWER, _OLDER, _MARK = f"{STATE}.new", f"{STATE}.old", "progress.json"


class LossModule(nn.Module):
    """The training step as one module, so that accelerate sees every use of the weights inside one forward."""

    def __init__(self, decoder: Decoder, checkpoint_layers: bool, teacher: Decoder | None = None):
        super().__init__()
        self.decoder = decoder
        self.checkpoint_layers = checkpoint_layers
        self.shards = Shards()  # what is held here of every row
        self.streaming: Streaming | None = None  # None: the decoder's own pass
        self._teacher = (teacher,)  # in a tuple, so that its weights are neither trained nor saved

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        weights: torch.Tensor,
        replay: torch.Tensor,
        prefix: Prefix | None = None,
    ) -> torch.Tensor:
        """ids and positions int64 [B, T], weights fp32 [B, T] over the tokens to predict, replay bool [B] -> mean loss.

        The loss of a replayed row is its mean divergence from the teacher, in nats. With `prefix`, other rows go on
        after it, each by itself and whole, and their positions are not read. Where rows are shared, this is the part
        of the loss that is computed here times the number that share it.
        """
        parts = []
        if not replay.all():
            kept = ~replay
            # next tokens [B, T]; the first token is nobody's next, and the weight that says so is now the last
            targets, counted = ids[kept].roll(-1, 1), weights[kept].roll(-1, 1) / len(ids)
            if prefix is None:
                rows, places, targets, counted = map(self.shards.local, (ids[kept], positions[kept], targets, counted))
                counted = counted * self.shards.size
                hidden = self._hidden(rows, places, self.shards)
            else:
                hidden = hidden_after(self.decoder, prefix, ids[kept])
            parts.append(
                weighted_cross_entropy(
                    hidden.flatten(0, 1), self.decoder.head_weight, targets.flatten(), counted.flatten()
                )
            )
        if replay.any():
            parts.append(self._divergence(ids[replay]) * (replay.sum() / len(ids)))
        return torch.stack(parts).sum()

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, shards: Shards) -> torch.Tensor:
        """int64 [B, T] -> hidden states after the final norm [B, T, H], of rows shared as `shards` says."""
        if self.streaming is not None:
            return streamed_hidden(self.decoder, ids, positions, self.streaming, shards.attend_of)
        hidden: torch.Tensor = self.decoder(
            ids, positions, checkpoint_layers=self.checkpoint_layers, attend_of=shards.attend_of
        )
        return hidden

    def _divergence(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean KL(teacher || model) over pieces of the rows [R, T], each read from position 0 by both.

        Where rows are shared, pieces stay whole and each process takes some."""
        (teacher,) = self._teacher
        assert teacher is not None
        size = min(REPLAY_TOKENS, teacher.spec.max_position, ids.shape[1])
        pieces = ids[:, : ids.shape[1] // size * size].reshape(-1, size)
        share = self.shards.size / pieces.numel()
        pieces, real = self.shards.dealt(pieces)
        with torch.no_grad():
            wanted = torch.cat([teacher(piece) for piece in pieces.split(_REPLAY_PIECES)])
        places = torch.arange(size, device=ids.device).expand_as(pieces)
        batches = zip(pieces.split(_REPLAY_PIECES), places.split(_REPLAY_PIECES))
        hidden = torch.cat([self._hidden(piece, place, Shards()) for piece, place in batches])
        weights = (real * share).repeat_interleave(size)
        return weighted_divergence(
            hidden.flatten(0, 1), self.decoder.head_weight, wanted.flatten(0, 1), teacher.head_weight, weights
        )


def train(
    decoder: Decoder,
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: ExtendConfig,
    folder: Path,
    source: str,
    teacher: Decoder | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """Trains `decoder` (float32, on its device); log and plot go to `folder`/training, checkpoints beside it.

    Resumes from a checkpoint in `folder` made with the same settings, data and `source` (a digest of the weights that
    training started from); UserError names the first setting that differs. `teacher` is the original model, where rows
    are replayed. CheckFailed when the loss stops being finite, Interrupted after Ctrl-C, both with the last checkpoint
    kept. Returns, in every process, the trained decoder and what provenance records.
    """
    device = decoder.head_weight.device
    mixed = "bf16" if compute_dtype(config, device) == torch.bfloat16 else "no"
    accelerator = make_accelerator(device, mixed)
    processes = Processes(accelerator)
    if processes.sharded_weights and any(stage.questions for stage in config.plan):
        raise UserError("a stage with questions reads with whole weights; start accelerate without FSDP for it")
    cost = Cost(decoder.spec, _unsharded(config, processes), card_here(device), processes.count, sharding_asked())
    resolved = {
        "host_optimizer": cost.host_optimizer,
        "streamed": [bool(cost.memory(stage).keeps) for stage in config.plan],
        "sharded": processes.sharded_weights,
    }
    identity = {**config.training_identity(), **resolved, "text": corpus.sha256, "source": source}
    identity = json.loads(json.dumps(identity))
    own_optimizer = make_trainable(decoder, config, host_optimizer=cost.host_optimizer)
    decoder.train()
    module = LossModule(decoder, config.gradient_checkpointing, teacher)
    model, optimizer = accelerator.prepare(module, own_optimizer)
    done = _resume(accelerator, folder, identity)
    log = TrainingLog(folder / "training", done, writes=processes.writes)
    total = sum(stage.steps for stage in config.plan)
    step = first_step = first_row = first_token = 0

    saves = SavingTimes(config.save_every)
    with stop_at_border() as stop, progress("training", total, "steps", shown=processes.writes) as bar:
        bar.advance(done)
        for number, stage in enumerate(config.plan):
            rows = StageRows(stage, corpus, tokenizer, config.context, config.seed, first_row, first_token)
            step = max(done, first_step)
            module.streaming = streaming_of(cost, stage, device)
            steps = _reading_steps if stage.questions else _stage_steps
            for result in steps(processes, model, optimizer, rows, config.clip_norm, step - first_step):
                if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                    raise CheckFailed(_not_finite(step + 1, folder, rows.origins(step - first_step)))
                step += 1
                tokens = first_token + (step - first_step) * (stage.rows // stage.steps) * stage.seq_len
                log.add(step=step, stage=number, tokens=tokens, **asdict(result))
                bar.note(f"loss {result.loss:.3f}")
                bar.advance()
                stopping = processes.any(stop.is_set())
                if stopping or (processes.any(saves.due(step)) and step < total):
                    with saves.saving():
                        _save(accelerator, folder, step, identity)
                if stopping:
                    raise Interrupted(f"stopped after step {step} of {total}, saved in {folder}; {HOW_TO_RESUME}")
            if module.streaming is not None:
                module.streaming.shelf.close()
            first_step += stage.steps
            first_row += stage.rows
            first_token += stage.rows * stage.seq_len
    log.plot()
    if processes.sharded_weights:
        decoder = _whole(decoder, config)
    if isinstance(own_optimizer, HostAdamW):
        own_optimizer.close()
    accelerator.free_memory()
    if config.lora_rank:
        merge_lora(decoder)
    decoder.eval()
    last = [row["loss"] for row in log.rows[-10:]]
    facts = {
        "steps": total,
        "tokens": first_token,
        "loss_of_last_steps": sum(last) / max(1, len(last)),
        "data_sha256": corpus.sha256,
        "held_out_documents": corpus.held_out,
        "skipped": len(corpus.skipped),
    }
    return decoder, facts


def _whole(decoder: Decoder, config: ExtendConfig) -> Decoder:
    """A decoder of whole weights, adapters still apart, from one whose weights are sharded."""
    weights = {name: whole_weights(weight) for name, weight in decoder.state_dict().items()}
    with torch.device("meta"):
        fresh = Decoder(decoder.spec)
        if config.lora_rank:
            add_lora(fresh, config.lora_rank, config.lora_alpha, config.lora_train, config.seed)
    fresh.load_state_dict(weights, assign=True)
    return fresh


def _unsharded(config: ExtendConfig, processes: Processes) -> ExtendConfig:
    """The settings, of which sharded weights, whole only inside their own layers, leave no choice of some."""
    if not processes.sharded_weights:
        return config
    if config.streamed or config.host_optimizer:
        raise UserError("streamed and host_optimizer are for whole weights; leave them out, or start without FSDP")
    return config.model_copy(update={"streamed": False, "host_optimizer": False})


def streaming_of(cost: Cost, stage: Stage, device: torch.device) -> Streaming | None:
    """How the passes of `stage` are streamed, None where they are plain."""
    keeps = cost.memory(stage).keeps
    return Streaming(Shelf(device), keeps, cost.config.tile) if keeps else None


@dataclass(frozen=True)
class StepResult:
    loss: float
    lr: float
    grad_norm: float


def _stage_steps(
    processes: Processes,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: StageRows,
    clip_norm: float,
    done: int,
) -> Iterator[StepResult]:
    """Trains on the rows of one stage after its first `done` steps, one result a step.

    A loss or gradient that is not finite ends it with the weights as they were before that step.
    """
    stage, step, accelerator = rows.stage, done, processes.accelerator
    if done >= stage.steps:
        return
    accelerator.gradient_accumulation_steps = stage.accumulate
    loader = processes.loader(rows, stage.batch_size)
    accelerator.unwrap_model(model).shards = processes.shards(stage.batch_size)
    losses: list[float] = []
    for batch in accelerator.skip_first_batches(loader, done * stage.accumulate):
        with accelerator.accumulate(model):
            loss = model(**batch)
            losses.append(processes.mean(loss))
            accelerator.backward(loss)
            if not accelerator.sync_gradients:
                continue
            lr = learning_rate(stage, step)
            norm = accelerator.clip_grad_norm_(model.parameters(), clip_norm).item()
            result = StepResult(sum(losses) / len(losses), lr, norm)
            if not (math.isfinite(result.loss) and math.isfinite(norm)):
                yield result
                return
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        yield result
        step += 1
        losses = []


def _reading_steps(
    processes: Processes,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: StageRows,
    clip_norm: float,
    done: int,
) -> Iterator[StepResult]:
    """Like `_stage_steps` for a stage with questions: a step is one text and as many updates as its questions fill.

    Its loss is the mean over updates, each measured before the weights have met its questions.
    """
    stage, accelerator = rows.stage, processes.accelerator
    module = accelerator.unwrap_model(model)
    module.shards = processes.shards(1)  # of the row that is replayed
    decoder = module.decoder
    device = decoder.head_weight.device
    policy = AttentionPolicy(kind=stage.prefix_attention)
    accelerator.gradient_accumulation_steps = 1
    for step in range(done, stage.steps):
        text, updates = rows.reading(step)
        with accelerator.autocast():
            compute = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
            prefix = read_prefix(decoder, text.to(device), policy, compute, module.shards)
        lr = learning_rate(stage, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses, norms = [], []
        for number, batch in enumerate(updates):
            loss = model(**send_to_device(processes.dealt(batch), device), prefix=prefix)
            losses.append(processes.mean(loss))
            accelerator.backward(loss)
            if stage.replay_share:
                held = model(**send_to_device(rows.replay(step, number), device))
                accelerator.backward(stage.replay_share * held)
            norms.append(accelerator.clip_grad_norm_(model.parameters(), clip_norm).item())
            if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
                yield StepResult(losses[-1], lr, norms[-1])
                return
            optimizer.step()
            optimizer.zero_grad()
        del prefix  # before the next one is read: each may be half of the memory
        yield StepResult(sum(losses) / len(losses), lr, max(norms))


def learning_rate(stage: Stage, step: int) -> float:
    """Rate of the stage's step (from 0): linear warm-up, then a cosine from `lr` to a tenth of it at the last step."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / (stage.warmup + 1)
    through = (step - stage.warmup) / max(1, stage.steps - stage.warmup - 1)
    return stage.lr * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, through))))


def _save(accelerator: Accelerator, folder: Path, step: int, identity: dict[str, Any]) -> None:
    """A checkpoint is complete when its mark is there, and the one before it stays until then."""
    state, newer, older = folder / STATE, folder / _NEWER, folder / _OLDER
    if accelerator.is_main_process:
        shutil.rmtree(newer, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(newer))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (newer / _MARK).write_text(json.dumps({"step": step, "identity": identity}))
        if state.exists():
            state.rename(older)
        newer.rename(state)
        shutil.rmtree(older, ignore_errors=True)
    accelerator.wait_for_everyone()


def saved_step(folder: Path) -> int:
    """The step of the newest complete checkpoint in `folder`, 0 when there is none."""
    state = _newest(folder)
    return int(json.loads((state / _MARK).read_text())["step"]) if state else 0


def remove_state(folder: Path) -> None:
    for name in (STATE, _NEWER, _OLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def _newest(folder: Path) -> Path | None:
    states = (folder / name for name in (STATE, _NEWER, _OLDER))
    return next((state for state in states if (state / _MARK).is_file()), None)


def _resume(accelerator: Accelerator, folder: Path, identity: dict[str, Any]) -> int:
    state = _newest(folder)
    if state is None:
        return 0
    saved = json.loads((state / _MARK).read_text())
    for key, now in identity.items():
        if (then := saved["identity"].get(key)) != now:
            raise UserError(
                f"{folder} holds a training with another {key} ({then!r}, now {now!r}); "
                "repeat the command that it was started with, or remove that folder to start again"
            )
    accelerator.load_state(str(state))
    return int(saved["step"])


def _not_finite(step: int, folder: Path, places: list[str]) -> str:
    kept = saved_step(folder)
    files = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
    left = (
        f"the checkpoint of step {kept} is kept in {folder / STATE}" if kept else "no checkpoint had been written yet"
    )
    return (
        f"the loss or its gradient at step {step}, on text of {files}, is not finite; {left}; "
        "look at that text, or start again with a lower learning rate"
    )
