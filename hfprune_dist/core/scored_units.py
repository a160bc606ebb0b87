"""Which units have scores by a criterion; doesn't import torch."""

from __future__ import annotations

from hfprune_dist.core.criteria import Criterion


def scores_units(criterion: Criterion, *, are_neurons: bool, are_experts: bool, experts: int) -> bool:
    """Return whether units of one kind have scores by a criterion.

    Args:
        are_neurons: whether they are neurons.
        are_experts: whether they are whole experts.
        experts: number of experts among which a layer's units are divided; 1 if they don't belong to experts.
    """
    if are_experts:
        return criterion.is_of_whole_experts
    if criterion.is_of_whole_experts_alone or (experts > 1 and not criterion.is_of_expert_neurons):
        return False
    return are_neurons or not criterion.is_of_neurons_alone
