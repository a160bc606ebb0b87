"""Scores from the calibration pass's sums, for some criteria together with a layer's weights and second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.criteria import Criterion, lacking
from hfprune_dist.core.elimination import elimination_scores
from hfprune_dist.core.unit_sums import sum_over_channels


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of one layer over the calibration tokens.

    Attributes:
        gram_DD: float64, the mean of h h^T, h what the output projection reads [channels].
        curvature_CC: float64, the mean of g g^T, g the gradient of the criterion's loss at that projection's output.
        tokens: number of those tokens.
    """

    gram_DD: Tensor
    curvature_CC: Tensor
    tokens: int


@dataclass(frozen=True)
class MeanGradients:
    """Gradients of a loss's mean over all windows by one layer's weights, read on demand.

    Attributes:
        rows: for each weight whose rows the units own, a function that returns its gradient, float64, of its shape.
        columns: function that returns the gradient of the output projection's weight.
    """

    rows: Sequence[Callable[[], Tensor]]
    columns: Callable[[], Tensor]


@dataclass(frozen=True)
class ScoredLayer:
    """One layer's units and their weights, which are read on demand.

    Attributes:
        number: the layer's number.
        units: number of its units.
        seed: the sweep's seed.
        read_rows: returns the weights whose rows the units own, each [units * rows of a unit, hidden_size].
        read_columns: returns the weight of the output projection [hidden_size, units * channels of a unit].
        tokens: number of tokens that the sums are over.
        moments: second moments, for a criterion that ``needs_moments``.
        gradients: gradients of weights, for a criterion that ``needs_weight_gradients``.
    """

    number: int
    units: int
    seed: int
    read_rows: Callable[[], list[Tensor]]
    read_columns: Callable[[], Tensor]
    tokens: int = 0
    moments: SecondMoments | None = None
    gradients: MeanGradients | None = None


def scores_from_sums(criterion: Criterion, sum_N: Tensor, layer: ScoredLayer) -> Tensor:
    """Return scores [units] from the criterion's sums over tokens, both float64 on the CPU.

    Args:
        sum_N: sums of each unit, or of each channel if the criterion ``is_of_channels``; several sums of one unit or
            channel are adjacent.
    """
    return sum_N if criterion.is_its_sum else _MADE_OF_SUMS[criterion.name](sum_N, layer)


def student_keeps(scores_U: Tensor, share: float) -> Tensor:
    """Return the mask of a layer's units that the student has, bool [units]: all but the share with the lowest scores.

    Args:
        scores_U: scores by the criterion that the student's criterion names.
        share: share of the units that the student lacks.
    """
    lacks = scores_U.sort(stable=True).indices[: lacking(len(scores_U), share)]
    return torch.ones(len(scores_U), dtype=torch.bool).index_fill_(0, lacks, False)


def times_column_norm(sum_D: Tensor, layer: ScoredLayer) -> Tensor:
    """Return ||h_n|| * ||W[:, n]|| for a unit's channel n, from the sum of h_n^2 over tokens; for several channels the
    root of the sum of squares.
    """
    product_D = sum_D.sqrt() * _column_norms(layer, len(sum_D))
    return _norm(product_D.unflatten(0, (layer.units, -1)), dim=1)


