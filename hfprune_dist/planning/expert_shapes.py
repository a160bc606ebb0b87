"""Shapes of mixtures of experts. Every layer with experts loses as many of them; or all MLPs (experts, shared and dense
ones) lose the same share of neurons.

If neurons go, all experts of a model have the same width, so that the result loads everywhere. Within each expert,
scores decide which neurons stay. If KV groups may go as well, layers keep the share of them that is closest to that of
neurons.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.pruned_config import plain_group_counts
from hfprune_dist.errors import UserError
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, KV_GROUPS, NEURONS
from hfprune_dist.structures.experts import Experts
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.units import Units

# Experts' matrices are multiplied in groups, for which torch requires rows of whole 16 bytes: 8 numbers of 2 bytes.
ALIGNED = 8


@dataclass(frozen=True)
class MixtureTarget(ABC):
    """The shape wanted of a mixture of experts, in which one size decides what stays in every layer."""

    asked: ShapeTarget

    def shape(self) -> Shape:
        """The largest shape that removes at least the ratio.

        Raises:
            UserError: if no shape reaches the ratio.
        """
        sizes, largest = self._sizes, self.largest()
        if self.asked.ratio > largest:
            raise self.asked.out_of_reach(largest, self._limits())
        return self._with(sizes[bisect_left(sizes, self.asked.ratio, key=self._ratio)])

    def largest(self) -> float:
        """The ratio of the smallest shape; 0 if nothing can be removed."""
        return self._ratio(self._sizes[-1]) if self._sizes else 0.0

    def _ratio(self, size: int) -> float:
        return self.asked.counts.ratio(self._with(size))

    @property
    @abstractmethod
    def step(self) -> int:
        """The number that sizes are multiples of."""

    @property
    @abstractmethod
    def _sizes(self) -> Sequence[int]:
        """The sizes to choose from, descending; the dense model's own only if there is no smaller one."""

    @abstractmethod
    def _with(self, size: int) -> Shape:
        """The shape with the given size."""

    @abstractmethod
    def _limits(self) -> str:
        """Why no more can be removed, for messages."""


class ExpertTarget(MixtureTarget):
    """The shape wanted of a mixture that loses neurons; the size is the width of its experts."""

    @cached_property
    def _sizes(self) -> list[int]:
        width, step = self._experts.width, self.step
        return [it for it in range(width // step * step, 0, -step) if it < width] or [width]

    @property
    def step(self) -> int:
        """The number that experts' widths are multiples of."""
        return math.lcm(self.asked.multiple_of, ALIGNED)

    def _limits(self) -> str:
        """Why no more neurons can be removed, for messages."""
        return (
            f", of which {self._sizes[-1]} of {self._experts.width} in each expert must stay: widths of "
            f"experts are multiples of {self.step}"
        )

    @property
    def _experts(self) -> Units:
        return self.asked.checkpoint.structures[EXPERT_NEURONS]

    def _with(self, size: int) -> Shape:
        """The shape whose experts have the width ``size``."""
        checkpoint = self.asked.checkpoint
        widths = self._widths(size)
        units = {}
        for it in checkpoint.pruned_kinds([NEURONS]):
            (field,) = {*it.fields} & widths.keys()
            units[it.kind] = tuple(widths[field] * it.copies if count else 0 for count in it.counts)
        if KV_GROUPS in self.asked.structures:
            units[KV_GROUPS] = (self._groups(size),) * checkpoint.num_layers
        return Shape(tuple(range(checkpoint.num_layers)), units)

    def _groups(self, width: int) -> int:
        """KV groups of each layer for experts of this width: the possible number closest to the same share of them, and
        halfway between two the smaller one. Either would do, since shapes are chosen by what they remove in all.
        """
        share, every = width / self._experts.width, self._possible_groups
        return min(every, key=lambda count: abs(count - share * every[-1]))

    @cached_property
    def _possible_groups(self) -> list[int]:
        """Possible numbers of KV groups, ascending.

        Raises:
            UserError: if ``tensor_parallel`` divides none of them.
        """
        plain = plain_group_counts(self.asked.checkpoint)
        divisible = [count for count in plain if count % self.asked.tensor_parallel == 0]
        if not divisible:
            raise self.asked.unusable_split(plain[-1])
        return divisible

    def _widths(self, width: int) -> Mapping[str, int]:
        """Field of config.json -> its value for experts of this width; other MLPs lose at least the same share."""
        kinds, multiple_of = self.asked.checkpoint.pruned_kinds([NEURONS]), self.asked.multiple_of
        widths: dict[str, int] = {}
        for it in kinds:
            exact = it.width * width // self._experts.width
            rounded = max(exact // multiple_of * multiple_of, min(multiple_of, it.width))
            widths.setdefault(next(iter(it.fields)), width if it is self._experts else rounded)
        return widths


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


def refuse_unaligned(checkpoint: Checkpoint, where: str) -> None:
    """Refuse a mixture whose experts transformers can't run.

    Raises:
        UserError: naming the size.
    """
    width, hidden_size = checkpoint.structures[EXPERT_NEURONS].width, checkpoint.config["hidden_size"]
    for what, size in ((f"its experts have {width} neurons", width), (f"hidden_size is {hidden_size}", hidden_size)):
        if size % ALIGNED:
            raise UserError(
                f"{where}: {what}, but transformers multiplies experts' matrices in groups, whose rows must be "
                f"multiples of {ALIGNED}"
            )
