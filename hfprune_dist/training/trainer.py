"""LoRA training on all ranks: the Hugging Face Trainer, peft and DeepSpeed ZeRO-3.

Frozen weights are whole on each rank if they fit, and sharded otherwise; what is learnt differs by rounding only.

There are two losses: that of the rows' labels, and the divergence from a dense model whose hidden states come with the
rows. Units may be masked during training (LoRAPrune).

A snapshot holds only what changes: the LoRA weights and AdamW's two moments, float32 and whole, the losses and the
masks. Rows, learning rate and dropout follow from the optimizer step. So training can resume on any number of ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback

from hfprune_dist.data.schedule import ScheduledRows
from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.distributed.world import World
from hfprune_dist.distributed.zero3 import before_each_step, init_deepspeed, keep_float32, keep_gathered, limit_timeouts
from hfprune_dist.methods.loraprune import masks_after
from hfprune_dist.models.after_head import DistillingHead, after_head
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.training.engine_setup import (
    MAX_GRAD_NORM,
    keep_whole,
    load_trainable_model,
    place_training,
    prepare_process,
    training_arguments,
)
from hfprune_dist.training.fine_tuning import FineTuning, finite_values, learning_rate_share
from hfprune_dist.training.loraprune import UnitMasks, scores_of_units
from hfprune_dist.training.snapshots import MOMENTS, LossLine, Snapshot, Snapshots, read_snapshot
from hfprune_dist.training.teacher_states import DENSE


def fine_tune(task: FineTuning, folder: Path, world: World, progress: Progress, interruption: Interruption) -> Snapshot:
    """Train from the newest snapshot in ``folder``, if any, to the last step, and return that step's snapshot.

    Raises:
        UserError: if the loss or the gradient is no longer finite.
        Interrupted: after a step and its snapshot, if any rank was asked to end early.
    """
    snapshots = Snapshots(folder)

    def newest() -> Snapshot | None:
        file = world.on_rank0(snapshots.newest)
        return None if file is None else read_snapshot(file)

    trained = newest()
    if trained is None or trained.step < task.total_steps:
        _train(replace(task, start=trained), _Attempt(snapshots, world, progress, interruption))
        trained = newest()
    assert trained is not None
    assert trained.step == task.total_steps
    return trained


@dataclass(frozen=True)
class _Attempt:
    """What an attempt at a training is given besides its task; ``whole`` as in ``Placement``, once that is decided."""

    snapshots: Snapshots
    world: World
    progress: Progress
    interruption: Interruption
    whole: bool = False


def _train(task: FineTuning, attempt: _Attempt) -> None:
    prepare_process()
    world = attempt.world
    rows_at_once = task.settings.micro_batch_size * world.size
    rows = ScheduledRows(task.rows, task.schedule, task.first_step, task.total_steps, multiple_of=rows_at_once)
    placement = place_training(task, world)
    init_deepspeed(world)
    if placement.whole:
        model = load_trainable_model(task).to(world.device)
        keep_whole(model)
    arguments = training_arguments(task, rows.slots // rows_at_once, attempt.snapshots.folder, placement, world)
    if not placement.whole:
        model = load_trainable_model(task)
        keep_float32(model.get_submodule("base_model.model"), task.checkpoint, world.device)
    assert not (task.distills and task.masked_to is not None), "masks are for the loss of labels"
    trains = _DistillingTrainer if task.distills else _LoraTrainer if task.masked_to is None else _MaskingTrainer
    trainer = trains(task, replace(attempt, whole=placement.whole), model=model, args=arguments, train_dataset=rows)
    gc.freeze()  # or Python walks all modules and parameters again and again: a seventh of the time on CPU
    trainer.train()


class _LoraTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, with dropout that depends only on a row's place, and with our schedule, log and snapshots."""

    lr_scheduler: LambdaLR | None

    def __init__(self, task: FineTuning, attempt: _Attempt, **trainer_arguments: Any) -> None:
        super().__init__(**trainer_arguments, data_collator=_stack, callbacks=[_OnceReady(self._once_ready)])
        self.remove_callback(PrinterCallback)
        # Some models of images and text deny that they can divide their loss by all tokens of a step. They can; else it
        # would be a mean over each micro-batch, which is NaN if that has no label.
        self.model_accepts_loss_kwargs = True
        self._task = task
        self._attempt = attempt
        self._world = attempt.world
        self._losses: list[LossLine] = [] if task.start is None else list(task.start.losses)

    def _once_ready(self, engine: nn.Module) -> None:
        """Do what can be done only once the engine exists."""
        if self._task.start is not None:
            _restore(engine, self._task.start, self._world.rank)
        if self._attempt.whole:
            keep_gathered(engine)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            task = self._task
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: learning_rate_share(task.first_step + step, task.warmup_steps, task.total_steps),
            )
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        place = inputs.pop("places")[0]
        torch.manual_seed(int(digest_of([self._task.seed, *place])[:15], 16))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called after each optimizer step with its mean loss per token, and at the end without a loss."""
        if "loss" not in logs:
            return
        task, step = self._task, self._task.first_step + self.state.global_step
        epoch = round(step / task.schedule.steps_per_epoch, 4)
        line: LossLine = {"step": step, "epoch": epoch, **finite_values(logs, step, task.section)}
        self._losses.append(line)
        self._report(line)
        self._attempt.progress.update(task.section, step, task.total_steps)
        if self._world.is_first:
            print(f"{task.section}: step {step}/{task.total_steps}, loss {logs['loss']:.4f}", flush=True)
        interrupted = self._attempt.interruption.agreed(self._world)
        if step % task.save_every_steps == 0 or step == task.total_steps or interrupted:
            self._save_snapshot(step)
        if interrupted:
            raise Interrupted

    def _report(self, line: LossLine) -> None:
        """Pass the record of a step to the trackers, which count steps as we do: over all attempts."""
        values = {key: value for key, value in line.items() if key != "step"}
        state = replace(self.state, global_step=line["step"])
        self.callback_handler.on_log(self.args, state, self.control, values)

    def _save_snapshot(self, step: int) -> None:
        """Gather the state parameter by parameter and write it on rank 0; the others wait, so that none runs ahead."""
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, parameter in _trained(self.model):
            whole = safe_get_full_fp32_param(parameter)
            whole_moments = {f"{name}.{moment}": safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if self._world.is_first:
                weights[name] = whole.cpu()
                moments |= {key: tensor.cpu() for key, tensor in whole_moments.items()}
        snapshot = Snapshot(step, weights, moments, self._losses, self._masked_units())
        self._world.on_rank0(lambda: self._attempt.snapshots.save(snapshot))

    def _masked_units(self) -> dict[str, Tensor]:
        return {}


class _DistillingTrainer(_LoraTrainer):
    """A trainer whose loss is the divergence from a dense model: a mean over the tokens of a step, in nats."""

    loss_is_scaled_for_ga = True  # divided by all tokens of a step, not by those of a micro-batch

    def __init__(self, task: FineTuning, attempt: _Attempt, *, model: Any, **trainer_arguments: Any) -> None:
        super().__init__(task, attempt, model=model, **trainer_arguments)
        self._head = DistillingHead(model.get_base_model(), task.checkpoint.family, after_head(task.checkpoint))
        self._tokens_of_step = self._counted_rows = 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step, _ = inputs["places"][0]
        rows = len(self._task.schedule.rows_of(step))
        self._tokens_of_step = rows * inputs["input_ids"].shape[1]
        self._counted_rows = sum(slot < rows for _, slot in inputs["places"])
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        del inputs["labels"]  # so that the model computes no loss of its own
        self._head.expect(inputs.pop(DENSE), self._counted_rows)
        divergence: Tensor = model(**inputs).logits
        # DeepSpeed takes the mean of the ranks' gradients.
        return divergence * (self._world.size / self._tokens_of_step)


class _MaskingTrainer(_LoraTrainer):
    """LoRAPrune: units are scored in every step, and those with the lowest averages are masked every few steps."""

    def __init__(self, task: FineTuning, attempt: _Attempt, *, model: Any, **trainer_arguments: Any) -> None:
        super().__init__(task, attempt, model=model, **trainer_arguments)
        assert task.masked_to is not None
        state = None if task.start is None else task.start.units
        self._masks = UnitMasks(task.checkpoint.structures, task.masked_to, state)
        self._scored = model.get_base_model()
        self._masks.attach(self._scored, self._world.device, getattr(torch, task.settings.dtype))

    def _once_ready(self, engine: nn.Module) -> None:
        super()._once_ready(engine)
        before_each_step(engine, self._score_and_mask)

    def _score_and_mask(self) -> None:
        """Score and mask, after backward has added up gradients over all ranks, and before the optimizer's step."""
        step = self._task.first_step + self.state.global_step + 1
        layers, whole = self._masks.kinds_by_layer, self._attempt.whole
        scores = scores_of_units(self._scored, layers, self._world, whole=whole, largest_norm=MAX_GRAD_NORM)
        for (kind, layer), scores_U in scores.items():
            self._masks.average(kind, layer, scores_U)
        if masks_after(step, self._task.total_steps):
            self._masks.mask(step, self._task.total_steps)

    def _masked_units(self) -> dict[str, Tensor]:
        return self._masks.state()


