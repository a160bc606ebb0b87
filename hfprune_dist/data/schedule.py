"""The order in which training sees its rows: it depends on the seed, never on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label that transformers leaves out of the loss

# Number of a row -> the tensors that training needs: int64 ``input_ids`` and ``labels`` [sequence_length], and more.
RowReader = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """An epoch is a shuffle of all rows, cut into ceil(rows / batch_size) steps of sizes that differ by one at most."""

    rows: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    @property
    def largest_step(self) -> int:
        return -(-self.rows // self.steps_per_epoch)

    def rows_before(self, step: int) -> int:
        """Number of rows that the steps before ``step`` see, over all epochs."""
        return self.rows * step // self.steps_per_epoch

    def rows_of(self, step: int) -> list[int]:
        """Rows of optimizer step ``step``, counted from 0 over all epochs."""
        epoch, part = divmod(step, self.steps_per_epoch)
        first, last = map(self.rows_before, (part, part + 1))
        return _shuffled(self.rows, self.seed, epoch)[first:last].tolist()


@lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    return torch.randperm(rows, generator=generator)
