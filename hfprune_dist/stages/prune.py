"""Prune: rank 0 decides which units stay, all ranks check that, refit what stays, and write the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.write_pruned import config_changes, unit_cuts, write_companions, write_weight_file
from hfprune_dist.config.parameters import PruneParameters
from hfprune_dist.core.allocation import allocate_globally, layer_mean_one
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.selection import top_units
from hfprune_dist.core.width_search import MEASUREMENTS, ReweightedWidths, Widths, search_widths
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.whole_model_probe import PROBE, Probe, obtain_probe
from hfprune_dist.planning.widths import Target, size_of
from hfprune_dist.refit.measure_widths import Measurement
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.run_refit import DenseRefit, SequentialRefit
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.store.hashing import digest_of

Context = AnyContext[PruneParameters]

KEPT = "kept.json"

Replacements = Mapping[str, Callable[[], Tensor]]


def run(context: Context) -> None:
    """Write a Hugging Face folder, and ``kept.json``: the units that stayed, in the dense model's numbering."""
    checkpoint = open_checkpoint(context.input_path("model"))
    dense = open_checkpoint(context.input_path("dense")) if context.has_input("dense") else checkpoint
    kept, search = _decide(context, checkpoint, dense)
    replacements, fits = _refit(context, checkpoint, dense, kept)
    draft = context.open_draft()
    cuts = unit_cuts(checkpoint, kept)
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
    metrics = _metrics(dense, widths) | search | fits
    context.commit(draft, metrics | {"kept_sha256": digest_of(kept_of_dense)})


def _decide(context: Context, checkpoint: Checkpoint, dense: Checkpoint) -> tuple[list[Tensor], dict[str, Any]]:
    """Select on rank 0, broadcast, and check that every rank holds the same indices; also metrics of a search."""
    stored = load_file(context.input_path("importance") / "importance.safetensors")
    scores = [stored[f"layers.{layer}.{context.params.criterion}"] for layer in range(checkpoint.num_layers)]
    widths, search = _widths(context, dense, scores)
    kept = [top_units(*pair) for pair in zip(scores, widths, strict=True)] if context.world.is_first else []
    kept = context.world.broadcast(kept)
    hashes = context.world.gather(digest_of([row.tolist() for row in kept]))
    assert len(set(hashes)) == 1, f"ranks disagree about the kept units: {hashes}"
    return kept, search


def _in_dense_numbering(context: Context, kept: list[Tensor]) -> list[list[int]]:
    """The kept units of a model that an earlier step pruned, as the dense model numbers them."""
    if not context.has_input("dense"):
        return [row.tolist() for row in kept]
    before: list[list[int]] = read_json(context.input_path("model") / KEPT)["layers"]
    return [[numbers[index] for index in row.tolist()] for numbers, row in zip(before, kept, strict=True)]


def _widths(context: Context, dense: Checkpoint, scores: list[Tensor]) -> tuple[Sequence[int], dict[str, Any]]:
    """Units that each layer keeps, the same on every rank; ratios are of the dense model's parameters."""
    params, multiple_of = context.params, context.params.multiple_of
    target = Target(size_of(dense), params.ratio, multiple_of, context.stage.label)
    if params.allocation == "uniform":
        return [target.uniform_width()] * dense.num_layers, {}
    narrowest = target.narrowest_widths(*params.limits())
    wanted = target.removals(narrowest)
    comparable = scores if CRITERIA[params.criterion].in_nats else layer_mean_one(scores)
    if params.allocation == "global":
        return allocate_globally(comparable, wanted, narrowest, multiple_of), {}
    found = search_widths(
        ReweightedWidths(comparable, wanted, narrowest, multiple_of),
        _uniform(target, narrowest),
        _measurement(context, dense, scores).kl,
    )
    return found.widths, {"search_kl": found.candidates}


def _uniform(target: Target, narrowest: Sequence[int]) -> Widths | None:
    """The uniform widths, where layers may be that narrow."""
    width = target.uniform_width()
    return (width,) * len(narrowest) if width >= max(narrowest) else None


def _measurement(context: Context, checkpoint: Checkpoint, scores: list[Tensor]) -> Measurement:
    params = context.params
    dtype, size = params.forward_pass()
    return Measurement(
        checkpoint,
        scores,
        context.calibration_windows(),
        refit=params.refit != "none",
        dtype=getattr(torch, dtype),
        micro_batch_size=size,
        world=context.world,
        probe=_probe(context, checkpoint),
        folder=context.work,
        after_each=_after_each_layer(context, "search", MEASUREMENTS * checkpoint.num_layers),
    )


def _refit(
    context: Context, checkpoint: Checkpoint, dense: Checkpoint, kept: list[Tensor]
) -> tuple[Replacements, dict[str, Any]]:
    """Refit on the windows that the scores come from; returns the new weights, and metrics."""
    params, world = context.params, context.world
    if params.refit == "none":
        return {}, {}
    name, size = params.forward_pass()
    dtype = getattr(torch, name)
    windows_ST, whole_mlp = context.calibration_windows(), params.refit == "block"
    fitted = RefittedLayers(checkpoint, whole_mlp, context.work / "refit")
    refit: DenseRefit | SequentialRefit
    if params.refit == "dense":
        stream = LayerStream(checkpoint, windows_ST, dtype, size, world, probe=_probe(context, checkpoint))
        refit = DenseRefit(checkpoint, kept, stream, fitted, world)
    else:
        stream = LayerStream(checkpoint, windows_ST, dtype, size, world)
        dense_stream = LayerStream(dense, windows_ST, dtype, size, world, probe=_probe(context, dense))
        refit = SequentialRefit(checkpoint, kept, stream, dense_stream, fitted, whole_mlp=whole_mlp, world=world)
    refit.run(_after_each_layer(context, "refit", checkpoint.num_layers))
    fits = fitted.reports()
    return fitted.replacements(), {
        "refit_ridge": [fit.ridge for fit in fits],
        "refit_error_before": [fit.error_before for fit in fits],
        "refit_error_after": [fit.error_after for fit in fits],
    }


def _probe(context: Context, checkpoint: Checkpoint) -> Probe:
    """Of the model that scores come from its importance stage has left one."""
    scored = checkpoint.path == context.input_path("model")
    dtype, size = context.params.forward_pass()
    return obtain_probe(
        checkpoint,
        context.calibration_windows(),
        getattr(torch, dtype),
        size,
        context.world,
        saved=context.input_path("importance") / PROBE if scored else None,
        sharding=context.runtime.sharding,
    )


def _after_each_layer(context: Context, phase: str, total: int) -> Callable[[int], None]:
    """Shows how many layers are done, and ends the stage where all ranks were asked to."""

    def after_each(done: int) -> None:
        context.progress.update(phase, done, total)
        context.interruption.stop_if_agreed(context.world)

    return after_each


def _metrics(dense: Checkpoint, widths: list[int]) -> dict[str, Any]:
    size = size_of(dense)
    return {
        "ratio_reached": size.reached(widths),
        "parameters": dense.parameters - size.removed(widths) * size.parameters_per_unit,
        **dense.units.sizes(widths),
    }
