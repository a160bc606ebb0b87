"""Prune: rank 0 decides which neurons stay, all ranks check that, refit what stays, and write the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hfprune_dist.budget import narrowest_widths, removals, uniform_width
from hfprune_dist.core.allocation import allocate_globally, layer_mean_one
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.selection import top_neurons
from hfprune_dist.files import read_json, write_json
from hfprune_dist.identity import digest_of
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.models.surgery import config_changes, mlp_cuts, write_companions, write_weight_file
from hfprune_dist.parallel.layerwise import LayerStream
from hfprune_dist.parallel.refit import Refit
from hfprune_dist.plan import size_of
from hfprune_dist.stages.context import Context

KEPT = "kept.json"

Replacements = Mapping[str, Callable[[], Tensor]]


def run(context: Context) -> None:
    """Write a Hugging Face folder, and ``kept.json``: the neurons that stayed, in the dense model's numbering."""
    checkpoint = open_checkpoint(context.input_path("model"))
    dense = open_checkpoint(context.input_path("dense")) if context.has_input("dense") else checkpoint
    kept = _decide(context, checkpoint, dense)
    replacements, fits = _refit(context, checkpoint, kept)
    draft = context.open_draft()
    cuts = mlp_cuts(checkpoint, kept)
    files = checkpoint.weight_files
    for done, file in enumerate(files[context.world.rank :: context.world.size]):
        context.progress.update("files", done * context.world.size, len(files))
        write_weight_file(checkpoint, file, cuts, draft, replacements)
    context.world.barrier()
    widths = [len(row) for row in kept]
    kept_of_dense = _in_dense_numbering(context, kept)
    if context.world.is_first:
        write_companions(checkpoint, draft, config_changes(checkpoint, widths))
        write_json(draft / KEPT, {"layers": kept_of_dense})
    context.commit(draft, _metrics(dense, widths) | fits | {"kept_sha256": digest_of(kept_of_dense)})


def _decide(context: Context, checkpoint: Checkpoint, dense: Checkpoint) -> list[Tensor]:
    """Select on rank 0, broadcast, and check that every rank holds the same indices."""
    kept = context.world.broadcast(_select(context, checkpoint, dense) if context.world.is_first else [])
    hashes = context.world.gather(digest_of([row.tolist() for row in kept]))
    assert len(set(hashes)) == 1, f"ranks disagree about the kept neurons: {hashes}"
    return kept


def _in_dense_numbering(context: Context, kept: list[Tensor]) -> list[list[int]]:
    """The kept neurons of a model that an earlier step pruned, as the dense model numbers them."""
    if not context.has_input("dense"):
        return [row.tolist() for row in kept]
    before: list[list[int]] = read_json(context.input_path("model") / KEPT)["layers"]
    return [[numbers[index] for index in row.tolist()] for numbers, row in zip(before, kept, strict=True)]


def _select(context: Context, checkpoint: Checkpoint, dense: Checkpoint) -> list[Tensor]:
    name = context.params["criterion"]
    stored = load_file(context.input_path("importance") / "importance.safetensors")
    scores = [stored[f"layers.{layer}.{name}"] for layer in range(checkpoint.num_layers)]
    return [top_neurons(*pair) for pair in zip(scores, _widths(context, dense, scores), strict=True)]


def _widths(context: Context, dense: Checkpoint, scores: list[Tensor]) -> list[int]:
    """Neurons that each layer keeps, since ratios are of the dense model's parameters."""
    params, size, where = context.params, size_of(dense), context.stage.label
    if params["allocation"] == "uniform":
        return [uniform_width(size, params["ratio"], params["multiple_of"], where)] * size.num_layers
    narrowest = narrowest_widths(size, params["floor"], params["protect_first"], params["protect_last"])
    wanted = removals(size, params["ratio"], narrowest, where)
    comparable = scores if CRITERIA[params["criterion"]].in_nats else layer_mean_one(scores)
    return allocate_globally(comparable, wanted, narrowest, params["multiple_of"])


def _refit(context: Context, checkpoint: Checkpoint, kept: list[Tensor]) -> tuple[Replacements, dict[str, Any]]:
    """Refit on the windows that the scores come from; returns the new weights, and metrics."""
    params = context.params
    if params["refit"] == "none":
        return {}, {}
    windows_ST = load_file(context.input_path("importance") / "windows.safetensors")["input_ids"]
    dtype = getattr(torch, params["dtype"])
    stream = LayerStream(checkpoint, windows_ST, dtype, params["micro_batch_size"], context.world)
    refit = Refit(checkpoint, kept, params["refit"], stream, context.work / "refit", context.world)

    def after_each(done: int) -> None:
        context.progress.update("refit", done, checkpoint.num_layers)
        context.interruption.stop_if_agreed(context.world)

    fits = refit.run(after_each)
    return refit.replacements(), {
        "refit_ridge": [fit.ridge for fit in fits],
        "refit_error_before": [fit.error_before for fit in fits],
        "refit_error_after": [fit.error_after for fit in fits],
    }


def _metrics(dense: Checkpoint, widths: list[int]) -> dict[str, Any]:
    size = size_of(dense)
    removed = size.num_layers * size.intermediate_size - sum(widths)
    return {
        "ratio_reached": size.ratio_of(removed),
        "parameters": dense.parameters - removed * dense.parameters_per_neuron,
        "intermediate_size": widths[0] if len(set(widths)) == 1 else None,
        "intermediate_sizes": widths,
    }
