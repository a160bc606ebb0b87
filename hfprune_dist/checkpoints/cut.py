"""Cutting units out of the tensors of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.selection import entries_of
from hfprune_dist.structures.units import Owned, Units

# The dtype that holds a number's bits, by its size in bytes.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Cut:
    """Keep the entries ``kept`` (ascending int64) along ``dimension`` (0 or 1) and drop the rest."""

    dimension: int
    kept: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the cut."""
        return (*shape[: self.dimension], self.kept.numel(), *shape[self.dimension + 1 :])

    def apply(self, tensor: Tensor) -> Tensor:
        """The kept entries, dtype and bits unchanged."""
        if self.dimension == 0:
            return tensor.index_select(0, self.kept)
        # Along rows, index_select takes twice as long as gather, which is faster with integers than with bfloat16.
        kept_by_row = self.kept.expand(len(tensor), -1)
        return tensor.view(BITS[tensor.itemsize]).gather(1, kept_by_row).view(tensor.dtype)


@dataclass(frozen=True)
class StackedCut:
    """A ``Cut`` of each matrix in a tensor that stacks one matrix for each expert.

    Attributes:
        dimension: dimension of the whole tensor, 1 or 2.
        kept: int64 [experts, entries]; row ``e`` holds the kept entries of expert ``e``, ascending.
    """

    dimension: int
    kept: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the cut."""
        return (*shape[: self.dimension], self.kept.shape[1], *shape[self.dimension + 1 :])

    def apply(self, tensor: Tensor) -> Tensor:
        """The kept entries, dtype and bits unchanged."""
        cuts = (Cut(self.dimension - 1, kept_N) for kept_N in self.kept)
        return torch.stack([cut.apply(matrix) for cut, matrix in zip(cuts, tensor, strict=True)])


def cut_of(units: Units, layer: int, owned: Owned, kept_K: Tensor) -> Cut | StackedCut:
    """The cut of one of a layer's tensors that leaves only the units that stay.

    Args:
        kept_K: the units that stay, ascending int64; the same number for every expert.
    """
    if owned.expert is None and not owned.stacked:
        return Cut(owned.axis, entries_of(kept_K, owned.per_unit, owned.parts, units.counts[layer]))
    width, of_experts = units.counts[layer] // units.parts, kept_K.chunk(units.parts)
    if owned.expert is not None:
        return Cut(owned.axis, of_experts[owned.expert] - width * owned.expert)
    own = (entries_of(it - width * expert, owned.per_unit, owned.parts, width) for expert, it in enumerate(of_experts))
    return StackedCut(owned.axis, torch.stack(list(own)))
