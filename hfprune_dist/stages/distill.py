"""Distill: a pruned model learns its dense original's output distribution, on the windows that it was pruned with.

LoRA on all projections, merged into a plain checkpoint of the same layout. No labels and no text but the calibration's.
"""

from __future__ import annotations

import torch

from hfprune_dist.config import DistillationConfig
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.parallel.dense_states import DenseStates
from hfprune_dist.parallel.finetune import FineTuning, fine_tune
from hfprune_dist.parallel.merging import write_merged
from hfprune_dist.parallel.snapshots import Snapshot
from hfprune_dist.stages.context import Context

LONGEST_WARMUP = 4  # one part in so many of all steps


def run(context: Context) -> None:
    """Write a Hugging Face folder of the pruned one's layout, the ``adapter/`` in it, and ``loss.jsonl``."""
    settings = DistillationConfig.model_validate(context.params["distillation"])
    windows_ST = context.calibration_windows()
    states = DenseStates(windows_ST, settings.micro_batch_size, context.work / "dense")
    _run_dense_model(context, states, settings)
    checkpoint = open_checkpoint(context.input_path("model"))
    trained = _train(context, checkpoint, settings, states, len(windows_ST))
    draft = context.open_draft()
    write_merged(checkpoint, trained, settings, draft, context.world, context.progress)
    context.commit(draft, {"windows": len(windows_ST), "tokens": windows_ST.numel(), **trained.metrics()})


def _run_dense_model(context: Context, states: DenseStates, settings: DistillationConfig) -> None:
    """Not interrupted: a forward over the windows, of which nothing would be saved."""
    dense = open_checkpoint(context.input_path("dense"))

    def after_each(done: int) -> None:
        context.progress.update("dense model", done, dense.num_layers)

    states.write(dense, getattr(torch, settings.dtype), context.world, after_each)


def _train(
    context: Context, checkpoint: Checkpoint, settings: DistillationConfig, states: DenseStates, windows: int
) -> Snapshot:
    schedule = Schedule(windows, settings.batch_size, context.params["seed"])
    total_steps = context.params["passes"] * schedule.steps_per_epoch
    task = FineTuning(
        checkpoint=checkpoint,
        section="distillation",
        settings=settings,
        seed=context.params["seed"],
        rows=states,
        distills=True,
        schedule=schedule,
        total_steps=total_steps,
        warmup_steps=min(settings.warmup_steps, total_steps // LONGEST_WARMUP),
        save_every_steps=context.runtime.save_every_steps,
        timeout_minutes=context.runtime.collective_timeout_minutes,
    )
    return fine_tune(task, context.work / "snapshots", context.world, context.progress, context.interruption)
