"""Recover: training by a recipe, written as a plain checkpoint of the same layout as the source."""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.kinds.training import RecoverParameters
from hfprune_dist.stages.context import Context
from hfprune_dist.stages.training import train


def run(context: Context[RecoverParameters]) -> None:
    """Write a Hugging Face folder, with ``loss.jsonl`` in it and, of LoRA, ``adapter/``."""
    train(context, open_checkpoint(context.input_path("model")))
