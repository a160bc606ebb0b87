"""Which units have scores by a criterion; doesn't import torch."""

from __future__ import annotations

from hfprune_dist.core.criteria import Criterion


def scores_units(criterion: Criterion, *, are_neurons: bool, are_experts: bool, are_of_experts: bool) -> bool:
    """Return whether units of one kind have scores by a criterion.

    Args:
        are_neurons: whether they are neurons of plain MLPs.
        are_experts: whether they are whole experts.
        are_of_experts: whether they are neurons of experts.
    """
    if are_experts:
        return criterion.is_of_whole_experts
    if criterion.is_of_whole_experts_alone or (are_of_experts and not criterion.is_of_expert_neurons):
        return False
    return are_neurons or not criterion.is_of_neurons_alone
