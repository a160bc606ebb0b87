"""Shapes of mixtures of experts that lose whole experts: every layer with experts keeps the same number of them."""

from __future__ import annotations

import math
from functools import cached_property

from hfprune_dist.planning.expert_shapes import ExpertTarget, MixtureTarget
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures import EXPERTS
from hfprune_dist.structures.experts import Experts
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.units import Units


class WholeExpertTarget(MixtureTarget):
    """The shape wanted of a mixture that loses experts; the size is the number of experts that each layer keeps."""

    @cached_property
    def _sizes(self) -> list[int]:
        experts, step = self._experts, self.step
        fewest = -(-experts.fewest // step) * step
        return [number for number in range(experts.count // step * step, fewest - 1, -step) if number < experts.count]

    @property
    def step(self) -> int:
        """The number that numbers of experts are multiples of."""
        return math.lcm(self.asked.multiple_of, self._experts.groups)

    def _with(self, size: int) -> Shape:
        """The shape in which layers have ``size`` experts."""
        counts = self._units.counts
        return Shape(tuple(range(len(counts))), {EXPERTS: tuple(size if count else 0 for count in counts)})

    def _limits(self) -> str:
        """Why no more experts can be removed, for messages."""
        experts = self._experts
        besides = ""
        if experts.groups > 1:
            besides = f", and routing wants as many in each of {experts.groups} groups"
        elif experts.fewest > experts.chosen:
            besides = f", and a mixture has {experts.fewest} at least"
        return (
            f", of which {experts.fewest} of {experts.count} in each layer must stay: a token goes to "
            f"{experts.chosen}{besides}"
        )

    @property
    def _units(self) -> Units:
        return self.asked.checkpoint.structures[EXPERTS]

    @property
    def _experts(self) -> Experts:
        experts = self.asked.checkpoint.family.experts
        assert experts is not None, "the model has no experts"
        return experts


def mixture_target(asked: ShapeTarget) -> MixtureTarget:
    """The target for a mixture of experts, whichever of its structures may be removed."""
    return WholeExpertTarget(asked) if EXPERTS in asked.structures else ExpertTarget(asked)
