"""Refits in a prune stage: of the weights that stay, as its settings ask, and then of all norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.core import quasi_newton
from hfprune_dist.core.redraw import redrawn_copies
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.sums import windows_held_out
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.models.norm_factors import norms_of_layers, weight_offset, with_factors
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit.bias_refit import find_biases
from hfprune_dist.refit.dense_refit import DenseRefit
from hfprune_dist.refit.measurement import Hidden, dense_outputs, normed_outputs
from hfprune_dist.refit.norms_refit import NormGradients, PrunedLayers, fit_norms, micro_batches_of_norms
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units

Context = AnyContext[PruneParameters]

# Name of a tensor of the checkpoint -> function that reads what is written in its place.
Replacements = Mapping[str, Callable[[], Tensor]]


def pruned_kinds(context: Context, checkpoint: Checkpoint) -> list[Units]:
    """The kinds of units that the stage prunes, the MLP's first."""
    return checkpoint.pruned_kinds(context.params.structures)


def refitted(context: Context, checkpoint: Checkpoint, kept: Kept) -> Replacements:
    """Refit what the stage will write, as its settings say; collective."""
    if context.params.refit == "none":
        return {}
    windows_ST = context.calibration_windows()
    if context.params.refit == "bias":  # those that make up for what goes
        saved = SavedLayers(context.work / "biases", kept.layers)
        stream, kinds = stream_of(context, checkpoint, windows_ST), pruned_kinds(context, checkpoint)
        after_each = context.reporting("biases", checkpoint.num_layers)
        find_biases(checkpoint, kept, kinds, stream, saved, context.world, after_each)
        return _in_memory(saved.read())
    if context.params.refit_copies:
        copies_SRT = _redrawn(context, checkpoint, windows_ST).long()
        windows_ST = in_refit_order(windows_ST, copies_SRT, context.params.forward_pass()[1])
    whole_mlp = context.params.refit == "block"
    fitted = refit_layers(context, checkpoint, kept, windows_ST, "refit", phase="refit", whole_mlp=whole_mlp)
    return fitted.replacements(kept.layers)


def refit_layers(
    context: Context,
    checkpoint: Checkpoint,
    kept: Kept,
    windows_ST: Tensor,
    folder: str,
    *,
    phase: str,
    whole_mlp: bool,
) -> RefittedLayers:
    """Refit what stays on some windows, or resume where an earlier attempt was interrupted.

    Args:
        folder: where refitted layers are written, in the work folder.
        phase: its name in progress reports.
        whole_mlp: whether all weights of an MLP are refitted, not only its output projection.
    """
    fitted = RefittedLayers(checkpoint, pruned_kinds(context, checkpoint), whole_mlp, context.work / folder)
    stream = stream_of(context, checkpoint, windows_ST)
    refit: DenseRefit | SequentialRefit
    if context.params.refit == "dense":
        refit = DenseRefit(kept, stream, fitted, context.world)
    else:
        refit = SequentialRefit(
            checkpoint.family,
            kept,
            stream,
            stream_of(context, checkpoint, windows_ST),
            fitted,
            more_iterations=context.params.refit_iterations,
            world=context.world,
        )
    refit.run(context.reporting(phase, checkpoint.num_layers))
    return fitted


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


def stream_of(context: Context, checkpoint: Checkpoint, windows_ST: Tensor) -> LayerStream:
    """Stream of windows before a model's first layer."""
    dtype, size = context.params.forward_pass()
    return LayerStream(checkpoint, windows_ST, getattr(torch, dtype), size, context.world)


def outputs_of_dense(context: Context, checkpoint: Checkpoint, micro_batches: Mapping[int, Tensor]) -> Hidden:
    """Outputs of the dense model for this rank's share of micro-batches; one pass through its layers. Collective."""
    dtype = getattr(torch, context.params.forward_pass()[0])
    after_each = context.reporting("dense model", checkpoint.num_layers)
    return dense_outputs(checkpoint, micro_batches, dtype, context.world, after_each)


# Norms.


def require_norms(checkpoint: Checkpoint) -> None:
    """Raise a ``UserError`` if the norms of a model are of a kind that can't be refitted."""
    for name, norm in _norms(checkpoint, norms_of_layers(checkpoint, range(checkpoint.num_layers))).items():
        weight_offset(norm, f"{checkpoint.path}: {name}")


def refitted_norms(
    context: Context, checkpoint: Checkpoint, kept: Kept, replacements: Replacements
) -> tuple[Replacements, dict[str, Any]]:
    """Refit all norms; collective.

    Args:
        replacements: refitted weights of the model that the stage will write.

    Returns:
        The norms' new weights; and the divergence from the dense model before the fit and in its passes, None where it
        is NaN or infinite.

    Raises:
        UserError: as ``as_stored`` and the refits do.
    """
    name, size = context.params.forward_pass()
    pruned = PrunedLayers(checkpoint, kept, replacements, getattr(torch, name), context.world.device)
    batches = micro_batches_of_norms(context.calibration_windows(), size)
    gradients = NormGradients(
        pruned,
        batches,
        outputs_of_dense(context, checkpoint, batches),
        world=context.world,
        after_each=context.reporting("norms", 2 * quasi_newton.PASSES * len(pruned.numbers)),
    )
    fit, weights = fit_norms(gradients), dict[str, Tensor]()
    for (norm_name, norm), factors_C in zip(_norms(checkpoint, gradients.norms).items(), fit.factors_RC, strict=True):
        for of_norm, weight_C in with_factors(norm, factors_C).items():
            tensor = f"{norm_name}.{of_norm}"
            weights[tensor] = as_stored(checkpoint, tensor, weight_C, otherwise="set prune.effort to quick")
    return _in_memory(weights), {"norms_kl": [kl if math.isfinite(kl) else None for kl in fit.kl]}


def _norms(checkpoint: Checkpoint, of_layers: list[tuple[int, str]]) -> Mapping[str, nn.Module]:
    """Some norms of layers, and the final one at the end, by their names; whatever dtype passes compute in."""
    reader, family = LayerReader(checkpoint, torch.float32, torch.device("cpu")), checkpoint.family
    norms = {f"{family.layers}.{number}.{name}": reader.norm_in_layer(number, name) for number, name in of_layers}
    return norms | {family.norm: reader.final_norm()}


def _in_memory(tensors: Mapping[str, Tensor]) -> Replacements:
    """Tensors that are already there, as replacements of those of the same names."""
    return {name: partial(_given, tensor) for name, tensor in tensors.items()}


def _given(tensor: Tensor) -> Tensor:
    return tensor
