"""REAP: whole experts go whose outputs, as the router weighs them, are smallest (Lasby et al. 2025, arXiv 2510.13999).

An expert's score is the mean of g(x) * ||f(x)|| over the tokens x that it is given, f(x) what it puts out and g(x) the
routing weight by which the model multiplies that; 0 for an expert that is given no tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfprune_dist.core.criterion import Criterion, ScoredLayer
from hfprune_dist.structures import EXPERTS

if TYPE_CHECKING:
    from torch import Tensor


def routed_norms(output_NC: Tensor, weights_N: Tensor) -> Tensor:
    """g * ||f|| of each token, and a 1 to count it, [tokens, 2]."""
    import torch

    norms_N = torch.linalg.vector_norm(output_NC, dim=-1)
    return torch.stack([norms_N * weights_N, torch.ones_like(norms_N)], dim=1)


def mean_over_tokens(sums_N: Tensor, _layer: ScoredLayer) -> Tensor:
    """The mean for each expert, float64 [experts], from the two sums of each."""
    sum_U, tokens_U = sums_N.unflatten(0, (-1, 2)).unbind(1)
    mean_U: Tensor = sum_U / tokens_U.clamp(min=1)
    return mean_U


CRITERIA = (Criterion("reap", frozenset({EXPERTS}), "expert_outputs", routed_norms, score=mean_over_tokens),)
