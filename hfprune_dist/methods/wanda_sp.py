"""Wanda-sp: units that are little active, or whose weights are small, go (An et al. 2023, arXiv 2312.11983).

A unit's score is the sum over its channels n of ||h_n|| * sum_i |W[i, n]|, with the norm over all tokens and W the
output projection. (The code has means over tokens and rows instead of sums, which changes no order.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfprune_dist.core.criterion import Criterion, ScoredLayer, norms
from hfprune_dist.structures import ALL_KINDS

if TYPE_CHECKING:
    from torch import Tensor


def squares_of_inputs(h_ND: Tensor) -> Tensor:
    """h^2 of each token and channel."""
    return h_ND.square()


def times_weights(squares_D: Tensor, layer: ScoredLayer) -> Tensor:
    """||h_n|| * sum_i |W[i, n]|, added up over a unit's channels."""
    return layer.summed_per_unit(squares_D.sqrt() * norms(layer.read_columns(), dim=0, order=1))


CRITERIA = (Criterion("activation_l1", ALL_KINDS, "inputs", squares_of_inputs, score=times_weights),)
