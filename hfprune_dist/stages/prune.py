"""Prune: rank 0 decides which neurons stay, all ranks check that, refit what stays, and write the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hfprune_dist.budget import ModelSize, narrowest_widths, removals, uniform_width
from hfprune_dist.core.allocation import allocate_globally, layer_mean_one
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.search import Family, Measure, Widths, search_widths
from hfprune_dist.core.selection import top_neurons
from hfprune_dist.files import read_json, write_json
from hfprune_dist.identity import digest_of
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.models.surgery import config_changes, mlp_cuts, write_companions, write_weight_file
from hfprune_dist.parallel.layerwise import LayerStream
from hfprune_dist.parallel.measurement import Measurement
from hfprune_dist.parallel.refit import Refit
from hfprune_dist.plan import size_of
from hfprune_dist.stages.context import Context

Replacements = Mapping[str, Callable[[], Tensor]]


def run(context: Context) -> None:
    """Write a Hugging Face folder, and ``kept.json``: the neurons that stayed."""
    checkpoint = open_checkpoint(context.input_path("model"))
    kept, kept_hash, search = _decide(context, checkpoint)
    replacements, fits = _refit(context, checkpoint, kept)
    draft = context.open_draft()
    cuts = mlp_cuts(checkpoint, kept)
    files = checkpoint.weight_files
    for done, file in enumerate(files[context.world.rank :: context.world.size]):
        context.progress.update("files", done * context.world.size, len(files))
        write_weight_file(checkpoint, file, cuts, draft, replacements)
    context.world.barrier()
    widths = [len(row) for row in kept]
    if context.world.is_first:
        write_companions(checkpoint, draft, config_changes(checkpoint, widths))
        write_json(draft / "kept.json", {"layers": [row.tolist() for row in kept]})
    context.commit(draft, _metrics(checkpoint, widths) | search | fits | {"kept_sha256": kept_hash})


def _decide(context: Context, checkpoint: Checkpoint) -> tuple[list[Tensor], str, dict[str, Any]]:
    """Select on rank 0, broadcast, and check that every rank holds the same indices; also metrics of the search."""
    stored = load_file(context.input_path("importance") / "importance.safetensors")
    scores = [stored[f"layers.{layer}.{context.params['criterion']}"] for layer in range(checkpoint.num_layers)]
    widths, search = _widths(context, checkpoint, scores)
    kept = [top_neurons(*pair) for pair in zip(scores, widths, strict=True)] if context.world.is_first else []
    kept = context.world.broadcast(kept)
    kept_hash = digest_of([row.tolist() for row in kept])
    hashes = context.world.gather(kept_hash)
    assert len(set(hashes)) == 1, f"ranks disagree about the kept neurons: {hashes}"
    return kept, kept_hash, search


def _widths(context: Context, checkpoint: Checkpoint, scores: list[Tensor]) -> tuple[Sequence[int], dict[str, Any]]:
    """Neurons that each layer keeps, and metrics; the same on every rank."""
    params, size, where = context.params, size_of(checkpoint), context.stage.label
    if params["allocation"] == "uniform":
        return [uniform_width(size, params["ratio"], params["multiple_of"], where)] * size.num_layers, {}
    narrowest = narrowest_widths(size, params["floor"], params["protect_first"], params["protect_last"])
    wanted = removals(size, params["ratio"], narrowest, where)
    comparable = scores if CRITERIA[params["criterion"]].in_nats else layer_mean_one(scores)
    if params["allocation"] == "global":
        return allocate_globally(comparable, wanted, narrowest, params["multiple_of"]), {}
    found = search_widths(
        Family(comparable, wanted, narrowest, params["multiple_of"]),
        _uniform(params, size, narrowest, where),
        _remembered(context, checkpoint, scores),
    )
    return found.widths, {"search_kl": found.candidates}


def _uniform(params: Mapping[str, Any], size: ModelSize, narrowest: Sequence[int], where: str) -> Widths | None:
    """The uniform widths, where layers may be that narrow."""
    width = uniform_width(size, params["ratio"], params["multiple_of"], where)
    return (width,) * size.num_layers if width >= max(narrowest) else None


def _remembered(context: Context, checkpoint: Checkpoint, scores: list[Tensor]) -> Measure:
    """Measures candidates; what was measured is found by a later attempt."""
    params, file = context.params, context.work / "search.json"
    known = context.world.broadcast(read_json(file) if context.world.is_first and file.is_file() else {})
    measurement = Measurement(
        checkpoint,
        scores,
        params["refit"] != "none",
        load_file(context.input_path("importance") / "windows.safetensors")["input_ids"],
        getattr(torch, params["dtype"]),
        params["micro_batch_size"],
        context.world,
    )

    def after_each(done: int) -> None:
        context.progress.update("search", done, checkpoint.num_layers)
        context.interruption.stop_if_agreed(context.world)

    def measure(candidates: Sequence[Widths]) -> list[float]:
        unknown = [widths for widths in candidates if digest_of(widths) not in known]
        if unknown:
            kls = measurement.kl(unknown, after_each)
            known.update({digest_of(widths): kl for widths, kl in zip(unknown, kls, strict=True)})
            if context.world.is_first:
                write_json(file, known)
        return [known[digest_of(widths)] for widths in candidates]

    return measure


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


def _metrics(checkpoint: Checkpoint, widths: list[int]) -> dict[str, Any]:
    size = size_of(checkpoint)
    removed = size.num_layers * size.intermediate_size - sum(widths)
    return {
        "ratio_reached": size.ratio_of(removed),
        "parameters": checkpoint.parameters - removed * checkpoint.parameters_per_neuron,
        "intermediate_size": widths[0] if len(set(widths)) == 1 else None,
        "intermediate_sizes": widths,
    }
