"""Distill: a pruned model learns its dense original's output distribution, on the windows that it was pruned with.

LoRA on all projections, merged into a plain checkpoint of the same layout. No labels, and only the calibration's text.
"""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.token_costs import training_cost
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.kinds.training import DistillParameters
from hfprune_dist.stages.context import Context
from hfprune_dist.stages.training import train
from hfprune_dist.training.teacher_states import DenseStates
from hfprune_dist.training.trainer import FineTuning

STEPS_PER_WARMUP_STEP = 4  # at least


def run(context: Context[DistillParameters]) -> None:
    """Write a Hugging Face folder with the pruned model's layout, and ``adapter/`` and ``loss.jsonl`` in it."""
    params, settings = context.params, context.params.distillation
    checkpoint = open_checkpoint(context.input_path("model"))
    rows = DenseStates(context.input_path("reference"))
    windows, length = rows.windows_ST.shape
    schedule = Schedule(windows, settings.batch_size, params.seed)
    steps = params.passes * schedule.steps_per_epoch
    task = FineTuning(
        checkpoint=checkpoint,
        section="distillation",
        settings=settings,
        seed=params.seed,
        rows=rows,
        schedule=schedule,
        total_steps=steps,
        warmup_steps=min(settings.warmup_steps, steps // STEPS_PER_WARMUP_STEP),
        distills=True,
    )
    cost = training_cost(checkpoint, params.passes * windows, length)
    train(context, task, {"windows": windows, "tokens": windows * length, **cost})
