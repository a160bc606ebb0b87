"""What a method asks of a model's shape: the ratio, and the bounds on what each layer keeps.

A ratio is removed parameters / all parameters of the model, as in the paper, not the share of units removed (20 % of
Llama-3.2-1B is 31 % of its neurons).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.layer_settings import undroppable_layers
from hfprune_dist.checkpoints.pruned_config import plain_group_counts
from hfprune_dist.config.method import Allocation, Method
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.kinds.training import LoraPruneParameters
from hfprune_dist.structures import KV_GROUPS, LAYERS, NEURONS, Structure
from hfprune_dist.structures.kept import ParameterCounts, Shape
from hfprune_dist.structures.units import Units

# Allocations with which scores or a search divide what goes among layers.
COMPETING = ("global", "standardized", "searched")
# Numbers of layers are tried in steps of one layer for every LAYERS_OF_A_STEP layers of the model.
LAYERS_OF_A_STEP = 15
UNITS = NEURONS, KV_GROUPS
BOUNDS = "floor", "multiple_of", "tensor_parallel", "protect_first", "protect_last"


@dataclass(frozen=True)
class Target:
    """The ratio that a method asks for, and the bounds on shapes that come to it.

    Attributes:
        dense: the model, of whose parameters ``ratio`` is the share to remove.
        where: the model and the method, for messages.
        multiple_of: widths of layers that lose neurons, or numbers of experts, are multiples of it.
        tensor_parallel: numbers of KV groups are divisible by it, if ``structures`` has them.
        floor: the least share of its neurons that a layer keeps, where layers compete.
        protect_first, protect_last: how many of the first and last layers lose nothing.
    """

    dense: Checkpoint
    ratio: float
    where: str
    structures: tuple[Structure, ...] = (NEURONS,)
    allocation: Allocation = "uniform"
    multiple_of: int = 1
    tensor_parallel: int = 1
    floor: float = 0.0
    protect_first: int = 0
    protect_last: int = 0

    @classmethod
    def from_settings(
        cls, dense: Checkpoint, settings: Method | PruneParameters | LoraPruneParameters, ratio: float, where: str
    ) -> Target:
        """The target of a method with numbers (``with_numbers``), or of a stage that prunes."""
        bounds: dict[str, Any] = {name: getattr(settings, name) for name in BOUNDS}
        return cls(dense, ratio, where, tuple(settings.structures), settings.allocation, **bounds)

    @property
    def counts(self) -> ParameterCounts:
        return self.dense.parameter_counts

    @property
    def neurons(self) -> Units:
        return self.dense.structures[NEURONS]

    @property
    def groups(self) -> Units:
        return self.dense.structures[KV_GROUPS]

    @property
    def competes(self) -> bool:
        """Whether scores or a search divide what goes among layers."""
        return self.allocation in COMPETING

    @property
    def removals(self) -> float:
        """Parameters to remove."""
        return self.ratio * self.counts.total

    @property
    def pruned_layers(self) -> range:
        """The layers that aren't protected."""
        last = max(self.dense.num_layers - self.protect_last, 0)
        return range(min(self.protect_first, last), last)

    @cached_property
    def droppable(self) -> tuple[int, ...]:
        """The layers that may be removed."""
        if LAYERS not in self.structures:
            return ()
        return tuple(layer for layer in self.pruned_layers if layer not in undroppable_layers(self.dense.config))

    @property
    def fewest_layers(self) -> int:
        """How many must stay: two thirds (of what an earlier round left), as no refit recovers the loss of more."""
        if LAYERS not in self.structures:
            return self.dense.num_layers
        return max(-(-2 * self.dense.num_layers // 3), len(undroppable_layers(self.dense.config)))

    @property
    def step_of_layers(self) -> int:
        """By how much the numbers of layers that are tried differ."""
        return max(1, round(self.dense.num_layers / LAYERS_OF_A_STEP))

    def most_layers_gone(self) -> int:
        """How many layers may go: as many as bounds allow, or the first number tried whose layers exceed the ratio."""
        most = min(len(self.droppable), self.dense.num_layers - self.fewest_layers)
        smallest_first = sorted(self.counts.layers[layer] for layer in self.droppable)
        tried = range(0, most, self.step_of_layers)
        return next((gone for gone in tried if sum(smallest_first[:gone]) > self.removals), most)

    def fewest(self, kind: str) -> tuple[int, ...]:
        """The fewest units of a kind that each layer keeps where layers compete, if it stays itself."""
        counts = self.dense.structures[kind].counts
        if kind not in self.structures:
            return counts
        shares = [0.0 if kind == KV_GROUPS else self.floor * count for count in counts]
        step = self.tensor_parallel if kind == KV_GROUPS else self.multiple_of
        fewest = [-(-max(1, round(share)) // step) * step for share in shares]
        pairs = enumerate(zip(fewest, counts, strict=True))
        return tuple(min(pair) if layer in self.pruned_layers else pair[1] for layer, pair in pairs)

    def least_removals(self) -> int:
        """The fewest parameters that can go where layers compete; 0 if only whole layers can."""
        steps = {KV_GROUPS: self.tensor_parallel, NEURONS: self.multiple_of}
        return min(
            (
                self.counts.units[kind] * (count - (count - 1) // steps[kind] * steps[kind])
                for kind in UNITS
                for count, fewest in zip(self.dense.structures[kind].counts, self.fewest(kind), strict=True)
                if fewest < count
            ),
            default=0,
        )

    def plain_groups(self) -> list[int]:
        """The numbers of KV groups that all layers of a plain checkpoint may have, ascending."""
        return [count for count in plain_group_counts(self.dense) if count % self.tensor_parallel == 0]

    @property
    def splits_groups(self) -> bool:
        """Whether ``tensor_parallel`` divides the number of KV groups of every layer, if groups may go."""
        return KV_GROUPS not in self.structures or gcd(*self.groups.counts) % self.tensor_parallel == 0

    def smallest(self) -> Shape:
        """What is left where layers compete when all that may go is gone; of layers, the smallest ones."""
        smallest_first = sorted(self.droppable, key=self.counts.layers.__getitem__)
        gone = smallest_first[: self.dense.num_layers - self.fewest_layers]
        layers = tuple(layer for layer in range(self.dense.num_layers) if layer not in gone)
        return Shape(layers, {kind: tuple(self.fewest(kind)[layer] for layer in layers) for kind in UNITS})

    def out_of_reach(self, nearest: float) -> UserError:
        """The error for a ratio that no shape comes to, with that of the nearest one; 0 if nothing can go."""
        bounds = [name for name in BOUNDS if getattr(self, name) != getattr(type(self), name)]
        told = f" with {', '.join(f'{name} {getattr(self, name)}' for name in bounds)}" if bounds else ""
        # Rounded down, so that it can be reached.
        possible = f"the nearest possible is {int(nearest * 1e6) / 1e6:g}" if nearest else "nothing can go"
        if not nearest and not self.splits_groups and not (self.allocation == "plain" and self.plain_groups()):
            possible = (
                f"tensor_parallel {self.tensor_parallel} doesn't divide the number of KV groups of every layer; the "
                f"largest that does is {gcd(*self.groups.counts)}"
            )
        return UserError(
            f"{self.where}: ratio {self.ratio:g} can't be reached by pruning {', '.join(self.structures)}{told}; "
            f"{possible}"
        )
