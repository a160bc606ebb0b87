"""Prune: rank 0 decides which units stay; all ranks refit what stays, and write the checkpoint."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.pruned_config import pruned_config, write_kept
from hfprune_dist.checkpoints.write_pruned import write_companions, write_weight_file
from hfprune_dist.planning.shapes import shape_for
from hfprune_dist.planning.target import Target
from hfprune_dist.refit.low_rank import compress_layers
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.stages.prune_refit import (
    Context,
    Replacements,
    dense_model,
    ratio_left,
    refitted,
    refitted_norms,
    require_norms,
    stream_of,
)
from hfprune_dist.stages.shape_metrics import shape_metrics
from hfprune_dist.stages.shape_search import decide_shape
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.score_names import SCORES, scores_of_layers


def run(context: Context) -> None:
    """Write a Hugging Face folder, and ``kept.json``: the units that stayed."""
    checkpoint, params, world = open_checkpoint(context.input_path("model")), context.params, context.world
    kinds, dense = checkpoint.pruned_kinds(params.structures), dense_model(context)
    where = context.stage.label + (", as a share of what the round before left" if dense else "")
    target = Target.from_settings(checkpoint, params, ratio_left(context, checkpoint), where)
    if params.refits_norms:
        require_norms(checkpoint)
    if params.dtype is not None:
        context.check_layers(checkpoint, context.calibration_windows(), params.dtype)
    if params.allocation == "low_rank":
        kept, replacements, metrics = _compressed(context, target)
    else:
        stored = load_file(context.input_path("importance") / SCORES)
        scores = {units.kind: scores_of_layers(stored, params.criterion, units.kind) for units in kinds}
        kept, metrics = world.broadcast(decide_shape(context, target, scores))
        replacements = refitted(context, checkpoint, kept)
    if params.refits_norms:
        norms, of_norms = refitted_norms(context, checkpoint, kept, replacements)
        replacements, metrics = {**replacements, **norms}, metrics | of_norms

    draft, files = context.open_draft(), checkpoint.weight_files
    for done, file in enumerate(files[world.rank :: world.size]):
        context.progress.update("files", done * world.size, len(files))
        write_weight_file(checkpoint, file, kept, draft, replacements)
    config = pruned_config(checkpoint, kept.shape, [units.output for units in kinds] if params.refit == "bias" else [])

    def write_rest() -> None:
        write_companions(checkpoint, draft, config)
        write_kept(draft, kept)

    world.barrier()  # the rest describes all weight files
    world.on_rank0(write_rest)
    context.commit(draft, shape_metrics(checkpoint, kept.shape, config, dense) | metrics)


def _compressed(context: Context, target: Target) -> tuple[Kept, Replacements, dict[str, Any]]:
    """What stays, factors of low rank for attention's projections, and metrics: their ``attention_ranks``."""
    checkpoint, windows_ST, shape = target.dense, context.calibration_windows(), shape_for(target)
    layers, stream = RefittedLayers(checkpoint, context.work / "low_rank"), stream_of(context, checkpoint, windows_ST)
    after_each = context.reporting("low rank", checkpoint.num_layers)
    kept = compress_layers(checkpoint, shape, stream, layers, after_each)
    attention_ranks = {name.rpartition(".")[2]: row[0] for name, row in shape.ranks.items()}
    return kept, layers.replacements(kept.layers), {"attention_ranks": attention_ranks}
