"""Shapes of mixtures of experts that lose whole experts: every layer that has experts keeps as many."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.expert_shapes import ExpertTarget
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures import EXPERTS
from hfprune_dist.structures.experts import Experts
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class WholeExpertTarget:
    """What is asked of the shape of a mixture that loses experts."""

    asked: ShapeTarget

    def shape(self) -> Shape:
        """The largest shape with which at least the ratio goes.

        Raises:
            UserError: where no shape reaches the ratio.
        """
        largest = self.largest()
        if self.asked.ratio > largest:
            raise self.asked.out_of_reach(largest, largest, self._limits())
        return self._with(self._numbers[bisect_left(self._numbers, self.asked.ratio, key=self._ratio)])

    def largest(self) -> float:
        """The ratio of the smallest shape; 0 where no expert can go."""
        return self._ratio(self._numbers[-1]) if self._numbers else 0.0

    @cached_property
    def _numbers(self) -> list[int]:
        """Of experts that each layer may keep, falling; not all that there are."""
        experts, step = self._experts, self.step
        fewest = -(-experts.fewest // step) * step
        return [number for number in range(experts.count // step * step, fewest - 1, -step) if number < experts.count]

    @property
    def step(self) -> int:
        """What numbers of experts are multiples of."""
        return math.lcm(self.asked.multiple_of, self._experts.groups)

    def _ratio(self, number: int) -> float:
        return self.asked.counts.ratio(self._with(number))

    def _with(self, number: int) -> Shape:
        """The shape in which layers have so many experts."""
        counts = self._units.counts
        return Shape(tuple(range(len(counts))), {EXPERTS: tuple(number if count else 0 for count in counts)})

    def _limits(self) -> str:
        """Why no more experts can go, for messages."""
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


def mixture_target(asked: ShapeTarget) -> ExpertTarget | WholeExpertTarget:
    """What is asked of the shape of a mixture of experts, whichever of its structures may go."""
    return WholeExpertTarget(asked) if EXPERTS in asked.structures else ExpertTarget(asked)


def refuse_without_experts(method: Method, checkpoint: Checkpoint, where: str) -> None:
    """Refuse to prune experts of a model that has none.

    Raises:
        UserError: naming the setting.
    """
    if EXPERTS in method.structures and not checkpoint.family.experts:
        raise UserError(
            f"{where}: structures: [{EXPERTS}] isn't possible with {checkpoint.family.model_type}: the model has no "
            "experts"
        )
