"""FLAP: units whose inputs fluctuate little go; biases make up for their mean (An et al. 2023, arXiv 2312.11983).

WIFV: channel n has x_n = sum over tokens of (h_n - mean h_n)^2 * ||W[:, n]||^2, W the output projection; or its square,
as in the authors' code for heads, if units have several channels. A unit's score is the mean over its channels, in
standard deviations over the layer's channels. With ``allocation: standardized`` the layer's mean is subtracted, and
units of all layers compete (AL-AM); with ``refit: bias`` W times the mean input of what goes becomes a bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfprune_dist.core.criterion import Criterion, ScoredLayer
from hfprune_dist.structures import KV_GROUPS, NEURONS

if TYPE_CHECKING:
    from torch import Tensor


def values_and_squares(h_ND: Tensor) -> Tensor:
    """h and h^2 of each channel, side by side [tokens, 2 * channels]; float64, since the variance is a difference of
    their sums: even where the mean is a thousand standard deviations, it is right to ten digits.
    """
    import torch

    h_ND = h_ND.double()
    return torch.stack([h_ND, h_ND.square()], dim=2).flatten(1)


def fluctuation(sums_N: Tensor, layer: ScoredLayer) -> Tensor:
    """WIFV in standard deviations, float64 [units], from the two sums of each channel."""
    sum_D, square_D = sums_N.unflatten(0, (-1, 2)).unbind(1)
    deviations_D = (square_D - sum_D.square() / layer.tokens).clamp(min=0)
    x_D = deviations_D * layer.column_norms(len(sum_D)).square()
    channels = len(sum_D) // layer.units
    if channels > 1:
        x_D = x_D.square()
    spread = float(x_D.std()) if len(x_D) > 1 else 0.0
    return layer.summed_per_unit(x_D) / channels / (spread or 1.0)


CRITERIA = (
    Criterion(
        "fluctuation",
        frozenset({NEURONS, KV_GROUPS}),
        "inputs",
        values_and_squares,
        score=fluctuation,
        in_deviations=True,
    ),
)
