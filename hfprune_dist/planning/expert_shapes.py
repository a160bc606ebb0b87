"""Shapes of mixtures of experts in which all MLPs (experts, shared and dense ones) lose the same share of neurons.

All experts of a model have the same width, so that the result loads everywhere. Within each expert, scores decide which
neurons stay. If KV groups may go as well, layers keep the share of them that is closest to the share of neurons.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.pruned_config import plain_group_counts
from hfprune_dist.config.method import Method
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.errors import UserError
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, KV_GROUPS, LAYERS, NEURONS, Structure
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


def why_not_experts(method: Method) -> str:
    """The first setting of a method that isn't possible with mixtures of experts, for messages; empty if all are."""
    if method.prunes_in == "recovery":
        return "prunes_in: recovery isn't possible; calibration is"
    if LAYERS in method.structures:
        named = ", ".join(method.structures)
        return f"structures: [{named}] aren't possible; [{NEURONS}, {KV_GROUPS}] are, and [{EXPERTS}]"
    if method.allocation not in ("uniform", "local"):
        return f"allocation: {method.allocation} isn't possible; uniform and local are"
    protects = [name for name in ("protect_first", "protect_last") if method.can_protect and getattr(method, name)]
    if protects:
        return f"{protects[0]}: {getattr(method, protects[0]):g} isn't possible; 0 is"
    if method.refit not in ("none", "dense"):
        return f"refit: {method.refit} isn't possible; none and dense are"
    if method.distill:
        return f"distill: {method.distill} isn't possible; 0 is"
    return _why_not_scored(str(method.criterion), method.structures)


def _why_not_scored(criterion: str, structures: Collection[Structure]) -> str:
    possible = [
        name
        for name, it in CRITERIA.items()
        if (NEURONS in structures and it.is_of_expert_neurons) or (EXPERTS in structures and it.is_of_whole_experts)
    ]
    return "" if criterion in possible else f"criterion: {criterion} isn't possible; {', '.join(possible)} are"


def refuse_with_experts(method: Method, model_type: str, where: str) -> None:
    """Refuse a method that isn't possible with a mixture of experts.

    Raises:
        UserError: naming the setting, and what is possible.
    """
    why = why_not_experts(method)
    if why:
        raise UserError(f"{where}: {model_type} is a mixture of experts, with which {why}")


def refuse_criteria(criteria: Iterable[str], checkpoint: Checkpoint, structures: Collection[Structure]) -> None:
    """Refuse further criteria that can't score a model's units.

    Args:
        structures: the structures that are scored.

    Raises:
        UserError: naming the first one, and what is possible.
    """
    kind, where = checkpoint.family.model_type, f"importance.criteria: {checkpoint.path}"
    for name in criteria:
        if not checkpoint.family.experts and CRITERIA[name].is_of_whole_experts_alone:
            raise UserError(f"{where}: {name} scores whole experts alone, and {kind} has none; leave it out")
        why = _why_not_scored(name, structures) if checkpoint.family.experts else ""
        if why:
            raise UserError(f"{where}: {kind} is a mixture of experts, with which {why}")


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


def can_do(method: Method, checkpoint: Checkpoint) -> bool:
    """Whether a method applies to a model; an adaptive one is left out where a mixture of experts rules it out."""
    return not (method.adapts and checkpoint.family.experts and why_not_experts(method))
