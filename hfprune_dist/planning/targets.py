"""What a method with numbers, as ``with_numbers`` returns it, asks of a model."""

from __future__ import annotations

import math

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.config.method_settings import structures_possible
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures import KV_GROUPS


def divisible(multiple_of: int, method: Method) -> int:
    """The least multiple of ``multiple_of`` that ``tensor_parallel`` divides, where it has an effect."""
    return math.lcm(multiple_of, method.split)


def target_of(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> ShapeTarget:
    """The target of a method whose ``multiple_of`` is a number."""
    assert isinstance(method.multiple_of, int), "planned with a number"
    structures, devices = tuple(method.structures), method.tensor_parallel
    without = {KV_GROUPS} if method.scores_neurons_alone else set()
    possible = tuple(it for it in structures_possible(method.allocation) if it not in without)
    return ShapeTarget(checkpoint, ratio, structures, method.multiple_of, where, devices, possible)
