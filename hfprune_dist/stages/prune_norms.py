"""Refit of norms in a prune stage, once all other weights of the model that it will write are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.core import quasi_newton
from hfprune_dist.models.norm_factors import norms_of_layers, weight_offset, with_factors
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit.norms_refit import NormGradients, PrunedLayers, fit_norms, micro_batches_of_norms
from hfprune_dist.stages.prune_refit import (
    Context,
    Replacements,
    in_memory,
    outputs_of_dense,
)
from hfprune_dist.structures.kept import Kept

# Name of a norm in the checkpoint -> the norm as the checkpoint has it.
Norms = Mapping[str, nn.Module]


def require_norms(context: Context, checkpoint: Checkpoint) -> None:
    """Raise a ``UserError`` if the stage would refit norms of a kind for which this can't be done."""
    if context.params.refit_norms:
        for name, norm in _norms_of(checkpoint, norms_of_layers(checkpoint, range(checkpoint.num_layers))).items():
            weight_offset(norm, f"{checkpoint.path}: {name}")


def refitted_norms(
    context: Context, checkpoint: Checkpoint, kept: Kept, replacements: Replacements
) -> tuple[Replacements, dict[str, Any]]:
    """Refit all norms if the settings ask for it; collective.

    Args:
        replacements: refitted weights of the model that the stage will write.

    Returns:
        These and the norms' new weights; and the divergence from the dense model before the fit and in its passes, None
        where it is NaN or infinite.

    Raises:
        UserError: as ``as_stored`` and the refits do.
    """
    if not context.params.refit_norms:
        return replacements, {}
    name, size = context.params.forward_pass()
    pruned = PrunedLayers(checkpoint, kept, replacements, getattr(torch, name), context.world.device)
    batches = micro_batches_of_norms(context.calibration_windows(), size)
    total = 2 * quasi_newton.PASSES * len(pruned.numbers)
    gradients = NormGradients(
        pruned,
        batches,
        outputs_of_dense(context, checkpoint, batches),
        world=context.world,
        after_each=context.reporting("norms", total),
    )
    fit = fit_norms(gradients)
    weights = _with_factors(checkpoint, _norms_of(checkpoint, gradients.norms), fit.factors_RC)
    return {**replacements, **weights}, {"norms_kl": [kl if math.isfinite(kl) else None for kl in fit.kl]}


def _norms_of(checkpoint: Checkpoint, of_layers: list[tuple[int, str]]) -> Norms:
    """Some norms of layers, and the final one at the end, whatever dtype passes compute in."""
    reader, family = LayerReader(checkpoint, torch.float32, torch.device("cpu")), checkpoint.family
    norms = {f"{family.layers}.{number}.{name}": reader.norm_in_layer(number, name) for number, name in of_layers}
    return norms | {family.norm: reader.final_norm()}


def _with_factors(checkpoint: Checkpoint, norms: Norms, factors_RC: Tensor) -> Replacements:
    """Norms' weights as they are written, with factors on their outputs."""
    rounded = partial(as_stored, checkpoint, otherwise="set prune.effort to quick")
    found: dict[str, Tensor] = {}
    for (name, norm), factors_C in zip(norms.items(), factors_RC, strict=True):
        found |= {f"{name}.{of_norm}": weight_C for of_norm, weight_C in with_factors(norm, factors_C).items()}
    return in_memory({name: rounded(name, weight_C) for name, weight_C in found.items()})
