"""Baselines that need no text: the norm of a unit's weights, and a random order, the floor of any comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfprune_dist.core.criterion import Criterion, ScoredLayer, norms
from hfprune_dist.structures import ALL_KINDS

if TYPE_CHECKING:
    from torch import Tensor


def weight_norm(_sums: Tensor, layer: ScoredLayer) -> Tensor:
    """Norm of all weights that a unit owns, its rows and its columns, float64 [units]; biases don't count."""
    squares_U = layer.column_norms(layer.units).square()
    for weight in layer.read_rows():
        squares_U += norms(weight.reshape(layer.units, -1), dim=1).square()
    return squares_U.sqrt()


def random_scores(_sums: Tensor, layer: ScoredLayer) -> Tensor:
    """Uniform numbers in [0, 1), determined by the seed, the kind of units and the layer's number."""
    import torch

    from hfprune_dist.core.losses import numbered_generator

    generator = numbered_generator(layer.seed, layer.number, f"random {layer.kind}")
    return torch.rand(layer.units, generator=generator, dtype=torch.float64)


CRITERIA = (
    Criterion("magnitude", ALL_KINDS, "nothing", score=weight_norm),
    Criterion("random", ALL_KINDS, "nothing", score=random_scores),
)
