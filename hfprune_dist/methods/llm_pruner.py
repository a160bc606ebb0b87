"""LLM-Pruner, first order: units whose weights matter least to the loss go (Ma et al. 2023, arXiv 2305.11627).

CE is the loss on the text's own next tokens. A unit's score is the sum of |W * dCE/dW| over all weights that go with
it, its rows and its columns (``param_first``, equation 5 to first order); biases don't count. The gradient is that of
the mean over all windows.

``cross_entropy`` is the same idea on activations instead of weights: the sum over tokens of |h * dCE/dh|.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfprune_dist.core.criterion import Criterion, Loss, ScoredLayer
from hfprune_dist.methods.hfprune import absolute
from hfprune_dist.structures import ALL_KINDS, KV_GROUPS, NEURONS

if TYPE_CHECKING:
    from torch import Tensor

    from hfprune_dist.core.head import Batch, LogitGradient


def cross_entropy(batch: Batch) -> LogitGradient:
    """Return a function of some tokens' logits: CE of each token but a window's last, and its gradient there."""
    from hfprune_dist.core.losses import cross_entropy_gradient

    labels_N = batch.labels()
    return lambda rows: cross_entropy_gradient(rows.logits_NV, labels_N[rows.numbers])


def first_order(_sums: Tensor, layer: ScoredLayer) -> Tensor:
    """Sum of |W * dCE/dW| over all rows and columns of weights that a unit owns, float64 [units] on the CPU."""
    *gradients, of_columns = layer.read_gradients
    scores_U: Tensor = _products(layer.read_columns(), of_columns()).unflatten(1, (layer.units, -1)).sum(dim=(0, 2))
    for weight, read in zip(layer.read_rows(), gradients, strict=True):
        scores_U += _products(weight, read()).reshape(layer.units, -1).sum(dim=1)
    return scores_U.cpu()


def _products(weight: Tensor, gradient: Tensor) -> Tensor:
    """|W * dCE/dW|, which overwrites the gradient."""
    products: Tensor = gradient.mul_(weight.to(gradient)).abs_()
    return products


CROSS_ENTROPY = Loss("cross_entropy", cross_entropy, unlabelled=1)

CRITERIA = (
    Criterion("cross_entropy", ALL_KINDS, "effects", absolute, loss=CROSS_ENTROPY),
    Criterion(
        "weight_taylor", frozenset({NEURONS, KV_GROUPS}), "weight_gradients", score=first_order, loss=CROSS_ENTROPY
    ),
)