def times_absolute_column(sum_D: Tensor, layer: ScoredLayer) -> Tensor:
    """Return ||h_n|| * sum_i |W[i, n]| for a unit's channel n, from the sum of h_n^2 over tokens; for several channels
    the sum (Wanda-sp: An et al. 2023, arXiv 2312.11983, whose code uses means over tokens and rows instead of sums).
    """
    weight_CD = layer.read_columns()
    product_D = sum_D.sqrt() * torch.linalg.vector_norm(weight_CD, ord=1, dim=0, dtype=torch.float64)
    return sum_over_channels(product_D, len(product_D) // layer.units)


def fluctuation(sums_N: Tensor, layer: ScoredLayer) -> Tensor:
    """Return x_n = sum over tokens of (h_n - mean)^2 * ||W[:, n]||^2, in standard deviations of x over all channels of
    the layer; for several channels the mean, with x_n^2 instead of x_n (FLAP: An et al. 2023, arXiv 2312.11983, whose
    code squares the scores of heads' channels again; minus their mean over the layer, these are its standardized ones).

    Args:
        sums_N: for each channel, the sums of h_n and of h_n^2.
    """
    assert layer.tokens, "a mean needs to know over how many tokens"
    sum_D, square_D = sums_N.unflatten(0, (-1, 2)).unbind(1)
    # In float64, even a channel whose mean is a thousand standard deviations is known to ten digits.
    deviations_D = (square_D - sum_D.square() / layer.tokens).clamp(min=0)
    product_D = deviations_D * _column_norms(layer, len(sum_D)).square()
    channels = len(sum_D) // layer.units
    if channels > 1:
        product_D = product_D.square()
    spread = float(product_D.std()) if len(product_D) > 1 else 0.0
    return sum_over_channels(product_D, channels) / channels / (spread or 1.0)


def mean_routed_output(sums_N: Tensor, _layer: ScoredLayer) -> Tensor:
    """Return the mean of ||f(x)|| times the routing weight of f(x) over the tokens that an expert is given, or 0 if it
    is given none (REAP: Lasby et al. 2025, arXiv 2510.13999).

    Args:
        sums_N: for each expert, the sum over these tokens, and their number.
    """
    sum_U, tokens_U = sums_N.unflatten(0, (-1, 2)).unbind(1)
    mean_U: Tensor = sum_U / tokens_U.clamp(min=1)
    return mean_U


def first_order_of_weights(_sum_U: Tensor, layer: ScoredLayer) -> Tensor:
    """Return sum |W * dL/dW| over the weights that a unit owns, its rows and its columns; biases don't count
    (LLM-Pruner's ``param_first``: Ma et al. 2023, arXiv 2305.11627, eq. 5 to first order).
    """
    of_rows = [products.abs_().reshape(layer.units, -1).sum(dim=1) for products in _row_products(layer)]
    of_columns = _column_products(layer).abs_().unflatten(1, (layer.units, -1)).sum(dim=(0, 2))
    return torch.stack([*of_rows, of_columns]).sum(dim=0).cpu()


def weight_norm(_sum_U: Tensor, layer: ScoredLayer) -> Tensor:
    """Return the Euclidean norm of all weights that a unit owns, its rows and its columns; biases don't count."""
    norms = [_norm(weight_DC.reshape(layer.units, -1), dim=1) for weight_DC in layer.read_rows()]
    return torch.stack([*norms, _column_norms(layer, layer.units)]).square().sum(dim=0).sqrt()


def random_scores(_sum_U: Tensor, layer: ScoredLayer) -> Tensor:
    """Return uniform scores in [0, 1), determined by the seed and the layer's number."""
    generator = torch.Generator().manual_seed(layer.seed * 2**16 + layer.number)
    return torch.rand(layer.units, generator=generator, dtype=torch.float64)


def costs_of_removal(sum_U: Tensor, layer: ScoredLayer) -> Tensor:
    """Return the KL divergence that each removal costs after all cheaper ones, if other units take over its work."""
    assert layer.moments is not None
    moments = layer.moments
    return elimination_scores(moments.gram_DD, moments.curvature_CC, layer.read_columns(), sum_U / moments.tokens).cpu()


# Functions that turn sums into scores, for criteria whose score isn't its sum.
_MADE_OF_SUMS: dict[str, Callable[[Tensor, ScoredLayer], Tensor]] = {
    "activation": times_column_norm,
    "activation_l1": times_absolute_column,
    "fluctuation": fluctuation,
    "magnitude": weight_norm,
    "random": random_scores,
    "reap": mean_routed_output,
    "surgeon": costs_of_removal,
    "weight_taylor": first_order_of_weights,
}


def _column_norms(layer: ScoredLayer, parts: int) -> Tensor:
    """Return the norms of ``parts`` equal consecutive parts of the output projection's columns."""
    return _norm(layer.read_columns().unflatten(1, (parts, -1)), dim=(0, 2))


def _row_products(layer: ScoredLayer) -> Iterator[Tensor]:
    """Yield W * dL/dW, float64, for each of the weights whose rows the units own."""
    assert layer.gradients is not None
    for weight, read in zip(layer.read_rows(), layer.gradients.rows, strict=True):
        yield _times(read(), weight)


def _column_products(layer: ScoredLayer) -> Tensor:
    """Return W * dL/dW, float64, for the weight whose columns the units own."""
    assert layer.gradients is not None
    return _times(layer.gradients.columns(), layer.read_columns())


def _times(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return their product, which overwrites the gradient."""
    return gradient.mul_(weight.to(gradient))


def _norm(weight: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float64)
    return norms
