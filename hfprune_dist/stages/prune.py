"""Prune: rank 0 decides which units stay; all ranks refit what stays, and write the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.pruned_config import pruned_config, write_kept
from hfprune_dist.checkpoints.write_pruned import write_companions, write_weight_file
from hfprune_dist.planning.shapes import shape_for
from hfprune_dist.planning.target import Target
from hfprune_dist.refit.low_rank import LowRankLayers, Sizes, compress_layers
from hfprune_dist.stages.prune_norms import refitted_norms, require_norms
from hfprune_dist.stages.prune_plain import decide_plain
from hfprune_dist.stages.prune_refit import (
    Context,
    Replacements,
    added_biases,
    final_refit,
    pruned_kinds,
    refit_metrics,
    stream_of,
)
from hfprune_dist.stages.prune_shapes import decide_shape
from hfprune_dist.stages.shape_metrics import shape_metrics
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.score_names import SCORES, scores_of_layers


def run(context: Context) -> None:
    """Write a Hugging Face folder, and ``kept.json``: the units that stayed."""
    checkpoint = open_checkpoint(context.input_path("model"))
    require_norms(context, checkpoint)
    if context.params.dtype is not None:
        context.check_layers(checkpoint, context.calibration_windows(), context.params.dtype)
    kept, replacements, metrics = _decide(context, checkpoint)
    replacements, of_norms = refitted_norms(context, checkpoint, kept, replacements)
    draft = context.open_draft()
    _write_weights(context, checkpoint, kept, replacements, draft)
    biased = [units.output for units in pruned_kinds(context, checkpoint)] if context.params.refit == "bias" else []
    config = pruned_config(checkpoint, kept.shape, biased)

    def write_rest() -> None:
        write_companions(checkpoint, draft, config)
        write_kept(draft, kept)

    context.world.on_rank0(write_rest)
    context.commit(draft, shape_metrics(checkpoint, kept.shape, config) | metrics | of_norms)


def _write_weights(
    context: Context, checkpoint: Checkpoint, kept: Kept, replacements: Replacements, draft: Path
) -> None:
    """Write the weights that stay; each rank writes a share of the files."""
    files, world = checkpoint.weight_files, context.world
    for done, file in enumerate(files[world.rank :: world.size]):
        context.progress.update("files", done * world.size, len(files))
        write_weight_file(checkpoint, file, kept, draft, replacements)
    world.barrier()  # what describes all weight files is written next


def _decide(context: Context, checkpoint: Checkpoint) -> tuple[Kept, Replacements, dict[str, Any]]:
    """Return what stays, new weights for it, and metrics."""
    params = context.params
    if params.allocation == "low_rank":
        return _decide_low_rank(context, checkpoint)
    decide = decide_plain if params.allocation == "plain" else decide_shape
    kept, metrics = context.world.broadcast(decide(context, checkpoint, _scores(context, checkpoint)))
    if params.refit == "none":
        return kept, {}, metrics
    if params.refit == "bias":
        return kept, added_biases(context, checkpoint, kept), metrics
    fitted = final_refit(context, checkpoint, kept)
    return kept, fitted.replacements(kept.layers), metrics | refit_metrics(fitted, kept.layers)


def _decide_low_rank(context: Context, checkpoint: Checkpoint) -> tuple[Kept, Replacements, dict[str, Any]]:
    """Return what stays, factors of attention's projections, and metrics: their ``attention_ranks``."""
    params, windows_ST = context.params, context.calibration_windows()
    shape = shape_for(Target.of(checkpoint, params, params.ratio, context.stage.label))
    ranks = {name: row[0] for name, row in shape.ranks.items()}
    sizes = Sizes(shape.units[NEURONS][0], ranks)
    layers = LowRankLayers(checkpoint, list(ranks), context.work / "low_rank")
    stream = stream_of(context, checkpoint, windows_ST)
    after_each = context.reporting("low rank", checkpoint.num_layers)
    compress_layers(checkpoint, sizes, stream, layers, context.world, after_each)
    kept = Kept(shape.layers, {NEURONS: [layers.kept(number) for number in shape.layers]}, shape.ranks)
    attention_ranks = {name.rpartition(".")[2]: rank for name, rank in ranks.items()}
    return kept, layers.replacements(), {"attention_ranks": attention_ranks}


def _scores(context: Context, checkpoint: Checkpoint) -> dict[str, list[Tensor]]:
    """Kind of units that are pruned -> scores of each layer's units."""
    stored = load_file(context.input_path("importance") / SCORES)
    kinds = [units.kind for units in pruned_kinds(context, checkpoint)]
    return {kind: scores_of_layers(stored, context.params.criterion, kind) for kind in kinds}
