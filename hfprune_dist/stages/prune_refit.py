"""Refits in a prune stage: of the weights that stay, as its settings ask, and then of all norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.core import quasi_newton
from hfprune_dist.core.devices import send
from hfprune_dist.core.memory_limits import NORM_TOKENS
from hfprune_dist.core.redraw import redrawn_copy
from hfprune_dist.distributed.layer_stream import LayerStream, States
from hfprune_dist.distributed.sums import windows_held_out
from hfprune_dist.kinds.memory import Passes
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.models.norm_factors import norms_of_layers, weight_offset, with_factors
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit.bias_refit import find_biases
from hfprune_dist.refit.measurement import PrunedLayers
from hfprune_dist.refit.norms_refit import NormGradients, fit_norms, windows_of_norms
from hfprune_dist.refit.output_refit import refit_on_dense
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.structures.kept import Kept

Context = AnyContext[PruneParameters]

# Iterations of Gauss-Newton steps on the windows that aren't held out, and then on all (``Reconstruction.improve``).
# If quick, only the former: at most these, and as many as together take as long as one on the dense model's MLPs.
ITERATIONS = 4, 6

# Name of a tensor of the checkpoint -> function that reads what is written in its place.
Replacements = Mapping[str, Callable[[], Tensor]]


def dense_model(context: Context) -> Checkpoint | None:
    """The dense model, if the model is what an earlier round has left of it."""
    return open_checkpoint(context.input_path("dense")) if context.has_input("dense") else None


def ratio_left(context: Context, checkpoint: Checkpoint) -> float:
    """The share of the model's parameters that is to go, so that the ratio is the share of the dense model's that has
    gone in all rounds.
    """
    dense = dense_model(context)
    return 1 - (1 - context.params.ratio) * dense.parameters / checkpoint.parameters if dense else context.params.ratio


def refitted(context: Context, checkpoint: Checkpoint, kept: Kept) -> Replacements:
    """Refit what the stage will write, as its settings say; collective."""
    if context.params.refit == "none":
        return {}
    windows_ST = context.calibration_windows()
    if context.params.refit == "bias":  # those that make up for what goes
        found = _refits(context, checkpoint, kept, "biases")
        kinds = checkpoint.pruned_kinds(context.params.structures)
        after_each = context.reporting("biases", checkpoint.num_layers)
        find_biases(kept, kinds, stream_of(context, checkpoint, windows_ST), found, after_each)
        return found.replacements(kept.layers)
    if context.params.sees_copies:
        copies_ST = _redrawn(context, checkpoint, windows_ST)
        windows_ST = in_refit_order(windows_ST, copies_ST, context.params.forward_pass()[1])
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
        folder: where refitted layers of the shape are written, in the work folder.
        phase: its name in progress reports.
        whole_mlp: whether all weights of an MLP are refitted, not only its output projection.
    """
    fitted = _refits(context, checkpoint, kept, folder)
    kinds = checkpoint.pruned_kinds(context.params.structures)
    stream, after_each = stream_of(context, checkpoint, windows_ST), context.reporting(phase, checkpoint.num_layers)
    if context.params.refit == "dense":
        refit_on_dense(kept, kinds, stream, fitted, after_each)
    else:
        mlp = kinds[0]
        neurons = [(mlp.counts[layer], len(kept.of_layer(layer, mlp.kind))) for layer in kept.layers]
        whole, left = map(sum, zip(*neurons, strict=True))
        iterations = (
            ITERATIONS if context.params.is_thorough else (min(max(1, whole // max(1, left)), ITERATIONS[0]), 0)
        )
        dense = stream_of(context, checkpoint, windows_ST)
        refit = SequentialRefit(kept, kinds, stream, dense, fitted, iterations=iterations if whole_mlp else None)
        refit.run(after_each)
    return fitted


def _refits(context: Context, checkpoint: Checkpoint, kept: Kept, folder: str) -> RefittedLayers:
    """Where the layers refitted for a shape are kept: a search that is repeated elsewhere may find another shape."""
    return RefittedLayers(checkpoint, context.work / f"{folder}-{digest_of(asdict(kept.shape))[:8]}")


def _redrawn(context: Context, checkpoint: Checkpoint, windows_ST: Tensor) -> Tensor:
    """A copy of each window, int64 [windows, tokens], on every rank."""
    (name, size), world = context.params.forward_pass(), context.world
    hidden = dense_states(context, checkpoint, windows_ST, Passes(size))
    head = LayerReader(checkpoint, getattr(torch, name), world.device).head()
    rounds = range(0, -(-len(windows_ST) // size), world.size)
    after_each = context.reporting("copies", len(rounds))
    own: dict[int, Tensor] = {}
    for done, first in enumerate(rounds, start=1):
        index = first + world.rank
        for place, hidden_TC in enumerate(hidden.pop(index, ())):
            outputs = head.outputs(send(hidden_TC[None], world.device))
            window = index * size + place
            own[window] = redrawn_copy(windows_ST[window], outputs, window=window)
        after_each(done)
    copies = {window: copy_T for share in world.all_gather(own) for window, copy_T in share.items()}
    return torch.stack([copies[window] for window in range(len(windows_ST))])


def in_refit_order(windows_ST: Tensor, copies_ST: Tensor, micro_batch_size: int) -> Tensor:
    """Windows and copies in an order in which refits hold out those windows that they would hold out without copies,
    and the copies of them, as far as there is room; otherwise a refit would be judged on what it was fitted to.
    """
    pairs_S2T = torch.stack([windows_ST, copies_ST], dim=1)
    apart = windows_held_out(len(windows_ST), micro_batch_size)
    # Windows in order, each with its copy: where there is no room, or too much, few windows are on both sides.
    held_out, fitted = (
        [2 * window + version for window, is_apart in enumerate(apart) if is_apart is side for version in range(2)]
        for side in (True, False)
    )
    order = []
    for is_apart in windows_held_out(2 * len(windows_ST), micro_batch_size):
        first, second = (held_out, fitted) if is_apart else (fitted, held_out)
        order.append(first.pop(0) if first else second.pop())
    return pairs_S2T.flatten(0, 1)[order]


def stream_of(
    context: Context, checkpoint: Checkpoint, windows_ST: Tensor, passes: Passes | None = None
) -> LayerStream:
    """Stream of windows before a model's first layer, in micro-batches of the settings' size or as in ``passes``."""
    name, size = context.params.forward_pass()
    dtype, world = getattr(torch, name), context.world
    if passes is not None:
        return LayerStream(checkpoint, windows_ST, dtype, passes.at_once, world, stay=passes.stay)
    at_once, stay = passes_of(context, checkpoint, windows_ST)
    context.decided["micro_batch_size"] = max(at_once, context.decided.get("micro_batch_size", 0))
    return LayerStream(checkpoint, windows_ST, dtype, size, world, merged=at_once // size, stay=stay)


def passes_of(context: Context, checkpoint: Checkpoint, windows_ST: Tensor) -> Passes:
    """How windows pass a model layer by layer, as the settings and the free memory have it; collective."""
    setting = context.params.micro_batch_size
    assert setting is not None
    left = context.params.model_copy(update={"ratio": ratio_left(context, checkpoint)})
    return context.passes(partial(left.passes_over, checkpoint), setting, windows_ST)


def dense_states(context: Context, checkpoint: Checkpoint, windows_ST: Tensor, passes: Passes) -> States:
    """What the dense model's head reads for this rank's micro-batches; one pass through its layers. Collective."""
    stream = stream_of(context, checkpoint, windows_ST, passes)
    stream.run_layers(context.reporting("dense model", checkpoint.num_layers))
    return dict(stream.final_hidden())


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
        The norms' weights, new if they are better on windows that are held out; and the divergence from the dense model
        before the fit and in its passes, and on the held-out windows before and after it, None where it is NaN or
        infinite, and how many windows passed at once.

    Raises:
        UserError: as ``as_stored`` and the refits do.
    """
    windows_ST = context.calibration_windows()
    is_held_out = torch.tensor(windows_held_out(len(windows_ST), context.params.forward_pass()[1]))
    judged_ST = windows_of_norms(windows_ST[is_held_out], NORM_TOKENS // 4)
    windows_ST = windows_of_norms(windows_ST[~is_held_out])
    at_once, stay = passes_of(context, checkpoint, windows_ST)
    # They are few: each rank has some.
    passes = Passes(min(at_once, -(-len(windows_ST) // context.world.size)), stay)

    def gradients_on(some_ST: Tensor, phase: str, most: int) -> NormGradients:
        dense = dense_states(context, checkpoint, some_ST, passes)
        stream = stream_of(context, checkpoint, some_ST, passes)
        pruned = PrunedLayers(checkpoint, kept, replacements, stream.reader)
        return NormGradients(pruned, stream, dense, context.reporting(phase, 2 * most * len(kept.layers)))

    gradients, weights = gradients_on(windows_ST, "norms", quasi_newton.PASSES), dict[str, Callable[[], Tensor]]()
    factors_RC, kls, held_out_kls = fit_norms(gradients, gradients_on(judged_ST, "norms, held-out windows", 1))
    for (norm_name, norm), factors_C in zip(_norms(checkpoint, gradients.norms).items(), factors_RC, strict=True):
        for of_norm, weight_C in with_factors(norm, factors_C).items():
            tensor = f"{norm_name}.{of_norm}"
            weights[tensor] = partial(as_stored, checkpoint, tensor, weight_C, otherwise="set prune.effort to quick")
    found = {"norms_kl": kls, "norms_held_out_kl": held_out_kls}
    finite = {name: [kl if math.isfinite(kl) else None for kl in values] for name, values in found.items()}
    return weights, finite | {"norms_micro_batch_size": passes.at_once}


def _norms(checkpoint: Checkpoint, of_layers: list[tuple[int, str]]) -> Mapping[str, nn.Module]:
    """Some norms of layers, and the final one at the end, by their names; whatever dtype passes compute in."""
    reader, family = LayerReader(checkpoint, torch.float32, torch.device("cpu")), checkpoint.family
    norms = {f"{family.layers}.{number}.{name}": reader.norm_in_layer(number, name) for number, name in of_layers}
    return norms | {family.norm: reader.final_norm()}
