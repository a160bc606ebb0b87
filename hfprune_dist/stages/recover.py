"""Recover: LoRA fine-tuning on instruction pairs, merged into a plain checkpoint of the same layout as the source."""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.kinds.recover import RecoverParameters
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.stages.instruction_tuning import train_on_instructions
from hfprune_dist.training.write_merged import write_merged, write_trained

Context = AnyContext[RecoverParameters]


def run(context: Context) -> None:
    """Write a Hugging Face folder that plain transformers loads, with ``adapter/`` and ``loss.jsonl`` in it."""
    checkpoint = open_checkpoint(context.input_path("model"))
    trained = train_on_instructions(context, checkpoint)
    draft = context.open_draft()
    context.world.on_rank0(lambda: write_trained(checkpoint, trained.last, context.params.recovery, draft))
    write_merged(checkpoint, draft, context.world, context.progress)
    context.commit(draft, trained.metrics())
