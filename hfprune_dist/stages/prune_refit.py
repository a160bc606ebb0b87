"""Refits in a prune stage: the one that its settings ask for, and what the manifest records of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.core.redraw import redrawn_copies
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.sums import windows_held_out
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit.bias_refit import find_biases
from hfprune_dist.refit.dense_refit import DenseRefit
from hfprune_dist.refit.least_squares_fit import ProjectionFit
from hfprune_dist.refit.measurement import Hidden, dense_outputs, normed_outputs
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units

Context = AnyContext[PruneParameters]

# Name of a tensor of the checkpoint -> function that reads what is written in its place.
Replacements = Mapping[str, Callable[[], Tensor]]


def pruned_kinds(context: Context, checkpoint: Checkpoint) -> list[Units]:
    """The kinds of units that the stage prunes, the MLP's first."""
    return checkpoint.pruned_kinds(context.params.structures)


def in_memory(tensors: Mapping[str, Tensor]) -> Replacements:
    """Tensors that are already there, as replacements of those of the same names."""
    return {name: partial(_given, tensor) for name, tensor in tensors.items()}


def _given(tensor: Tensor) -> Tensor:
    return tensor


def added_biases(context: Context, checkpoint: Checkpoint, kept: Kept) -> Replacements:
    """Find the biases that make up for what goes, on all calibration windows."""
    saved = SavedLayers(context.work / "biases", kept.layers)
    windows_ST = context.calibration_windows()
    stream = stream_of(context, checkpoint, windows_ST)
    kinds = pruned_kinds(context, checkpoint)
    after_each = context.reporting("biases", checkpoint.num_layers)
    find_biases(checkpoint, kept, kinds, stream, saved, context.world, after_each)
    return in_memory(saved.read())


def refit_layers(
    context: Context,
    checkpoint: Checkpoint,
    kept: Kept,
    windows_ST: Tensor,
    fitted: RefittedLayers,
    *,
    phase: str,
) -> None:
    """Refit what stays on some windows, or resume where an earlier attempt was interrupted.

    Args:
        fitted: where refitted layers are written.
        phase: its name in progress reports.
    """
    refit: DenseRefit | SequentialRefit
    if context.params.refit == "dense":
        stream = stream_of(context, checkpoint, windows_ST)
        refit = DenseRefit(kept, stream, fitted, context.world)
    else:
        refit = SequentialRefit(
            checkpoint.family,
            kept,
            stream_of(context, checkpoint, windows_ST),
            stream_of(context, checkpoint, windows_ST),
            fitted,
            more_iterations=context.params.refit_iterations,
            world=context.world,
        )
    refit.run(context.reporting(phase, checkpoint.num_layers))


def final_refit(context: Context, checkpoint: Checkpoint, kept: Kept) -> RefittedLayers:
    """Refit what the stage will write, as its settings say; collective."""
    kinds, whole_mlp = pruned_kinds(context, checkpoint), context.params.refit == "block"
    fitted = RefittedLayers(checkpoint, kinds, whole_mlp, context.work / "refit")
    refit_layers(context, checkpoint, kept, _windows(context, checkpoint), fitted, phase="refit")
    return fitted


def _windows(context: Context, checkpoint: Checkpoint) -> Tensor:
    """The calibration windows, and ``refit_copies`` of each with redrawn tokens, int64 [windows, sequence_length]."""
    windows_ST = context.calibration_windows()
    if not context.params.refit_copies:
        return windows_ST
    copies_SRT = _redrawn(context, checkpoint, windows_ST).long()
    return in_refit_order(windows_ST, copies_SRT, context.params.forward_pass()[1])


def _redrawn(context: Context, checkpoint: Checkpoint, windows_ST: Tensor) -> Tensor:
    """Copies of all windows, int32 [windows, copies of each, tokens], on every rank."""
    (name, size), world = context.params.forward_pass(), context.world
    batches = dict(enumerate(windows_ST.split(size)))
    hidden = outputs_of_dense(context, checkpoint, batches)
    head = LayerReader(checkpoint, getattr(torch, name), world.device).head()
    rounds = range(0, len(batches), world.size)
    after_each = context.reporting("copies", len(rounds))
    own: dict[int, Tensor] = {}
    for done, first in enumerate(rounds, start=1):
        index = first + world.rank
        for place, hidden_TC in enumerate(hidden.pop(index, ())):
            outputs = normed_outputs(head, hidden_TC[None].to(world.device))
            window = index * size + place
            own[window] = redrawn_copies(windows_ST[window], outputs, context.params.refit_copies, window=window).int()
        after_each(done)
    copies = {window: copies_RT for share in world.all_gather(own) for window, copies_RT in share.items()}
    return torch.stack([copies[window] for window in range(len(windows_ST))])


def in_refit_order(windows_ST: Tensor, copies_SRT: Tensor, micro_batch_size: int) -> Tensor:
    """Windows and copies in an order in which refits hold out those windows that they would hold out without copies,
    and all copies of them, as far as there is room; otherwise a refit would be judged on what it was fitted to.

    Args:
        copies_SRT: copies of all windows [windows, copies of each, tokens].
    """
    everything_SRT = torch.cat([windows_ST[:, None], copies_SRT], dim=1)
    versions, apart = everything_SRT.shape[1], windows_held_out(len(windows_ST), micro_batch_size)
    # Windows in order, each with its copies: where there is no room, or too much, few windows are on both sides.
    held_out, fitted = (
        [window * versions + it for window, is_apart in enumerate(apart) if is_apart is side for it in range(versions)]
        for side in (True, False)
    )
    order = []
    for is_apart in windows_held_out(everything_SRT[..., 0].numel(), micro_batch_size):
        first, second = (held_out, fitted) if is_apart else (fitted, held_out)
        order.append(first.pop(0) if first else second.pop())
    return everything_SRT.flatten(0, 1)[order]


def refit_metrics(fitted: RefittedLayers, layers: Sequence[int]) -> dict[str, Any]:
    """Metrics, for the manifest, of least squares on the output projections of each kind, layer by layer."""
    reports = fitted.reports(layers)
    metrics: dict[str, Any] = {}
    for units in fitted.kinds:
        metrics |= _fit_metrics(units, [report.get(units.kind) for report in reports])
    return metrics


def _fit_metrics(units: Units, fits: Sequence[ProjectionFit | None]) -> dict[str, list[float | None]]:
    """One kind's metrics, with None for layers that have no units of that kind."""
    name = "refit" if units.kind == NEURONS else f"refit_{units.kind}"
    return {
        f"{name}_{what}": [None if fit is None else getattr(fit, what) for fit in fits]
        for what in ("ridge", "error_before", "error_after")
    }


def stream_of(context: Context, checkpoint: Checkpoint, windows_ST: Tensor) -> LayerStream:
    """Stream of windows before a model's first layer."""
    dtype, size = context.params.forward_pass()
    return LayerStream(checkpoint, windows_ST, getattr(torch, dtype), size, context.world)


def outputs_of_dense(context: Context, checkpoint: Checkpoint, micro_batches: Mapping[int, Tensor]) -> Hidden:
    """Outputs of the dense model for this rank's share of micro-batches; one pass through its layers. Collective."""
    dtype = getattr(torch, context.params.forward_pass()[0])
    after_each = context.reporting("dense model", checkpoint.num_layers)
    return dense_outputs(checkpoint, micro_batches, dtype, context.world, after_each)
