"""LoRA training on all ranks.

Frozen weights are whole on each rank if they fit, and sharded otherwise; what is learnt differs by rounding only.

There are two losses, both means over the tokens of an optimizer step: that of the rows' labels, and the divergence from
a dense model whose hidden states come with the rows. Units may be masked during training (LoRAPrune).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.utils import logging

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.lora_adapter import PEFT_NAME, PEFT_PREFIX, lora_targets
from hfprune_dist.checkpoints.tensor_files import is_usable
from hfprune_dist.config.schema import RuntimeConfig, Sharding
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.core.devices import send
from hfprune_dist.core.losses import summed_divergence
from hfprune_dist.data.schedule import IGNORED, RowReader, Schedule
from hfprune_dist.distributed.frozen_model import DecidedSharding, FrozenModel, placement_here
from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import Placement, Sizes
from hfprune_dist.kinds.training import training_need
from hfprune_dist.models.loading import after_head, packed_rows
from hfprune_dist.models.memory_efficient_backward import keep_no_gathered_weights
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.structures.kept import Shape
from hfprune_dist.training.loraprune import UnitMasks, scores_of_units
from hfprune_dist.training.optimizer import LoraOptimizer
from hfprune_dist.training.snapshot import LossLine, Snapshot
from hfprune_dist.training.teacher_states import DENSE
from hfprune_dist.training.trackers import Trackers


@dataclass(frozen=True)
class FineTuning:
    """What to train, on which rows, and how far.

    Attributes:
        section: the part of the configuration that the settings come from, for progress and messages.
        rows: reads a row by its number.
        schedule: which rows each step sees.
        total_steps: optimizer steps of the whole training, over all attempts.
        warmup_steps: the first of these steps, in which the learning rate rises from 0.
        distills: whether rows come with a dense model's final hidden states, and the loss is the divergence from it.
        masked_to: the units that are to be left at the end, in all layers (LoRAPrune); None for all.
    """

    checkpoint: Checkpoint
    section: str
    settings: LoraTraining
    seed: int
    rows: RowReader
    schedule: Schedule
    total_steps: int
    warmup_steps: int
    distills: bool = False
    masked_to: Shape | None = None

    def learning_rate(self, step: int) -> float:
        """That of an optimizer step, counted from 0: linear warm-up, then a cosine to zero."""
        warmup, peak = self.warmup_steps, self.settings.learning_rate
        if step < warmup:
            return peak * step / warmup
        return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))


def fine_tune(
    task: FineTuning,
    world: World,
    runtime: RuntimeConfig,
    progress: Progress,
    interruption: Interruption,
    file: Path,
    run_folder: Path,
) -> Snapshot:
    """Train from the snapshot of an earlier attempt, if any, to the last step, and return that step's snapshot.

    Args:
        file: of the newest snapshot.
        run_folder: where trackers that write files put them; its name is that of the run.

    Raises:
        UserError: if the loss or the gradient is no longer finite.
        Interrupted: after a step and its snapshot, if any rank was asked to end early.
    """
    section = task.section
    start = Snapshot.read(file) if world.on_rank0(lambda: is_usable(file)) else Snapshot()
    if start.step == task.total_steps:
        return start
    training = Training(task, start, world, place_training(task, runtime.sharding, world))
    losses = list(start.losses)
    with closing(Trackers(runtime.report_to if world.is_first else (), run_folder)) as trackers:
        for step in range(start.step + 1, task.total_steps + 1):
            values = training.step(step - 1)
            for key, value in values.items():
                if not math.isfinite(value):
                    raise UserError(
                        f"{section}: {key} is {value} at step {step}; lower {section}.learning_rate, or raise "
                        f"{section}.warmup_steps; at step 1, check the checkpoint's weights"
                    )
            values = {"epoch": round(step / task.schedule.steps_per_epoch, 4), **values}
            losses.append({"step": step, **values})
            trackers.report(values, step)
            progress.update(section, step, task.total_steps)
            if world.is_first:
                print(f"{section}: step {step}/{task.total_steps}, loss {values['loss']:.4f}", flush=True)
            interrupted = interruption.agreed(world)
            if step % runtime.save_every_steps == 0 or step == task.total_steps or interrupted:
                world.on_rank0(lambda step=step: Snapshot(step, training.state(), losses).save(file))  # type: ignore[misc]
            if interrupted:
                raise Interrupted
    return Snapshot.read(file)


class Training:
    """A model with LoRA layers in training, on one rank.

    Args:
        start: the snapshot to go on from.
        placement: where frozen weights lie.
    """

    def __init__(self, task: FineTuning, start: Snapshot, world: World, placement: Placement) -> None:
        logging.set_verbosity_error()
        self._task, self._world = task, world
        self._dtype: torch.dtype = getattr(torch, task.settings.dtype)
        sharding: DecidedSharding = "replicate" if placement.whole else "zero3"
        rows = task.settings.micro_batch_size
        self._frozen = FrozenModel(task.checkpoint, self._dtype, rows, sharding, world, backward_of_body=task.distills)
        model: Any = self._frozen.module
        if not placement.whole:
            keep_no_gathered_weights(model)
        self._optimizer = LoraOptimizer(add_lora(model, task), task.settings.weight_decay, start)
        self._after = after_head(task.checkpoint)
        self._masks = None
        if task.masked_to is not None:
            self._masks = UnitMasks(task.checkpoint.structures, task.masked_to, start.tensors)
            self._masks.attach(model, world.device, self._dtype)
        if placement.checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        gc.freeze()  # or Python walks all modules and parameters again and again: a seventh of the time on CPU

    def step(self, step: int) -> LossLine:
        """Do one optimizer step, counted from 0, and return its mean loss per token and what else is told of it."""
        task, world, rate = self._task, self._world, self._task.learning_rate(step)
        batches = list(self._micro_batches(step))
        tokens = torch.tensor(sum(batch.tokens for batch in batches))
        world.all_reduce(tokens)  # of all ranks
        loss = torch.zeros((), device=world.device)
        for batch in batches:
            torch.manual_seed(batch.seed)  # dropout depends on a row's place alone
            term = self._loss(batch) / int(tokens)
            loss += term.detach()
            term.backward()
            self._optimizer.add_gradients()
        self._optimizer.sum_over_ranks(world)
        if self._masks is not None:
            scores = scores_of_units(self._frozen, self._masks.kinds_by_layer, self._optimizer)
            self._masks.update(scores, step + 1, task.total_steps)
        world.all_reduce(loss)
        return {"loss": float(loss), "learning_rate": rate, "grad_norm": self._optimizer.step(rate)}

    def _micro_batches(self, step: int) -> Iterator[_MicroBatch]:
        """The micro-batches of an optimizer step on this rank, equally many on each; free places have a row without
        loss.
        """
        task, at_once = self._task, self._task.settings.micro_batch_size
        numbers, of_all = task.schedule.rows_of(step), at_once * self._world.size
        for turn in range(-(-task.schedule.largest_step // of_all)):
            first = turn * of_all + self._world.rank * at_once
            rows = [
                task.rows(numbers[slot] if slot < len(numbers) else numbers[0])
                for slot in range(first, first + at_once)
            ]
            counted = min(max(len(numbers) - first, 0), at_once)
            for row in rows[counted:]:
                row["labels"].fill_(IGNORED)
            tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            tokens = counted * tensors["input_ids"].shape[1]
            if not task.distills:
                with_loss_BT = tensors["labels"] != IGNORED
                tokens = int(with_loss_BT[:, 1:].sum())
                # Nothing depends on what comes after the last token with a loss.
                end = int(with_loss_BT.any(dim=0).nonzero().max()) + 1 if tokens else 2
                tensors = {name: tensor[:, :end] for name, tensor in tensors.items()}
            yield _MicroBatch(tensors, counted, tokens, int(digest_of([task.seed, step, first])[:15], 16))

    def _loss(self, batch: _MicroBatch) -> Tensor:
        """The sum of a micro-batch's losses."""
        device, model = self._world.device, self._frozen.module
        tensors = {
            name: send(tensor.to(self._dtype if tensor.is_floating_point() else tensor.dtype), device)
            for name, tensor in batch.tensors.items()
            if name != "labels"
        }
        if self._task.distills:
            dense_BTC, body = tensors.pop(DENSE), self._task.checkpoint.family.body_of(model)
            both = body(**tensors, use_cache=False).last_hidden_state, dense_BTC
            hidden_NC, dense_NC = (states_BTC[: batch.counted].flatten(0, 1) for states_BTC in both)
            with self._frozen.head() as (weight_VC, bias_V):
                return summed_divergence(hidden_NC, dense_NC, weight_VC, bias_V, self._after)
        # On the host, which would have to wait for a GPU to find them.
        targets_N = nn.functional.pad(batch.tensors["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
        places_N = (targets_N != IGNORED).nonzero().flatten()
        texts = packed_rows(batch.tensors.get("position_ids"), device)
        with texts, self._frozen.head_at(places_N):  # with a cache, rows would not count as packed
            logits_NV = model(**tensors, use_cache=False).logits[0].float()
        return nn.functional.cross_entropy(logits_NV, send(targets_N[places_N], device), reduction="sum")

    def state(self) -> dict[str, Tensor]:
        """A snapshot's tensors, on the CPU."""
        masks = {} if self._masks is None else self._masks.state()
        return masks | self._optimizer.state()


@dataclass(frozen=True)
class _MicroBatch:
    """Rows of a forward of one rank, stacked; the first ``counted`` have a loss, over so many ``tokens``."""

    tensors: dict[str, Tensor]
    counted: int
    tokens: int
    seed: int


def place_training(task: FineTuning, sharding: Sharding, world: World) -> Placement:
    """Decide together how to place a training in the free memory."""
    settings, sizes = task.settings, Sizes.from_checkpoint(task.checkpoint)
    rows, tokens, masks = settings.micro_batch_size, len(task.rows(0)["input_ids"]), task.masked_to is not None
    need = training_need(settings, sizes, rows, tokens, distills=task.distills, masks=masks)
    return placement_here(need, sharding, world)


def add_lora(model: nn.Module, task: FineTuning) -> dict[str, nn.Parameter]:
    """Add LoRA layers to a frozen model; return their parameters by their names in a ``PeftModel``."""
    torch.manual_seed(task.seed)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=task.settings.rank,
        lora_alpha=task.settings.alpha,
        lora_dropout=task.settings.dropout,
        target_modules=lora_targets(task.checkpoint.family, task.checkpoint.ranks),
    )
    inject_adapter_in_model(adapter, model, PEFT_NAME)
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {f"{PEFT_PREFIX}{name}": parameter for name, parameter in trained}
