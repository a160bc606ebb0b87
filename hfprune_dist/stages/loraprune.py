"""LoRAPrune: recovery that prunes: units are scored by LoRA's own gradients, masked on the way, and cut at the end."""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.kinds.loraprune import LoraPruneParameters
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.stages.instruction_tuning import train_on_instructions
from hfprune_dist.stages.shape_metrics import shape_metrics
from hfprune_dist.structures.kept import Shape
from hfprune_dist.training.loraprune import UnitMasks
from hfprune_dist.training.write_merged import write_merged, write_trained

Context = AnyContext[LoraPruneParameters]


def run(context: Context) -> None:
    """Write a Hugging Face folder with ``kept.json``, as a prune stage does, and with ``loss.jsonl`` and ``adapter/``,
    which is an adapter of the dense model, from before units were cut.
    """
    checkpoint = open_checkpoint(context.input_path("model"))
    shape = _shape(context, checkpoint)
    trained = train_on_instructions(context, checkpoint, masked_to=shape)
    kept = UnitMasks(checkpoint.structures, shape, trained.last.units).kept()
    draft = context.open_draft()
    context.world.on_rank0(lambda: write_trained(checkpoint, trained.last, context.params.recovery, draft))
    write_merged(checkpoint, draft, context.world, context.progress, kept)
    context.commit(draft, shape_metrics(checkpoint, kept.shape, checkpoint.config) | trained.metrics())


def _shape(context: Context, checkpoint: Checkpoint) -> Shape:
    """The shape that the ratio leaves, of the kinds of units that may go."""
    params = context.params
    shape = LocalTarget.of(checkpoint, params, context.stage.label).shape()
    return Shape(shape.layers, {kind: shape.units[kind] for kind in params.structures})