class _OnceReady(TrainerCallback):  # type: ignore[misc]
    """Calls an action with the model in training, once its engine exists."""

    def __init__(self, action: Callable[[nn.Module], None]) -> None:
        self._action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        limit_timeouts()
        self._action(trained["model"])


def _restore(model: nn.Module, start: Snapshot, rank: int) -> None:
    """Put a snapshot's float32 weights and moments into the sharded optimizer of a model that is ready to train."""
    parameters = _trained(model)
    zero_optimizer = parameters[0][1]._z3_optimizer
    for flat in zero_optimizer.fp32_partitioned_groups_flat:
        # torch's AdamW would make its state only in its first step.
        moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        zero_optimizer.optimizer.state[flat] = {"step": torch.tensor(float(start.step)), **moments}
    for name, parameter in parameters:
        safe_set_local_fp32_param(parameter, _shard(start.weights[name], parameter, rank))
        for moment in MOMENTS:
            shard = _shard(start.moments[f"{name}.{moment}"], parameter, rank)
            safe_set_local_optimizer_state(parameter, shard, moment)


def _shard(whole: Tensor, parameter: Any, rank: int) -> Tensor:
    """The part [shard_size] of a parameter-shaped tensor that ZeRO-3 keeps on a rank, padded with zeros."""
    size = parameter.ds_tensor.numel()
    part = whole.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))


def _trained(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and parameters of the LoRA layers, in an order that is the same on all ranks."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _stack(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A micro-batch: rows' tensors stacked, and their ``places``, which the host needs and no device gets."""
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "place"}
    return {**tensors, "places": [row["place"] for row in rows]}
