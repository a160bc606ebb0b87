"""LoRA training on all ranks, with peft and DeepSpeed ZeRO-3.

Frozen weights are whole on each rank if they fit, and sharded otherwise; what is learnt differs by rounding only.

There are two losses, both means over the tokens of an optimizer step: that of the rows' labels, and the divergence from
a dense model whose hidden states come with the rows. Units may be masked during training (LoRAPrune).
"""

from __future__ import annotations

import gc
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.checkpoints.tensor_files import is_usable
from hfprune_dist.config.schema import RuntimeConfig, Sharding
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.data.schedule import IGNORED, RowReader, Schedule
from hfprune_dist.distributed.frozen_model import placement_here
from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.distributed.world import World
from hfprune_dist.distributed.zero3 import init_deepspeed, keep_float32, keep_gathered, limit_timeouts, zero3_config
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import Placement, Sizes
from hfprune_dist.kinds.training import training_need
from hfprune_dist.models.after_head import DistillingHead, after_head
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.structures.kept import Shape
from hfprune_dist.training.loraprune import UnitMasks, scores_of_units
from hfprune_dist.training.snapshot import LossLine, Snapshot, gathered_state, restore_state
from hfprune_dist.training.teacher_states import DENSE
from hfprune_dist.training.trackers import Trackers

MAX_GRAD_NORM = 1.0  # the default of transformers' Trainer, which the published recipe doesn't change


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


@dataclass(frozen=True)
class Attempt:
    """One attempt at a training, on one rank.

    Attributes:
        snapshot: file of the newest snapshot, from which the next attempt resumes.
        run_folder: where trackers that write files put them; its name is that of the run.
    """

    world: World
    runtime: RuntimeConfig
    progress: Progress
    interruption: Interruption
    snapshot: Path
    run_folder: Path


