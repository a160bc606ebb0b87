"""LoRA training on all ranks: the Hugging Face Trainer, peft and DeepSpeed ZeRO-3.

Frozen weights are whole on each rank if they fit, and sharded otherwise; what is learnt differs by rounding only.

There are two losses: that of the rows' labels, and the divergence from a dense model whose hidden states come with the
rows. Units may be masked during training (LoRAPrune).

A snapshot holds only what changes: the LoRA weights and AdamW's two moments, float32 and whole, the losses and the
masks. Rows, learning rate and dropout follow from the optimizer step. So training can resume on any number of ranks.
"""

from __future__ import annotations

import gc
import json
import math
import os
import warnings
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
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.checkpoints.tensor_files import is_usable, load_tensors, save_tensors
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.data.schedule import RowReader, Schedule, ScheduledRows
from hfprune_dist.distributed.frozen_model import placement_here
from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.distributed.world import World
from hfprune_dist.distributed.zero3 import before_each_step, init_deepspeed, keep_float32, keep_gathered, limit_timeouts
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import Placement, Sizes
from hfprune_dist.kinds.training import training_need
from hfprune_dist.models.after_head import DistillingHead, after_head
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.structures.kept import Shape
from hfprune_dist.training.loraprune import UnitMasks, scores_of_units
from hfprune_dist.training.teacher_states import DENSE

PROJECT = "hfprune"  # under which trackers file the runs
MAX_GRAD_NORM = 1.0  # the Trainer's default, which the published recipe doesn't change
MOMENTS = ("exp_avg", "exp_avg_sq")

LossLine = dict[str, float | int]


@dataclass(frozen=True)
class Snapshot:
    """The state of training after optimizer step ``step``, from which any number of ranks can resume.

    Attributes:
        tensors: LoRA parameters, whole, float32, under their names in a ``PeftModel``; AdamW's moments, as
            ``<parameter>.exp_avg`` and ``<parameter>.exp_avg_sq``; and ``UnitMasks.state``.
        losses: one line per step so far.
    """

    step: int
    tensors: dict[str, Tensor]
    losses: list[LossLine]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The LoRA parameters alone."""
        return {name: it for name, it in self.tensors.items() if ".lora_" in name and not name.endswith(MOMENTS)}

    def save(self, file: Path) -> None:
        """Replace an earlier snapshot by this one."""
        texts = {"step": str(self.step), "losses": json.dumps(self.losses, allow_nan=False)}
        save_tensors(self.tensors, file, texts)

    @classmethod
    def read(cls, file: Path) -> Snapshot:
        tensors, texts = load_tensors(file)
        return cls(int(texts["step"]), tensors, json.loads(texts["losses"]))


@dataclass(frozen=True)
class FineTuning:
    """What to train, on which rows, and how far.

    Attributes:
        section: the part of the configuration that the settings come from, for progress and messages.
        rows: reads a row by its number.
        schedule: which rows each step sees.
        total_steps: optimizer steps of the whole training, over all attempts.
        warmup_steps: the first of these steps, in which the learning rate rises from 0.
        run_folder: where trackers that write files put them; its name is that of the run.
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
    runtime: RuntimeConfig
    run_folder: Path
    distills: bool = False
    masked_to: Shape | None = None


@dataclass(frozen=True)
class Attempt:
    """One attempt at a training, on one rank.

    Attributes:
        snapshot: file of the newest snapshot, from which the next attempt resumes.
        start: the snapshot that this attempt resumes from, if any.
        whole: as in ``Placement``, once that is decided.
    """

    snapshot: Path
    world: World
    progress: Progress
    interruption: Interruption
    start: Snapshot | None = None
    whole: bool = False

    @property
    def first_step(self) -> int:
        return 0 if self.start is None else self.start.step


def fine_tune(task: FineTuning, attempt: Attempt) -> Snapshot:
    """Train from the snapshot of an earlier attempt, if any, to the last step, and return that step's snapshot.

    Raises:
        UserError: if the loss or the gradient is no longer finite.
        Interrupted: after a step and its snapshot, if any rank was asked to end early.
    """
    file = attempt.snapshot
    start = Snapshot.read(file) if attempt.world.on_rank0(lambda: is_usable(file)) else None
    if start is not None and start.step == task.total_steps:
        return start
    _train(task, replace(attempt, start=start))
    return Snapshot.read(file)


