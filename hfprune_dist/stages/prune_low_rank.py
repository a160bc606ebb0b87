"""The low-rank pass of a prune stage: attention gets matrices of low rank, and all MLPs one width."""

from __future__ import annotations

from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.refit.low_rank_layers import LowRankLayers
from hfprune_dist.refit.low_rank_pass import LowRankPass, Sizes
from hfprune_dist.stages.prune_refit import Context, Replacements, after_each_layer, probe_of, stream_of
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Kept


def decide_low_rank(context: Context, checkpoint: Checkpoint) -> tuple[Kept, Replacements, dict[str, Any]]:
    """Return what stays, factors of attention's projections, and metrics: their ``attention_ranks``."""
    params, windows_ST = context.params, context.calibration_windows()
    shape = LowRankTarget(ShapeTarget.of(checkpoint, params, context.stage.label)).shape()
    ranks = {name: row[0] for name, row in shape.ranks.items()}
    sizes = Sizes(shape.units[NEURONS][0], ranks)
    layers = LowRankLayers(checkpoint, list(ranks), context.work / "low_rank")
    probe = probe_of(context, checkpoint, windows_ST)
    alone_ST = probe.micro_batch_of(windows_ST, params.forward_pass()[1])
    LowRankPass(
        checkpoint,
        sizes,
        stream_of(context, checkpoint, windows_ST),
        layers,
        whole=stream_of(context, checkpoint, alone_ST, probe),
        world=context.world,
    ).run(after_each_layer(context, "low rank", checkpoint.num_layers))
    kept = Kept(shape.layers, {NEURONS: [layers.kept(number) for number in shape.layers]}, shape.ranks)
    attention_ranks = {name.rpartition(".")[2]: rank for name, rank in ranks.items()}
    return kept, layers.replacements(), {"attention_ranks": attention_ranks}
