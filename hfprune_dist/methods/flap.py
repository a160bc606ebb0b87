"""FLAP: units whose inputs fluctuate little go; biases make up for their mean (An et al. 2023, arXiv 2312.11983).

WIFV: channel n has x_n = sum over tokens of (h_n - mean h_n)^2 * ||W[:, n]||^2, W the output projection, in standard
deviations over the layer's channels. A unit of several channels has the mean of x_n^2, as the authors' code squares the
scores of heads' channels again. With ``allocation: standardized`` the layer's mean is subtracted, and units of all
layers compete (AL-AM); with ``refit: bias`` W times the mean input of what goes becomes a bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfprune_dist.core.criterion import Criterion, ScoredLayer
from hfprune_dist.structures import KV_GROUPS, NEURONS

if TYPE_CHECKING:
    from torch import Tensor


def values_and_squares(h_ND: Tensor) -> Tensor:
    """h and h^2 of each token and channel; float64, since the variance is a difference of their sums: even a channel
    whose mean is a thousand standard deviations is known to ten digits.
    """
    import torch

    h_ND = h_ND.double()
    return torch.stack([h_ND, h_ND.square()], dim=2).flatten(1)


def fluctuation(sums_N: Tensor, layer: ScoredLayer) -> Tensor:
    """WIFV in standard deviations, from the sums of each channel."""
    sum_D, square_D = sums_N.unflatten(0, (-1, 2)).unbind(1)
    deviations_D = (square_D - sum_D.square() / layer.tokens).clamp(min=0)
    x_D = deviations_D * layer.column_norms(len(sum_D)).square()
    channels = len(sum_D) // layer.units
    if channels > 1:
        x_D = x_D.square()
    spread = float(x_D.std()) if len(x_D) > 1 else 0.0
    return layer.of_units(x_D) / channels / (spread or 1.0)


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
