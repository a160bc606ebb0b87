"""Counts of floating-point operations, separated by dtype and by whether ranks share them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Operations:
    """Operations of all ranks together; those that every rank repeats count once.

    Attributes:
        products: matrix products in the compute dtype; ranks share them by windows or rows.
        float32: products for Gram matrices; ranks share them by windows.
        float64: factors of matrices and solves with them; ranks share them by layers or by problems.
        own_float32: products that every rank repeats.
        own_float64: the part of least squares that every rank repeats, or waits for.
    """

    products: float = 0.0
    float32: float = 0.0
    float64: float = 0.0
    own_float32: float = 0.0
    own_float64: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(self._all()))

    def __add__(self, other: Operations) -> Operations:
        return Operations(*map(operator.add, self._all(), other._all()))

    def __mul__(self, times: float) -> Operations:
        return Operations(*(times * it for it in self._all()))

    def _all(self) -> Iterable[float]:
        return vars(self).values()  # astuple copies each, which would dominate the time of computing costs

    def shared(self) -> Operations:
        """Return the same operations for ranks that share even what each usually repeats."""
        return Operations(self.products, self.float32 + self.own_float32, self.float64 + self.own_float64)


NO_OPERATIONS = Operations()