def _train(task: FineTuning, attempt: Attempt) -> None:
    logging.set_verbosity_error()
    # DeepSpeed decorates an optimizer that isn't used here with torch.compile, which takes seconds to import.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # DeepSpeed calls collectives by their old names, and torch warns at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    world = attempt.world
    rows_at_once = task.settings.micro_batch_size * world.size
    rows = ScheduledRows(task.rows, task.schedule, attempt.first_step, task.total_steps, multiple_of=rows_at_once)
    placement = place_training(task, world)
    attempt = replace(attempt, whole=placement.whole)
    init_deepspeed(world)
    if placement.whole:
        model = load_trainable_model(task, attempt.start).to(world.device)
        _keep_whole(model)
    arguments = _training_arguments(task, rows.slots // rows_at_once, attempt, placement)
    if not placement.whole:
        model = load_trainable_model(task, attempt.start)
        keep_float32(model.get_submodule("base_model.model"), task.checkpoint, world.device)
    assert not (task.distills and task.masked_to is not None), "masks are for the loss of labels"
    trains = _DistillingTrainer if task.distills else _LoraTrainer if task.masked_to is None else _MaskingTrainer
    trainer = trains(task, attempt, model=model, args=arguments, train_dataset=rows)
    gc.freeze()  # or Python walks all modules and parameters again and again: a seventh of the time on CPU
    trainer.train()


# Settings, and the model with LoRA layers.


def place_training(task: FineTuning, world: World) -> Placement:
    """Decide together how to place a training in the free memory."""
    settings, sizes = task.settings, Sizes.of(task.checkpoint)
    rows, tokens, masks = settings.micro_batch_size, len(task.rows(0)["input_ids"]), task.masked_to is not None
    need = training_need(settings, sizes, rows, tokens, distills=task.distills, masks=masks)
    return placement_here(need, task.runtime.sharding, world)


def _zero3_config(bfloat16: bool, whole: bool) -> dict[str, Any]:
    """Parameters, gradients and optimizer states sharded; gradients reduced and added up in float32.

    Blocks of experts are hooked like all other modules, as in ``distributed.zero3``. If frozen weights are ``whole``,
    DeepSpeed doesn't manage them, and LoRA's stay gathered between optimizer steps.
    Otherwise, parameters are released right after use. To find those that backward uses again soon, DeepSpeed would
    walk over up to a billion parameters ahead for every module: 20 s in the second step, with LoRA's many modules.
    """
    zero = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "stage3_max_reuse_distance": 0,
        "leaf_module": {"classes": []},
    }
    if whole:
        zero["stage3_param_persistence_threshold"] = 2**62  # more elements than any parameter has
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "bf16": {"enabled": bfloat16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _training_arguments(
    task: FineTuning, accumulation_steps: int, attempt: Attempt, placement: Placement
) -> TrainingArguments:
    """Settings of the Trainer; while they exist, from_pretrained shards a model as it loads."""
    settings, runtime = task.settings, task.runtime
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.update(dict.fromkeys(("TENSORBOARD_LOGGING_DIR", "WANDB_DIR"), str(task.run_folder)))
    on_cpu, bfloat16 = attempt.world.device.type == "cpu", settings.dtype == "bfloat16"
    return TrainingArguments(
        output_dir=str(attempt.snapshot.parent),
        num_train_epochs=1,  # one pass over ScheduledRows, which has the rows of all epochs
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        bf16=bfloat16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu else "nccl",
        ddp_timeout=runtime.collective_timeout_minutes * 60,
        deepspeed=_zero3_config(bfloat16, placement.whole),
        gradient_checkpointing=placement.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=list(runtime.report_to),
        run_name=task.run_folder.name,
        project=PROJECT,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        log_level="error",
        seed=task.seed,
    )


def load_trainable_model(task: FineTuning, start: Snapshot | None = None) -> nn.Module:
    """Load the model with LoRA layers, which get a snapshot's weights if there is one."""
    model = load_causal_lm(task.checkpoint.path, getattr(torch, task.settings.dtype))
    # With a cache, transformers doesn't look for packed pairs. The body may have a configuration of its own.
    configs: list[Any] = [model.config, task.checkpoint.family.body_of(model).config]
    for config in configs:
        config.use_cache = False
        # Where a configuration asks for it, experts' load balance would enter the loss, once for every micro-batch.
        config.output_router_logits = False
    set_seed(task.seed)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=task.settings.rank,
        lora_alpha=task.settings.alpha,
        lora_dropout=task.settings.dropout,
        target_modules=lora_targets(task.checkpoint.family, task.checkpoint.ranks),
    )
    adapted: nn.Module = get_peft_model(model, adapter, autocast_adapter_dtype=False)
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


# Trainers.


