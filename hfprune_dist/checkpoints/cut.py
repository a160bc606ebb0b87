"""Cutting units out of the tensors of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The dtype that holds a number's bits, by its size in bytes.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Cut:
    """Keep the entries ``kept`` (ascending int64) along ``dimension`` (0 or 1); the rest goes."""

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
