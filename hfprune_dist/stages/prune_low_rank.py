"""The low-rank pass of a prune stage: attention gets matrices of low rank, and all MLPs one width."""

from __future__ import annotations

from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.planning.shapes import Target, shape_for
from hfprune_dist.refit.low_rank import LowRankLayers, Sizes, compress_layers
from hfprune_dist.stages.prune_refit import Context, Replacements, after_each_layer, stream_of
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Kept


def decide_low_rank(context: Context, checkpoint: Checkpoint) -> tuple[Kept, Replacements, dict[str, Any]]:
    """Return what stays, factors of attention's projections, and metrics: their ``attention_ranks``."""
    params, windows_ST = context.params, context.calibration_windows()
    shape = shape_for(Target.of(checkpoint, params, params.ratio, context.stage.label))
    ranks = {name: row[0] for name, row in shape.ranks.items()}
    sizes = Sizes(shape.units[NEURONS][0], ranks)
    layers = LowRankLayers(checkpoint, list(ranks), context.work / "low_rank")
    stream = stream_of(context, checkpoint, windows_ST)
    after_each = after_each_layer(context, "low rank", checkpoint.num_layers)
    compress_layers(checkpoint, sizes, stream, layers, context.world, after_each)
    kept = Kept(shape.layers, {NEURONS: [layers.kept(number) for number in shape.layers]}, shape.ranks)
    attention_ranks = {name.rpartition(".")[2]: rank for name, rank in ranks.items()}
    return kept, layers.replacements(), {"attention_ranks": attention_ranks}
