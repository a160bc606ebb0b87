"""LoRAPrune: recovery that prunes: units are scored by LoRA's own gradients, masked on the way, and cut at the end."""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.kinds.training import LoraPruneParameters
from hfprune_dist.planning.shapes import shape_for
from hfprune_dist.planning.target import Target
from hfprune_dist.stages.context import Context
from hfprune_dist.stages.training import train
from hfprune_dist.structures.kept import Shape


def run(context: Context[LoraPruneParameters]) -> None:
    """Write a Hugging Face folder with ``kept.json``, as a prune stage does, and with ``loss.jsonl`` and ``adapter/``,
    which is an adapter of the dense model, from before units were cut.
    """
    params, checkpoint = context.params, open_checkpoint(context.input_path("model"))
    whole = shape_for(Target.from_settings(checkpoint, params, params.ratio, context.stage.label))
    shape = Shape(whole.layers, {kind: whole.units[kind] for kind in params.structures})
    train(context, checkpoint, masked_to=shape)
