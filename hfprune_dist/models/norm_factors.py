"""Norms whose outputs are multiplied by a factor for each channel, in their own weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hfprune_dist.errors import UserError

# Norms multiply by their weight, or by 1 + their weight.
OFFSETS = (0.0, 1.0)
# What outputs may depart from twice their size, as a share of the largest: some norms round to bfloat16 on the way.
TOLERANCE = 0.02


def with_factors(norm: nn.Module, factors_C: Tensor) -> dict[str, Tensor]:
    """The values of a norm's parameters with which its outputs are multiplied by these factors, in float32.

    Args:
        norm: a norm over the last dimension, with a weight and perhaps a bias.
        factors_C: [hidden_size], on the norm's device.

    Raises:
        UserError: if there are no such values.
    """
    return _scaled(_parameters(norm), factors_C.float(), weight_offset(norm))


@torch.no_grad()
def weight_offset(norm: nn.Module) -> float:
    """The number that a norm adds to its weight before it multiplies by it: 0 or 1.

    Raises:
        UserError: if its outputs are no multiple of its weight plus either of them.
    """
    parameters = _parameters(norm)
    if "weight" in parameters and parameters.keys() <= {"weight", "bias"}:
        twice_C = torch.full_like(parameters["weight"], 2.0)
        sample_NC = torch.randn(8, len(twice_C), generator=torch.Generator().manual_seed(0)).to(twice_C)
        wanted_NC = 2 * functional_call(norm, parameters, sample_NC)
        for offset in OFFSETS:
            departure_NC = functional_call(norm, _scaled(parameters, twice_C, offset), sample_NC) - wanted_NC
            if departure_NC.abs().max() <= TOLERANCE * wanted_NC.abs().max():
                return offset
    raise UserError(
        f"the final norm, a {type(norm).__name__}, has no weight that multiplies its outputs; leave out "
        "refit_final_norm"
    )


def _parameters(norm: nn.Module) -> dict[str, Tensor]:
    return {name: it.data.float() for name, it in norm.named_parameters()}


def _scaled(parameters: dict[str, Tensor], factors_C: Tensor, offset: float) -> dict[str, Tensor]:
    scaled = {name: it * factors_C for name, it in parameters.items()}
    return scaled | {"weight": (parameters["weight"] + offset) * factors_C - offset}
