"""Cutting neurons out of the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Keep the entries ``kept`` (ascending int64) along ``dimension``; the rest of the tensor's neurons go."""

    dimension: int
    kept: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the cut."""
        return (*shape[: self.dimension], self.kept.numel(), *shape[self.dimension + 1 :])

    def apply(self, tensor: Tensor) -> Tensor:
        """The kept entries, dtype and values unchanged."""
        return tensor.index_select(self.dimension, self.kept)


def cut_tensor(name: str, tensor: Tensor, cuts: Mapping[str, Cut]) -> Tensor:
    """Return ``tensor`` with its cut applied, or as it is where ``name`` has none."""
    cut = cuts.get(name)
    return tensor if cut is None else cut.apply(tensor)
