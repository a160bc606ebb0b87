"""Refits of norms in a prune stage, once all other weights of the model that it will write are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.rounding import as_stored
from hfprune_dist.core import final_norm, quasi_newton
from hfprune_dist.models.norm_factors import norms_of_layers, weight_offset, with_factors
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit.final_norm_refit import FinalNormRefit, micro_batches_of_fit, pruned_outputs
from hfprune_dist.refit.norm_gradients import NormGradients
from hfprune_dist.refit.norms_refit import NormsRefit, micro_batches_of_norms
from hfprune_dist.refit.pruned_layers import PrunedLayers
from hfprune_dist.stages.prune_refit import Context, Models, Replacements, after_each_layer, in_memory, outputs_of_dense
from hfprune_dist.structures.kept import Kept

# Name of a norm in the checkpoint -> the norm as the checkpoint has it.
Norms = Mapping[str, nn.Module]


def require_norms(context: Context, checkpoint: Checkpoint) -> None:
    """Raise a ``UserError`` if the stage would refit norms of a kind for which this can't be done."""
    layers = range(checkpoint.num_layers if context.params.refit_norms else 0)
    if context.params.refit_norms or context.params.refit_final_norm:
        for name, norm in _norms_of(checkpoint, norms_of_layers(checkpoint, layers)).items():
            weight_offset(norm, f"{checkpoint.path}: {name}")


def refitted_norms(
    context: Context, models: Models, kept: Kept, replacements: Replacements
) -> tuple[Replacements, dict[str, Any]]:
    """Refit the norms that the settings ask for; collective.

    Args:
        replacements: refitted weights of the model that the stage will write.

    Returns:
        These and the norms' new weights; and the divergence from the dense model before the fit and in its passes, None
        where it is NaN or infinite.

    Raises:
        UserError: on all ranks, as ``as_stored`` and the refits do.
    """
    params, checkpoint = context.params, models.checkpoint
    if not (params.refit_norms or params.refit_final_norm):
        return replacements, {}
    name, size = params.forward_pass()
    pruned = PrunedLayers(checkpoint, kept, replacements, getattr(torch, name), context.world.device)
    refit, cut = (
        (_refitted_all, micro_batches_of_norms) if params.refit_norms else (_refitted_last, micro_batches_of_fit)
    )
    weights, metrics = refit(context, models, pruned, cut(context.calibration_windows(), size))
    return {**replacements, **weights}, metrics


def _refitted_all(
    context: Context, models: Models, pruned: PrunedLayers, batches: Mapping[int, Tensor]
) -> tuple[Replacements, dict[str, Any]]:
    total = 2 * quasi_newton.PASSES * len(pruned.numbers)
    gradients = NormGradients(
        pruned,
        batches,
        outputs_of_dense(context, models.dense, batches),
        world=context.world,
        after_each=after_each_layer(context, "norms", total),
    )
    fit = NormsRefit(gradients, context.work / "norms.safetensors", context.world).fit()
    norms = _norms_of(pruned.checkpoint, gradients.norms)
    return _with_factors(pruned.checkpoint, norms, fit.factors_RC, "refit_norms"), {"norms_kl": _if_finite(fit.kl)}


def _refitted_last(
    context: Context, models: Models, pruned: PrunedLayers, batches: Mapping[int, Tensor]
) -> tuple[Replacements, dict[str, Any]]:
    checkpoint, world = pruned.checkpoint, context.world
    after_each = after_each_layer(context, "pruned model", checkpoint.num_layers)
    states = pruned_outputs(pruned, batches, world, after_each)
    fit = FinalNormRefit(
        world.make_apart(pruned.reader.head),
        batches,
        outputs_of_dense(context, models.dense, batches),
        states,
        world=world,
        after_each=after_each_layer(context, "passes for the final norm", final_norm.PASSES),
    ).fit()
    weights = _with_factors(checkpoint, _norms_of(checkpoint, []), fit.factors_C[None].cpu(), "refit_final_norm")
    return weights, {"final_norm_kl": _if_finite(fit.kl)}


def _norms_of(checkpoint: Checkpoint, of_layers: list[tuple[int, str]]) -> Norms:
    """Some norms of layers, and the final one at the end, whatever dtype passes compute in."""
    reader, family = LayerReader(checkpoint, torch.float32, torch.device("cpu")), checkpoint.family
    norms = {f"{family.layers}.{number}.{name}": reader.norm_in_layer(number, name) for number, name in of_layers}
    return norms | {family.norm: reader.final_norm()}


def _with_factors(checkpoint: Checkpoint, norms: Norms, factors_RC: Tensor, setting: str) -> Replacements:
    """Norms' weights as they are written, with factors on their outputs."""
    rounded = partial(as_stored, checkpoint, otherwise=f"leave out {setting}")
    found: dict[str, Tensor] = {}
    for (name, norm), factors_C in zip(norms.items(), factors_RC, strict=True):
        found |= {f"{name}.{of_norm}": weight_C for of_norm, weight_C in with_factors(norm, factors_C).items()}
    return in_memory({name: rounded(name, weight_C) for name, weight_C in found.items()})


def _if_finite(kls: Sequence[float]) -> list[float | None]:
    """Divergences for the manifest, which holds no others: None where a step went so far that there is none."""
    return [kl if math.isfinite(kl) else None for kl in kls]