class _LoraTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, with dropout that depends only on a row's place, and with our schedule, log and snapshots."""

    lr_scheduler: LambdaLR | None

    def __init__(self, task: FineTuning, attempt: Attempt, **trainer_arguments: Any) -> None:
        super().__init__(**trainer_arguments, data_collator=_stack, callbacks=[_OnceReady(self._once_ready)])
        self.remove_callback(PrinterCallback)
        # Some models of images and text deny that they can divide their loss by all tokens of a step. They can; else it
        # would be a mean over each micro-batch, which is NaN if that has no label.
        self.model_accepts_loss_kwargs = True
        self._task = task
        self._attempt = attempt
        self._world = attempt.world
        self._losses: list[LossLine] = [] if attempt.start is None else list(attempt.start.losses)

    def _once_ready(self, engine: nn.Module) -> None:
        """Do what can be done only once the engine exists."""
        limit_timeouts()
        if self._attempt.start is not None:
            _restore(engine, self._attempt.start, self._world.rank)
        if self._attempt.whole:
            keep_gathered(engine)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Linear warm-up, then a cosine to zero."""
        warmup, total = self._task.warmup_steps, self._task.total_steps

        def share_of_peak(step: int) -> float:
            step += self._attempt.first_step
            if step < warmup:
                return step / warmup
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share_of_peak)
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
        task, section, step = self._task, self._task.section, self._attempt.first_step + self.state.global_step
        values: LossLine = {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        for key, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{section}: {key} is {value} at step {step}; lower {section}.learning_rate, or raise "
                    f"{section}.warmup_steps; at step 1, check the checkpoint's weights"
                )
        line: LossLine = {"step": step, "epoch": round(step / task.schedule.steps_per_epoch, 4), **values}
        self._losses.append(line)
        # Trackers count steps as we do: over all attempts.
        told = {key: value for key, value in line.items() if key != "step"}
        self.callback_handler.on_log(self.args, replace(self.state, global_step=step), self.control, told)
        self._attempt.progress.update(section, step, task.total_steps)
        if self._world.is_first:
            print(f"{section}: step {step}/{task.total_steps}, loss {logs['loss']:.4f}", flush=True)
        interrupted = self._attempt.interruption.agreed(self._world)
        if step % task.runtime.save_every_steps == 0 or step == task.total_steps or interrupted:
            self._save_snapshot(step)
        if interrupted:
            raise Interrupted

    def _save_snapshot(self, step: int) -> None:
        """Gather the state parameter by parameter and write it on rank 0; the others wait, so that none runs ahead."""
        tensors = self._masked_units()
        for name, parameter in _trained(self.model):
            whole = {name: safe_get_full_fp32_param(parameter)}
            whole |= {f"{name}.{moment}": safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if self._world.is_first:
                tensors |= {key: tensor.cpu() for key, tensor in whole.items()}
        snapshot = Snapshot(step, tensors, self._losses)
        self._world.on_rank0(lambda: snapshot.save(self._attempt.snapshot))

    def _masked_units(self) -> dict[str, Tensor]:
        return {}


class _DistillingTrainer(_LoraTrainer):
    """A trainer whose loss is the divergence from a dense model: a mean over the tokens of a step, in nats."""

    loss_is_scaled_for_ga = True  # divided by all tokens of a step, not by those of a micro-batch

    def __init__(self, task: FineTuning, attempt: Attempt, *, model: Any, **trainer_arguments: Any) -> None:
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

    def __init__(self, task: FineTuning, attempt: Attempt, *, model: Any, **trainer_arguments: Any) -> None:
        super().__init__(task, attempt, model=model, **trainer_arguments)
        assert task.masked_to is not None
        state = None if attempt.start is None else attempt.start.tensors
        self._masks = UnitMasks(task.checkpoint.structures, task.masked_to, state)
        self._scored = model.get_base_model()
        self._masks.attach(self._scored, self._world.device, getattr(torch, task.settings.dtype))

    def _once_ready(self, engine: nn.Module) -> None:
        super()._once_ready(engine)
        before_each_step(engine, self._score_and_mask)

    def _score_and_mask(self) -> None:
        """Score and mask, after backward has added up gradients over all ranks, and before the optimizer's step."""
        step = self._attempt.first_step + self.state.global_step + 1
        layers, whole = self._masks.kinds_by_layer, self._attempt.whole
        scores = scores_of_units(self._scored, layers, self._world, whole=whole, largest_norm=MAX_GRAD_NORM)
        self._masks.update(scores, step, self._task.total_steps)

    def _masked_units(self) -> dict[str, Tensor]:
        return self._masks.state()


class _OnceReady(TrainerCallback):  # type: ignore[misc]
    """Calls an action with the model in training, once its engine exists."""

    def __init__(self, action: Callable[[nn.Module], None]) -> None:
        self._action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
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
        safe_set_local_fp32_param(parameter, _shard(start.tensors[name], parameter, rank))
        for moment in MOMENTS:
            shard = _shard(start.tensors[f"{name}.{moment}"], parameter, rank)
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
