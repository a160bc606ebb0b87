"""The ratio asked for, and the structures that may be removed to reach it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.layer_settings import undroppable_layers
from hfprune_dist.config.method import Method
from hfprune_dist.config.method_settings import structures_possible
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.kinds.training import LoraPruneParameters
from hfprune_dist.planning.widths import OutOfReachError, or_a_smaller, round_down, rounding
from hfprune_dist.structures import KV_GROUPS, LAYERS, NEURONS, TOGETHER, Structure
from hfprune_dist.structures.parameter_counts import ParameterCounts
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class ShapeTarget:
    """The requirements that a shape must meet.

    Attributes:
        checkpoint: the dense model.
        ratio: share of its parameters to remove.
        structures: what may be removed.
        multiple_of: widths of layers that lose neurons are multiples of it.
        where: the model and the method, for messages.
        tensor_parallel: numbers of KV groups, and widths, are divisible by it if groups may be removed.
        possible: everything that the method's allocation could remove, if its ``structures`` said so.
    """

    checkpoint: Checkpoint
    ratio: float
    structures: tuple[Structure, ...]
    multiple_of: int
    where: str
    tensor_parallel: int = 1
    possible: tuple[Structure, ...] = TOGETHER

    @classmethod
    def of(cls, checkpoint: Checkpoint, params: PruneParameters | LoraPruneParameters, where: str) -> ShapeTarget:
        """The target of a stage that prunes; ``checkpoint`` is the dense model that its ratio refers to."""
        possible = structures_possible(params.allocation if isinstance(params, PruneParameters) else "local")
        structures, split = tuple(params.structures), params.tensor_parallel
        return cls(checkpoint, params.ratio, structures, params.multiple_of, where, split, possible)

    @property
    def counts(self) -> ParameterCounts:
        """Parameter counts of the dense model."""
        return self.checkpoint.parameter_counts

    @property
    def neurons(self) -> Units:
        return self.checkpoint.structures[NEURONS]

    @property
    def groups(self) -> Units:
        return self.checkpoint.structures[KV_GROUPS]

    @property
    def divisor(self) -> int:
        """The largest number that divides the KV groups of every layer."""
        return math.gcd(*self.groups.counts)

    @cached_property
    def undroppable(self) -> set[int]:
        """Indices of the layers that must stay."""
        every = range(self.checkpoint.num_layers)
        return set(every) if LAYERS not in self.structures else {*undroppable_layers(self.checkpoint.config)}

    @property
    def fewest_layers(self) -> int:
        """How many layers must stay: at least two thirds, since no refit recovers what dropping more of them loses."""
        return max(-(-2 * self.checkpoint.num_layers // 3), len(self.undroppable))

    @property
    def split(self) -> int:
        """``tensor_parallel`` where it has an effect."""
        return self.tensor_parallel if KV_GROUPS in self.structures else 1

    @property
    def with_all_structures(self) -> ShapeTarget:
        """The same target with all possible structures, whose ``multiple_of`` the devices divide if groups may go."""
        wider = replace(self, structures=self.possible)
        return replace(wider, multiple_of=math.lcm(wider.multiple_of, wider.split))

    @property
    def rounding(self) -> str:
        """See ``widths.rounding``."""
        return rounding(self.multiple_of, self.split)

    def out_of_reach(
        self, largest: float, limits: str, largest_of: Callable[[ShapeTarget], float] | None = None
    ) -> OutOfReachError:
        """The error for a ratio that is larger than can be reached.

        Args:
            largest: the largest ratio that can be reached.
            limits: what else bounds the ratio; may be empty.
            largest_of: the largest ratio of a target with other structures; None: they don't matter.
        """
        more = "" if largest_of is None else self._told_of_more(largest, largest_of)
        return OutOfReachError(
            f"{self.where}: ratio {self.ratio:g} can't be reached by pruning {_listed(self.structures)}{limits}; the "
            f"largest possible is {round_down(largest):.4f}{self.rounding}{more}",
            largest,
        )

    def _told_of_more(self, largest: float, largest_of: Callable[[ShapeTarget], float]) -> str:
        """How far the structures that are missing would help, for messages; empty if they wouldn't."""
        missing = [name for name in self.possible if name not in self.structures]
        if not missing:
            return ""
        try:
            with_all = round_down(largest_of(self.with_all_structures))
        except UserError:  # the devices divide no number of KV groups
            return ""
        helps = with_all > round_down(largest)
        return f"; with {' and '.join(missing)} in prune.structures {with_all:.4f}" if helps else ""

    def comes_to_none(self, larger: float, limits: str = "") -> UserError:
        """The error for a ratio between those of any two shapes.

        Args:
            larger: the next larger ratio that is possible.
            limits: what else bounds the shapes.
        """
        return UserError(
            f"{self.where}: no shape of {', '.join(self.structures)} comes to ratio {self.ratio:g}{limits}; the next "
            f"larger one that is possible is {int(larger * 1e6) / 1e6:g}{self.rounding}"
        )

    def removes_nothing(self) -> UserError:
        """The error for a ratio that is so small that nothing is removed after rounding."""
        return UserError(
            f"{self.where}: ratio {self.ratio:g} removes nothing once units are rounded{self.rounding}; use a larger "
            f"ratio{or_a_smaller(self.multiple_of, self.split)}"
        )

    def unusable_split(self, largest: int) -> UserError:
        """The error if no possible number of KV groups is divisible by ``tensor_parallel``."""
        return UserError(
            f"{self.where}: prune.tensor_parallel {self.tensor_parallel} divides no number of KV groups that its "
            f"{self.groups.most} can be pruned to; the largest that works is {largest}"
        )


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


def _listed(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return f"{names[0]} alone"
    return f"{', '.join(names[:-1])} and {names[-1]}"
