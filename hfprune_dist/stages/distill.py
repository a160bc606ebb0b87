"""Distill: a pruned model learns its dense original's output distribution, on the windows that it was pruned with.

LoRA on all projections, merged into a plain checkpoint of the same layout. No labels and no text but the calibration's.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from hfprune_dist.config import DistillationConfig
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.parallel.finetune import FineTuning, fine_tune
from hfprune_dist.parallel.merging import write_merged
from hfprune_dist.parallel.snapshots import Snapshot
from hfprune_dist.parallel.teacher import TaughtWindows
from hfprune_dist.stages.context import Context


def run(context: Context) -> None:
    """Write a Hugging Face folder of the pruned one's layout, the ``adapter/`` in it, and ``loss.jsonl``."""
    settings = DistillationConfig.model_validate(context.params["distillation"])
    windows_ST = load_file(context.input_path("importance") / "windows.safetensors")["input_ids"]
    taught = TaughtWindows(windows_ST, settings.micro_batch_size, context.work / "dense")
    _teach(context, taught, settings)
    checkpoint = open_checkpoint(context.input_path("model"))
    trained = _train(context, checkpoint, settings, taught, len(windows_ST))
    draft = context.open_draft()
    write_merged(checkpoint, trained, settings, draft, context.world, context.progress)
    context.commit(draft, {"windows": len(windows_ST), "tokens": windows_ST.numel(), **trained.metrics()})


def _teach(context: Context, taught: TaughtWindows, settings: DistillationConfig) -> None:
    dense = open_checkpoint(context.input_path("dense"))

    def after_each(done: int) -> None:
        context.progress.update("dense model", done, dense.num_layers)
        context.interruption.stop_if_agreed(context.world)

    taught.teach(dense, getattr(torch, settings.dtype), context.world, after_each)


def _train(
    context: Context, checkpoint: Checkpoint, settings: DistillationConfig, taught: TaughtWindows, windows: int
) -> Snapshot:
    schedule = Schedule(windows, settings.batch_size, context.params["seed"])
    task = FineTuning(
        checkpoint=checkpoint,
        section="distillation",
        settings=settings,
        seed=context.params["seed"],
        rows=taught,
        distills=True,
        schedule=schedule,
        total_steps=context.params["passes"] * schedule.steps_per_epoch,
        save_every_steps=context.runtime.save_every_steps,
        timeout_minutes=context.runtime.collective_timeout_minutes,
    )
    return fine_tune(task, context.work / "snapshots", context.world, context.progress, context.interruption)
