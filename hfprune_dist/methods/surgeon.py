"""Surgeon: units go whose removal costs least once the others have taken over their work.

The cost is KL(dense || pruned) per token, to second order. With p the dense model's next-token distribution and random
signs e = +-1 for each word, the loss is 2 sum_v e_v sqrt(p_v): with g its gradient at any place in the model, E[g g^T]
is the Fisher matrix there. With F = E[g g^T] at the output projection's output and G = E[h h^T] at its input,
removing unit u costs 1/2 tr(F W_u ([G^-1]_uu)^-1 W_u^T) nats if the others are refitted by least squares (K-FAC; The
LLM Surgeon, arXiv 2312.17244). ``core.elimination`` removes unit after unit, with F and G brought closer to the exact
Fisher scores of each.

``fisher_signs`` is that exact score, E[(h * dlog p(y)/dh)^2], y drawn from p: twice what removing a unit alone costs.

Attention mixes tokens: the gradient at token s holds the effect on every later token t. Signs of different tokens are
independent, so that terms of different t are uncorrelated, and the expected score is the sum over s and t: twice the
second-order KL of removing the unit at one token, added up over tokens. Hence the sum over tokens as the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfprune_dist.core.criterion import Criterion, Loss, ScoredLayer
from hfprune_dist.structures import ALL_KINDS, KV_GROUPS, NEURONS

if TYPE_CHECKING:
    from torch import Tensor

    from hfprune_dist.core.head import Batch, LogitGradient


def random_signs(batch: Batch) -> LogitGradient:
    """Return a function of some logits: 2 sum_v e_v sqrt(p_v), e drawn by seed and window, and its gradient there."""
    from hfprune_dist.core.losses import random_signs_of

    return random_signs_of(batch)


def squares(effects_NU: Tensor) -> Tensor:
    """(h * dL/dh)^2 of each token, h * dL/dh added up over a unit's channels."""
    return effects_NU.square()


def costs_of_removal(sums_U: Tensor, layer: ScoredLayer) -> Tensor:
    """Nats per token that each removal costs after all cheaper ones, float64 [units]; raises UnresolvedError."""
    from hfprune_dist.core.elimination import elimination_scores

    assert layer.gram_DD is not None and layer.curvature_CC is not None
    fisher_U = sums_U / layer.tokens
    return elimination_scores(layer.gram_DD, layer.curvature_CC, layer.read_columns(), fisher_U).cpu()


RANDOM_SIGNS = Loss("random_signs", random_signs, is_mean=False, in_nats=False)

CRITERIA = (
    Criterion("fisher_signs", ALL_KINDS, "effects", squares, loss=RANDOM_SIGNS),
    Criterion(
        "surgeon",
        frozenset({NEURONS, KV_GROUPS}),
        "effects",
        squares,
        score=costs_of_removal,
        loss=RANDOM_SIGNS,
        needs_moments=True,
        in_nats=True,
    ),
)