def fine_tune(task: FineTuning, attempt: Attempt) -> Snapshot:
    """Train from the snapshot of an earlier attempt, if any, to the last step, and return that step's snapshot.

    Raises:
        UserError: if the loss or the gradient is no longer finite.
        Interrupted: after a step and its snapshot, if any rank was asked to end early.
    """
    world, runtime, file, section = attempt.world, attempt.runtime, attempt.snapshot, task.section
    start = Snapshot.read(file) if world.on_rank0(lambda: is_usable(file)) else Snapshot()
    if start.step == task.total_steps:
        return start
    training = Training(task, start, world, place_training(task, runtime.sharding, world))
    losses = list(start.losses)
    with closing(Trackers(runtime.report_to if world.is_first else (), attempt.run_folder)) as trackers:
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
            attempt.progress.update(section, step, task.total_steps)
            if world.is_first:
                print(f"{section}: step {step}/{task.total_steps}, loss {values['loss']:.4f}", flush=True)
            interrupted = attempt.interruption.agreed(world)
            if step % runtime.save_every_steps == 0 or step == task.total_steps or interrupted:
                tensors = training.state()
                world.on_rank0(lambda step=step, tensors=tensors: Snapshot(step, tensors, losses).save(file))  # type: ignore[misc]
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
        # DeepSpeed decorates an optimizer that isn't used here with torch.compile, which takes seconds to import.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        # DeepSpeed calls collectives by their old names, and torch warns at each call.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        self._task, self._world = task, world
        self._dtype: torch.dtype = getattr(torch, task.settings.dtype)
        self._whole = placement.whole
        init_deepspeed(world)
        model = self._load(start, placement)
        base: Any = model.get_base_model()
        self._masks = self._head = None
        if task.masked_to is not None:
            self._masks, self._scored = UnitMasks(task.checkpoint.structures, task.masked_to, start.tensors), base
            self._masks.attach(base, world.device, self._dtype)
        if task.distills:
            self._head = DistillingHead(base, task.checkpoint.family, after_head(task.checkpoint))
        # Names and parameters of the LoRA layers, in an order that is the same on all ranks.
        self._trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [parameter for _, parameter in self._trained], weight_decay=task.settings.weight_decay
        )
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=self._config())
        limit_timeouts()
        if start.step:
            restore_state(self._trained, start, world.rank)
        if placement.whole:
            keep_gathered(self._engine)
        self._engine.train()
        gc.freeze()  # or Python walks all modules and parameters again and again: a seventh of the time on CPU

    def _load(self, start: Snapshot, placement: Placement) -> Any:
        """The model with LoRA layers, with frozen weights where they are to lie."""
        # from_pretrained shards a model while such an object exists.
        sharding = None if placement.whole else HfDeepSpeedConfig(self._config())
        model = load_trainable_model(self._task, start)
        if sharding is None:
            _keep_whole(model.to(self._world.device))
        else:
            keep_float32(model.get_submodule("base_model.model"), self._task.checkpoint, self._world.device)
        if placement.checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model

    @property
    def _slots(self) -> int:
        """Places for rows in each optimizer step, equally many on all ranks; a step may leave some free."""
        at_once = self._task.settings.micro_batch_size * self._world.size
        return -(-self._task.schedule.largest_step // at_once) * at_once

    def _config(self) -> dict[str, Any]:
        """Parameters, gradients and optimizer states sharded; gradients reduced and added up in float32.

        If frozen weights are whole, DeepSpeed doesn't manage them, and LoRA's stay gathered between optimizer steps.
        Otherwise, parameters are released right after use. To find those that backward uses again soon, DeepSpeed would
        walk over up to a billion parameters ahead for every module: 20 s in the second step, with LoRA's many modules.
        """
        zero = {"stage3_max_reuse_distance": 0}
        if self._whole:
            zero["stage3_param_persistence_threshold"] = 2**62  # more elements than any parameter has
        at_once = self._task.settings.micro_batch_size
        return {
            **zero3_config(self._dtype, at_once, **zero),
            "gradient_accumulation_steps": self._slots // (at_once * self._world.size),
            "gradient_clipping": MAX_GRAD_NORM,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
        }

    def step(self, step: int) -> LossLine:
        """Do one optimizer step, counted from 0, and return its mean loss per token and what else is told of it."""
        task, world, rate = self._task, self._world, self._task.learning_rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batches = list(self._micro_batches(step))
        tokens = torch.tensor(sum(batch.tokens for batch in batches))
        world.all_reduce(tokens)  # of all ranks
        loss = torch.zeros((), device=world.device)
        for batch in batches:
            torch.manual_seed(batch.seed)  # dropout depends on a row's place alone
            term = self._loss(batch, int(tokens))
            loss += term.detach()
            # DeepSpeed takes the mean of the ranks' gradients.
            self._engine.backward(term * world.size, scale_wrt_gas=False)
            if batch is batches[-1] and self._masks is not None:  # all ranks' gradients are added up
                layers = self._masks.kinds_by_layer
                scores = scores_of_units(self._scored, layers, world, whole=self._whole, largest_norm=MAX_GRAD_NORM)
                self._masks.update(scores, step + 1, task.total_steps)
            self._engine.step()
        world.all_reduce(loss)
        return {"loss": float(loss), "learning_rate": rate, "grad_norm": float(self._engine.get_global_grad_norm())}

    def _micro_batches(self, step: int) -> Iterator[_MicroBatch]:
        """The micro-batches of an optimizer step on this rank; free places have a row without loss."""
        task, at_once = self._task, self._task.settings.micro_batch_size
        numbers = task.schedule.rows_of(step)
        for first in range(self._world.rank * at_once, self._slots, self._world.size * at_once):
            rows = [
                task.rows(numbers[slot] if slot < len(numbers) else numbers[0])
                for slot in range(first, first + at_once)
            ]
            counted = min(max(len(numbers) - first, 0), at_once)
            for row in rows[counted:]:
                row["labels"].fill_(IGNORED)
            tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            labels = int(tensors["labels"][:, 1:].ne(IGNORED).sum())
            tokens = counted * tensors["input_ids"].shape[1] if task.distills else labels
            yield _MicroBatch(tensors, counted, tokens, int(digest_of([task.seed, step, first])[:15], 16))

    def _loss(self, batch: _MicroBatch, tokens: int) -> Tensor:
        """A micro-batch's part of the mean loss over all ``tokens`` of an optimizer step."""
        tensors = {
            name: tensor.to(self._world.device, self._dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.tensors.items()
        }
        if self._head is None:
            loss: Tensor = self._engine(**tensors, num_items_in_batch=tokens).loss
            return loss
        del tensors["labels"]  # so that the model computes no loss of its own
        self._head.expect(tensors.pop(DENSE), batch.counted)
        divergence: Tensor = self._engine(**tensors).logits
        return divergence / tokens

    def state(self) -> dict[str, Tensor]:
        """A snapshot's tensors, complete on rank 0; collective."""
        masks = {} if self._masks is None else self._masks.state()
        return masks | gathered_state(self._trained, self._world)


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


def load_trainable_model(task: FineTuning, start: Snapshot | None = None) -> Any:
    """Load the model with LoRA layers, which get a snapshot's weights if there is one."""
    model = load_causal_lm(task.checkpoint.path, getattr(torch, task.settings.dtype))
    # With a cache, transformers doesn't look for packed pairs. The body may have a configuration of its own.
    configs: list[Any] = [model.config, task.checkpoint.family.body_of(model).config]
    for config in configs:
        config.use_cache = False
        # Where a configuration asks for it, experts' load balance would enter the loss, once for every micro-batch.
        config.output_router_logits = False
    torch.manual_seed(task.seed)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=task.settings.rank,
        lora_alpha=task.settings.alpha,
        lora_dropout=task.settings.dropout,
        target_modules=lora_targets(task.checkpoint.family, task.checkpoint.ranks),
    )
    adapted = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    if start is not None:
        adapted.load_state_dict(start.weights, strict=False)
    return adapted


def _keep_whole(model: nn.Module) -> None:
    """Turn a model's frozen parameters into buffers, so that DeepSpeed shards nothing but LoRA's weights.

    The model must be on its device already: moving buffers would untie a head that shares the embedding's weight.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data, persistent=False)
