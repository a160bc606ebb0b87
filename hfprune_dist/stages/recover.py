"""Recover: LoRA fine-tuning on instruction pairs, merged into a plain checkpoint of the same layout as the source."""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.kinds.training import RecoverParameters
from hfprune_dist.stages.context import Context
from hfprune_dist.stages.training import train_on_instructions


def run(context: Context[RecoverParameters]) -> None:
    """Write a Hugging Face folder that plain transformers loads, with ``adapter/`` and ``loss.jsonl`` in it."""
    train_on_instructions(context, open_checkpoint(context.input_path("model")))
