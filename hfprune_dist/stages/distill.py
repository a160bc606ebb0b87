"""Distill: a pruned model learns its dense original's output distribution, on the windows that it was pruned with.

LoRA on all projections, merged into a plain checkpoint of the same layout. No labels, and only the calibration's text.
"""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.token_costs import training_cost
from hfprune_dist.config.training import DistillationConfig
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.kinds.distill import DistillParameters
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.training.fine_tuning import FineTuning
from hfprune_dist.training.teacher_states import DenseStates
from hfprune_dist.training.trainer import fine_tune
from hfprune_dist.training.write_merged import write_merged, write_trained

Context = AnyContext[DistillParameters]

STEPS_PER_WARMUP_STEP = 4  # at least


def run(context: Context) -> None:
    """Write a Hugging Face folder with the pruned model's layout, and ``adapter/`` and ``loss.jsonl`` in it."""
    settings = context.params.distillation
    checkpoint = open_checkpoint(context.input_path("model"))
    rows = DenseStates(context.input_path("reference"))
    task = _task(context, settings, checkpoint, rows)
    trained = fine_tune(task, context.work / "snapshots", context.world, context.progress, context.interruption)
    draft = context.open_draft()
    context.world.on_rank0(lambda: write_trained(checkpoint, trained, settings, draft))
    write_merged(checkpoint, draft, context.world, context.progress)
    counts = {"windows": len(rows.windows_ST), "tokens": rows.windows_ST.numel()}
    windows, length = rows.windows_ST.shape
    cost = training_cost(checkpoint, context.params.passes * windows, length)
    context.commit(draft, {**counts, **trained.metrics(), **cost})


def _task(context: Context, settings: DistillationConfig, checkpoint: Checkpoint, rows: DenseStates) -> FineTuning:
    schedule = Schedule(len(rows.windows_ST), settings.batch_size, context.params.seed)
    total_steps = context.params.passes * schedule.steps_per_epoch
    return FineTuning(
        checkpoint=checkpoint,
        section="distillation",
        settings=settings,
        seed=context.params.seed,
        rows=rows,
        distills=True,
        schedule=schedule,
        total_steps=total_steps,
        warmup_steps=min(settings.warmup_steps, total_steps // STEPS_PER_WARMUP_STEP),
        save_every_steps=context.runtime.save_every_steps,
        timeout_minutes=context.runtime.collective_timeout_minutes,
        run_folder=context.run_folder,
        report_to=context.runtime.report_to,
        sharding=context.runtime.sharding,
    )
