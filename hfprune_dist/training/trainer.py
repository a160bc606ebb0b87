"""Training on all ranks.

With LoRA, frozen weights are whole on each rank if they fit, and sharded otherwise; what is learnt differs by rounding
only. Weights that are trained themselves are whole on each rank, and their optimizer is shared.

There are two losses, both means over the tokens of an optimizer step that have labels: that of the labels, and the
divergence from the dense model, whose hidden states come with the rows, or which runs beside the model. Units may be
masked during training (LoRAPrune).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available, logging

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.lora_adapter import PEFT_NAME, PEFT_PREFIX, lora_targets
from hfprune_dist.config.schema import RuntimeConfig, Sharding
from hfprune_dist.config.training import STEPS_PER_WARMUP_STEP, Training, layers_of
from hfprune_dist.core.devices import send
from hfprune_dist.core.fidelity import FidelitySums, compare_outputs
from hfprune_dist.core.head import Outputs, next_ids
from hfprune_dist.core.losses import summed_divergence
from hfprune_dist.data.schedule import IGNORED, RowReader, Schedule
from hfprune_dist.distributed.frozen_model import DecidedSharding, FrozenModel, passes_here, placement_here
from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import Need, Placement, Sizes, most_at_once
from hfprune_dist.kinds.training import HELD_OUT_KL, UNTRAINED_KL, has_converged, training_need
from hfprune_dist.models.loading import after_head, packed_rows
from hfprune_dist.models.memory_efficient_backward import keep_no_gathered_weights, replace_norms
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.structures.kept import Shape
from hfprune_dist.training.loraprune import UnitMasks, scores_of_units
from hfprune_dist.training.optimizer import Optimizer
from hfprune_dist.training.snapshot import LossLine, Snapshot
from hfprune_dist.training.teacher_states import DENSE, DenseStates
from hfprune_dist.training.trackers import Trackers


@dataclass(frozen=True)
class FineTuning:
    """What to train, on which rows, and how far.

    Attributes:
        rows: reads a row by its number.
        schedule: which rows each step sees.
        total_steps: optimizer steps of the whole training, over all attempts.
        teacher: the dense model, if it is to run beside the model; None: its hidden states come with the rows.
        head_of: the dense model, if its head may differ from the one that training begins with.
        held_out: text for evaluations on the way.
        masked_to: the units that are to be left at the end, in all layers (LoRAPrune); None for all.
    """

    checkpoint: Checkpoint
    settings: Training
    seed: int
    rows: RowReader
    schedule: Schedule
    total_steps: int
    teacher: Checkpoint | None = None
    head_of: Checkpoint | None = None
    held_out: DenseStates | None = None
    masked_to: Shape | None = None

    @cached_property
    def tokens(self) -> int:
        """Tokens of a row."""
        return len(self.rows(0)["input_ids"])

    def tokens_at(self, step: int) -> int:
        """Tokens of the rows of the first ``step`` steps."""
        return self.schedule.rows_before(step) * self.tokens

    def evaluates_at(self, step: int) -> bool:
        """Whether there is an evaluation after the first ``step`` steps."""
        every = self.settings.evaluate_every or math.inf
        is_due = self.tokens_at(step) // every > self.tokens_at(step - 1) // every
        return self.held_out is not None and (is_due or step == self.total_steps)

    def learning_rate(self, step: int) -> float:
        """That of an optimizer step, counted from 0: linear warm-up, then a cosine to zero."""
        peak = self.settings.learning_rate
        warmup = min(self.settings.warmup_steps, self.total_steps // STEPS_PER_WARMUP_STEP)
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
    """Train from the snapshot of an earlier attempt, if any, to the end, and return the last step's snapshot.

    If memory is short after all, training goes on from the newest snapshot with a placement that takes less.

    Args:
        file: of the newest snapshot.
        run_folder: where trackers that write files put them; its name is that of the run.

    Raises:
        UserError: if the loss or the gradient is no longer finite.
        Interrupted: after a step and its snapshot, if any rank was asked to end early.
    """
    start = Snapshot.last(file, world)
    if start.step >= task.total_steps or has_converged(start.losses, task.settings.patience):
        return start
    at_once = start.notes.get("micro_batch_size") or rows_at_once(task, runtime.sharding, world)
    task = replace(task, settings=task.settings.model_copy(update={"micro_batch_size": at_once}))
    placement = placement_here(need_of(task, at_once), runtime.sharding, world)
    began = time.monotonic() - start.notes.get("seconds", 0)
    trainer, losses = Trainer(task, start, world, placement), list(start.losses)
    with closing(Trackers(runtime.report_to if world.is_first else (), run_folder)) as trackers:
        while True:
            evaluates = not losses and task.held_out is not None
            untrained = {UNTRAINED_KL: trainer.evaluate()[HELD_OUT_KL]} if evaluates else {}
            values, step = trainer.step(len(losses)), len(losses) + 1
            if values is None:
                placement = smaller(placement, task, runtime.sharding, world)
                del trainer  # whose memory, hidden from Python's collector by gc.freeze, the next one needs
                gc.unfreeze()
                gc.collect()
                torch.cuda.empty_cache()
                start = Snapshot.last(file, world)
                trainer, losses = Trainer(task, start, world, placement), list(start.losses)
                continue
            values = {"epoch": round(step / task.schedule.steps_per_epoch, 4), **values, **untrained}
            if task.evaluates_at(step):
                values |= {"tokens": task.tokens_at(step), **trainer.evaluate()}
            for key, value in values.items():
                if not math.isfinite(value):
                    raise UserError(
                        f"recovery: training diverged, {key} is {value} at step {step}; lower recovery.learning_rate, "
                        "or raise recovery.warmup_steps; at step 1, check the checkpoint's weights"
                    )
            losses.append({"step": step, **values})
            trackers.report(values, step)
            progress.update("recovery", step, task.total_steps)
            if world.is_first:
                print(f"recovery: step {step}/{task.total_steps}, loss {values['loss']:.4f}", flush=True)
            interrupted = interruption.agreed(world)
            ended = step == task.total_steps or has_converged(losses, task.settings.patience)
            if step % runtime.save_every_steps == 0 or ended or interrupted:
                trainer.save(file, step, losses, seconds=int(time.monotonic() - began))
            if interrupted:
                raise Interrupted
            if ended:
                return Snapshot.read(file)


def smaller(placement: Placement, task: FineTuning, sharding: Sharding, world: World) -> Placement:
    """The placement to try when memory is short: layers run again in backward, then weights are sharded too."""
    if not placement.checkpointing:
        return replace(placement, checkpointing=True)
    if task.settings.method == "lora" and world.size > 1 and sharding == "auto":
        return replace(placement, whole=False)
    rows = f"{task.settings.least_at_once} x {task.tokens} tokens"
    raise torch.OutOfMemoryError(
        f"out of memory even with gradient checkpointing; lower recovery.micro_batch_size or the sequence_length "
        f"of rows ({rows}), or take more GPUs"
    )


class Trainer:
    """A model in training, on one rank.

    Args:
        start: the snapshot to go on from.
        placement: where frozen weights lie.
    """

    def __init__(self, task: FineTuning, start: Snapshot, world: World, placement: Placement) -> None:
        logging.set_verbosity_error()
        self._task, self._world = task, world
        self._dtype: torch.dtype = getattr(torch, task.settings.dtype)
        sharding: DecidedSharding = "replicate" if placement.whole else "zero3"
        rows, share = task.settings.least_at_once, task.settings.teacher_share
        self._frozen = FrozenModel(task.checkpoint, self._dtype, sharding, world, backward_of_body=share > 0)
        model: Any = self._frozen.module
        if not placement.whole:
            keep_no_gathered_weights(model)
        self._teacher, self._is_unsharded = None, placement.whole
        if task.teacher is not None:  # where ranks share the optimizer, that needs a whole teacher's memory
            beside: DecidedSharding = sharding if task.settings.method == "lora" or world.size == 1 else "zero3"
            self._teacher = FrozenModel(task.teacher, self._dtype, beside, world)
            self._is_unsharded = beside == "replicate"
        fused = [use_fused_kernels(each.module, world.device) for each in (self._frozen, self._teacher) if each]
        self._notes = {"micro_batch_size": rows, "fused_kernels": any(fused) or start.notes.get("fused_kernels", False)}
        trained = add_lora(model, task) if task.settings.method == "lora" else parts_to_train(model, task)
        self._dense_head: tuple[Tensor, Tensor | None] | None = None
        compares = share > 0 or task.held_out is not None
        if compares and (task.head_of or task.checkpoint.family.head_of(model).weight.requires_grad):
            head = LayerReader(task.head_of or task.checkpoint, self._dtype, world.device).head()
            self._dense_head = head.weight_VC, head.bias_V
        self._optimizer = Optimizer(trained, task.settings, start, world)
        self._after = after_head(task.checkpoint)
        self._masks = None
        if task.masked_to is not None:
            self._masks = UnitMasks(task.checkpoint.structures, task.masked_to, start.tensors)
            self._masks.attach(model, world.device, self._dtype)
        if placement.checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        gc.freeze()  # or Python walks all modules and parameters again and again: a seventh of the time on CPU

    def step(self, step: int) -> LossLine | None:
        """Do one optimizer step, counted from 0, and return its mean loss per token and what else is told of it; None
        on all ranks if one ran out of memory. Where ranks share weights, that one raises, since the others wait for it.
        """
        task, world, rate = self._task, self._world, self._task.learning_rate(step)
        batches = list(self._micro_batches(step))
        labels = torch.tensor(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for _, batch in batches))
        world.all_reduce(labels)  # of all ranks
        loss, lacks_memory = torch.zeros((), device=world.device), False
        try:
            for seed, batch in batches:
                torch.manual_seed(seed)  # dropout depends on a row's place alone
                term = self._loss(batch, int(labels))
                loss += term.detach()
                if term.requires_grad:  # not where the head alone is trained, and no token has a label
                    term.backward()
        except torch.OutOfMemoryError:
            if not self._is_unsharded:
                raise
            lacks_memory = True
        if self._is_unsharded and any(world.all_gather(lacks_memory)):
            return None
        self._optimizer.sum_over_ranks()
        if self._masks is not None:
            scores = scores_of_units(self._frozen, self._masks.places, self._optimizer)
            self._masks.update(scores, step + 1, task.total_steps)
        world.all_reduce(loss)
        return {"loss": float(loss), "learning_rate": rate, "grad_norm": self._optimizer.step(rate)}

    def _micro_batches(self, step: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The micro-batches of an optimizer step on this rank, each with a seed, equally many on each rank; free places
        have a row without loss.
        """
        task, at_once = self._task, self._task.settings.least_at_once
        numbers, of_all = task.schedule.rows_of(step), at_once * self._world.size
        for turn in range(-(-task.schedule.largest_step // of_all)):
            first = turn * of_all + self._world.rank * at_once
            rows = [
                task.rows(numbers[slot] if slot < len(numbers) else numbers[0])
                for slot in range(first, first + at_once)
            ]
            for row in rows[max(len(numbers) - first, 0) :]:
                row["labels"].fill_(IGNORED)
            tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            labelled = (tensors["labels"] != IGNORED).any(dim=0).nonzero().flatten()
            # Nothing depends on what comes after the last token with a loss.
            end = max([1, *labelled.tolist()]) + 1
            seed = int(digest_of([task.seed, step, first])[:15], 16)
            yield seed, {name: tensor[:, :end] for name, tensor in tensors.items()}

    def _loss(self, batch: dict[str, Tensor], labels: int) -> Tensor:
        """A micro-batch's part of the loss, which is a mean over so many labels."""
        device, model, share = self._world.device, self._frozen.module, self._task.settings.teacher_share
        tensors = {
            name: send(tensor.to(self._dtype if tensor.is_floating_point() else tensor.dtype), device)
            for name, tensor in batch.items()
            if name != "labels"
        }
        # On the host, which would have to wait for a GPU to find them.
        targets_N = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
        places_N = (targets_N != IGNORED).nonzero().flatten()
        targets_N = send(targets_N[places_N], device)
        texts = packed_rows(batch.get("position_ids"), device)
        if not share:
            with texts, self._frozen.head_at(places_N):  # with a cache, rows would not count as packed
                logits_NV = model(**tensors, use_cache=False).logits[0].float()
            return nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum") / labels
        with texts:
            dense_BTC = tensors.pop(DENSE) if self._teacher is None else self._teacher.final_hidden_of(tensors)
            hidden_BTC = self._task.checkpoint.family.body_of(model)(**tensors, use_cache=False).last_hidden_state
        judged_N = send(places_N, device)
        hidden_NC, dense_NC = (states_BTC.flatten(0, 1)[judged_N] for states_BTC in (hidden_BTC, dense_BTC))
        with self._frozen.head() as head:
            student = Outputs(hidden_NC, *head, self._after)
            dense = Outputs(dense_NC, *(self._dense_head or head), self._after)
            divergence = summed_divergence(student, dense, targets_N, label_weight=(1 - share) / share)
        return divergence * (share / labels)

    @torch.no_grad()
    def evaluate(self) -> LossLine:
        """Compare the model as it is with the dense one on the held-out text; collective."""
        states, world = self._task.held_out, self._world
        assert states is not None
        self._frozen.module.eval()
        sums: list[FidelitySums] = []
        for first in range(0, len(states.windows_ST), world.size):  # ranks with fewer windows repeat the last
            index = min(first + world.rank, len(states.windows_ST) - 1)
            hidden_TC = self._frozen.final_hidden(states.windows_ST[index])
            dense_TC = send(states.hidden(index).to(self._dtype), world.device)
            with self._frozen.head() as head:
                dense = Outputs(dense_TC, *(self._dense_head or head), self._after)
                model = Outputs(hidden_TC, *head, self._after)
                sums += world.all_gather(
                    compare_outputs(dense, model, send(next_ids(states.windows_ST[index]), world.device))
                )
        self._frozen.module.train()
        means = sum(sums[: len(states.windows_ST)], FidelitySums()).means()
        return {HELD_OUT_KL: means["kl"], "held_out_perplexity": means["perplexity"]}

    def save(self, file: Path, step: int, losses: list[LossLine], seconds: int) -> None:
        """Write a snapshot, after so many seconds of all attempts; collective."""
        masks = {} if self._masks is None else self._masks.state()
        snapshot = Snapshot(step, masks, losses, self._optimizer.shapes(), notes=self._notes | {"seconds": seconds})
        snapshot.save(file, self._optimizer.state(), self._world)


def need_of(task: FineTuning, rows: int) -> Need:
    """The memory that a training needs with so many rows at once."""
    sizes, masks = Sizes.from_checkpoint(task.checkpoint), task.masked_to is not None
    return training_need(task.settings, sizes, rows, task.tokens, has_teacher=task.teacher is not None, masks=masks)


def rows_at_once(task: FineTuning, sharding: Sharding, world: World) -> int:
    """Decide together how many rows pass the model at once."""
    most = most_at_once(task.schedule.largest_step, task.tokens, world.size)
    return passes_here(partial(need_of, task), task.settings.micro_batch_size, most, sharding, world).at_once


def use_fused_kernels(model: nn.Module, device: torch.device) -> bool:
    """On a GPU, let torch's kernel compute a model's norms; or Liger's kernels norms, rotations and gates, where the
    package is installed and knows the architecture: return whether they do. Its losses are left out, since they replace
    the forward that returns logits.
    """
    if device.type == "cuda":
        replace_norms(model)
    if device.type == "cuda" and is_liger_kernel_available():
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    return any(str(module.forward.__module__).startswith("liger_kernel") for module in model.modules())


def parts_to_train(model: nn.Module, task: FineTuning) -> dict[str, nn.Parameter]:
    """Unfreeze what a recipe trains of a model's decoder and head; return these parameters by name.

    Raises:
        UserError: if the checkpoint's files have one of them in another form.
    """
    family, settings = task.checkpoint.family, task.settings
    body, head = family.body_of(model), family.head_of(model)
    modules: list[nn.Module] = [body, head] if settings.method == "full" else []
    for part in settings.parts if settings.method == "parts" else ():
        if part == "norms":
            modules += [module for module in body.modules() if "Norm" in type(module).__name__]
        elif count := layers_of(part):
            modules += family.layers_of(model)[-count:]
        else:
            modules.append(head if part == "lm_head" else model.get_submodule(family.embedding))
    wanted = {parameter for module in modules for parameter in module.parameters()}
    found = {name: parameter for name, parameter in model.named_parameters() if parameter in wanted}
    for name, parameter in found.items():
        if name not in task.checkpoint.tensors or not parameter.is_contiguous():
            raise UserError(
                f"recovery.method {settings.method}: {task.checkpoint.path} has {name} in another form in its files; "
                "set recovery.method to lora"
            )
        parameter.requires_grad_(True)
    return found


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
    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = partial(_adapted, module)
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {f"{PEFT_PREFIX}{name}": parameter for name, parameter in trained}


def _adapted(layer: Any, x_BTI: Tensor) -> Tensor:
    """What peft's forward computes; but the scale multiplies the few channels between the factors, not all outputs."""
    between_BTR = layer.lora_A[PEFT_NAME](layer.lora_dropout[PEFT_NAME](x_BTI)) * layer.scaling[PEFT_NAME]
    output_BTO: Tensor = layer.base_layer(x_BTI) + layer.lora_B[PEFT_NAME](between_BTR)
    return output_BTO
