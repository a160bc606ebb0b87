"""Sums whose bits don't depend on the order of their terms.

The bits of a floating-point sum do, so a sum over ranks changes with their number. Here every term is rounded once to
integers, and integers add up exactly: in any order, over any number of ranks, by a plain all-reduce.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hfprune_dist.core.blocks import row_blocks
from hfprune_dist.core.triangle import block_rows, packed_size

# The diagonal of the sum may grow to this multiple of what the first term's diagonal predicts; 2^20 of 2^62 leaves 42
# bits, more than float32 terms have.
HEADROOM = 2.0**20
# Smallest mean of a total's diagonal, in multiples of the rounding unit, at which rounding errors are negligible next
# to a ten-thousandth of it: for a thousand terms of 16,384 channels they form a matrix of norm 2^12.
RESOLVED = 2.0**26
OUT_OF_RANGE = "values are NaN, infinite, or more than a thousand times those of the first windows"


class ExactOverflowError(ValueError):
    """A term is so much larger than the first that the sum can't hold it."""


class GramScale:
    """Scale at which the Gram matrices x x^T of many terms are rounded to integers: fixed for each row and column.

    Args:
        first_diagonal_D: the diagonal of one term that all ranks agree on; it determines the scale.
        terms: number of terms in the whole sum.
    """

    def __init__(self, first_diagonal_D: Tensor, terms: int) -> None:
        diagonal_D = first_diagonal_D.double()
        # A channel may be silent in the first term.
        floor = diagonal_D.mean().clamp(min=1e-30) * 2.0**-10
        largest_D = torch.maximum(diagonal_D, floor) * terms * HEADROOM
        # A power of two, so that scaling rounds nothing.
        self._scale_D = torch.exp2(torch.floor(31 - torch.log2(largest_D) / 2))
        # If the first term is not finite, no term can be added.
        self._limit_D = torch.where(largest_D.isfinite(), largest_D / terms, -1.0)

    @staticmethod
    def first_of(term_DD: Tensor) -> Tensor:
        """Return the part of a term that determines a scale."""
        return term_DD.diagonal()

    @staticmethod
    def first_shape(size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what determines a scale, for terms of the given size."""
        return size[:1]

    @staticmethod
    def total_shape(size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a total of terms of the given size."""
        return size

    def holds(self, term_DD: Tensor) -> Tensor:
        """Return whether a term can be added: a bool on the term's device, also False if the term is not finite."""
        return self.holds_squares(term_DD.diagonal())

    def holds_squares(self, diagonal_D: Tensor) -> Tensor:
        """Return the same for the term with this diagonal."""
        return (diagonal_D.double() <= self._limit_D).all()

    def rounded_squares(self, diagonal_D: Tensor) -> Tensor:
        """Return the integers that a term's diagonal adds to that of a total."""
        return diagonal_D.double().mul(self._scale_D).mul_(self._scale_D).round_().to(torch.int64)

    def squares_of(self, total_D: Tensor) -> Tensor:
        """Return the values that a total's diagonal represents, float64."""
        return total_D.double().div_(self._scale_D).div_(self._scale_D)

    def add(self, term_DD: Tensor, total_DD: Tensor) -> None:
        """Add a term that this scale ``holds``, float32 or float64, to an int64 total."""
        for rows in row_blocks(term_DD, scratch_bytes=16):
            scaled_RD = term_DD[rows].to(torch.float64, copy=True).mul_(self._scale_D[rows, None]).mul_(self._scale_D)
            total_DD[rows] += scaled_RD.round_().to(torch.int64)

    def value_of(self, total_DD: Tensor) -> Tensor:
        """Return the values that a total represents, float64."""
        return total_DD.double().div_(self._scale_D[:, None]).div_(self._scale_D)


class PackedGramScale(GramScale):
    """A ``GramScale`` whose totals are packed (see ``core.triangle``)."""

    @staticmethod
    def total_shape(size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a total of terms of the given size."""
        return (packed_size(size[0]),)

    def add(self, term_DD: Tensor, total_P: Tensor) -> None:
        """Add a term that this scale ``holds``, float32 or float64, to an int64 total."""
        for start, end, first in block_rows(len(term_DD)):
            scaled_RE = term_DD[start:end, start:].to(torch.float64, copy=True)
            scaled_RE.mul_(self._scale_D[start:end, None]).mul_(self._scale_D[start:])
            total_P[first : first + scaled_RE.numel()] += scaled_RE.round_().to(torch.int64).flatten()

    def value_of(self, total_P: Tensor) -> Tensor:
        """Return the whole matrix that a packed total represents, float64."""
        size = len(self._scale_D)
        total_DD = total_P.new_empty(size, size)
        for start, end, first in block_rows(size):
            row_RE = total_P[first : first + (end - start) * (size - start)].view(end - start, size - start)
            total_DD[start:end, start:] = row_RE
            total_DD[end:, start:end] = row_RE[:, end - start :].T
        return super().value_of(total_DD)


class ExactGram:
    """The sum of the Gram matrices x x^T of many terms, as integers.

    Args:
        first_diagonal_D: the diagonal of one term that all ranks agree on; it determines the scale.
        terms: number of terms in the whole sum.

    Attributes:
        total_DD: int64; add the totals of all ranks to get the whole sum.
    """

    def __init__(self, first_diagonal_D: Tensor, terms: int) -> None:
        size = len(first_diagonal_D)
        self._scale = GramScale(first_diagonal_D, terms)
        self.total_DD = torch.zeros(size, size, dtype=torch.int64, device=first_diagonal_D.device)

    def add(self, term_DD: Tensor) -> None:
        """Add one term, a float32 or float64 Gram matrix.

        Raises:
            ExactOverflowError: if the term is out of range or not finite; the sum is then unchanged.
        """
        if not bool(self._scale.holds(term_DD)):
            raise ExactOverflowError(OUT_OF_RANGE)
        self._scale.add(term_DD, self.total_DD)

    @property
    def is_resolved(self) -> bool:
        """Whether the sum is much larger than the errors that rounding its terms may have caused."""
        return bool(self.total_DD.diagonal().double().mean() >= RESOLVED)

    def value(self) -> Tensor:
        """The sum, float64."""
        return self._scale.value_of(self.total_DD)


class TensorScale:
    """Scale at which the tensors of a sum are rounded to integers: one fixed scale for all numbers.

    Args:
        first_maximum: float64 scalar, the largest absolute value of one term that all ranks agree on; it determines the
            scale. If it is not finite, no term can be added.
        terms: number of terms in the whole sum.
    """

    def __init__(self, first_maximum: Tensor, terms: int) -> None:
        first = float(first_maximum)
        largest = max(first, 1e-30) * HEADROOM if math.isfinite(first) else 1.0
        self._scale = 2.0 ** math.floor(62 - math.log2(largest * terms))
        self._limit = largest if math.isfinite(first) else -1.0

    @staticmethod
    def first_of(term: Tensor) -> Tensor:
        """Return the part of a term that determines a scale."""
        return term.abs().amax()

    @staticmethod
    def first_shape(_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what determines a scale, for terms of the given size."""
        return ()

    @staticmethod
    def total_shape(size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a total of terms of the given size."""
        return size

    def holds(self, term: Tensor) -> Tensor:
        """Return whether a term can be added: a bool on the term's device, also False if the term is not finite."""
        least, most = torch.aminmax(term)
        return torch.maximum(-least, most).double() <= self._limit  # which may be beyond float32

    def add(self, term: Tensor, total: Tensor) -> None:
        """Add a term that this scale ``holds``, float32 or float64, to an int64 total."""
        term_RD, total_RD = term.reshape(len(term), -1), total.view(len(term), -1)
        for rows in row_blocks(term_RD, scratch_bytes=16):
            total_RD[rows] += term_RD[rows].to(torch.float64, copy=True).mul_(self._scale).round_().to(torch.int64)

    def value_of(self, total: Tensor) -> Tensor:
        """Return the values that a total represents, float64."""
        return total.double().div_(self._scale)


class ExactSum:
    """The sum of many tensors of one shape, as integers at one scale.

    Args:
        first_maximum: the largest absolute value of one term that all ranks agree on; it determines the scale.
        terms: number of terms in the whole sum.

    Raises:
        ExactOverflowError: if ``first_maximum`` is not finite.

    Attributes:
        total: int64; add the totals of all ranks to get the whole sum.
    """

    def __init__(self, first_maximum: float, terms: int, shape: torch.Size, device: torch.device) -> None:
        if not math.isfinite(first_maximum):
            raise ExactOverflowError(OUT_OF_RANGE)
        self._scale = TensorScale(torch.tensor(first_maximum, dtype=torch.float64), terms)
        self.total = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, term: Tensor) -> None:
        """Add one term, float32 or float64.

        Raises:
            ExactOverflowError: if the term is out of range or not finite; the sum is then unchanged.
        """
        if not bool(self._scale.holds(term)):
            raise ExactOverflowError(OUT_OF_RANGE)
        self._scale.add(term, self.total)

    def value(self) -> Tensor:
        """The sum, float64."""
        return self._scale.value_of(self.total)


class ExactSquares:
    """The sum of many terms of squares, channel by channel, as integers: only the diagonal of an ``ExactGram``.

    Args:
        first_D: one term that all ranks agree on; it determines the scale.
        terms: number of terms in the whole sum.

    Attributes:
        total_D: int64; add the totals of all ranks to get the whole sum.
    """

    def __init__(self, first_D: Tensor, terms: int) -> None:
        self._scale = GramScale(first_D, terms)
        self.total_D = torch.zeros(len(first_D), dtype=torch.int64, device=first_D.device)

    def add(self, term_D: Tensor) -> None:
        """Add one term, float64 [channels].

        Raises:
            ExactOverflowError: if the term is out of range or not finite; the sum is then unchanged.
        """
        if not bool(self._scale.holds_squares(term_D)):
            raise ExactOverflowError(OUT_OF_RANGE)
        self.total_D += self._scale.rounded_squares(term_D)

    def value(self) -> Tensor:
        """The sum, float64."""
        return self._scale.squares_of(self.total_D)
