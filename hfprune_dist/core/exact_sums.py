"""Sums whose bits don't depend on the order of their terms.

The bits of a floating-point sum do, so a sum over ranks changes with their number. Here every term is rounded once to
integers, and integers add up exactly: in any order, over any number of ranks, by a plain all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hfprune_dist.core.blocks import row_blocks
from hfprune_dist.core.triangle import block_rows, packed_size

# The diagonal of the sum may grow to this multiple of what the first term's diagonal predicts, and so the values whose
# squares it holds to 2^10 of theirs; 2^20 of 2^62 leaves 42 bits, more than float32 terms have.
HEADROOM = 2.0**20
# Below this mean diagonal, in rounding units, a Gram matrix is treated as zero. A thousand terms of 16,384 channels
# have rounding errors of norm about 2^12; the smallest ridge, 1e-4 of the mean diagonal, must be larger: 2^26 * 1e-4 is
# about 2^12.7.
RESOLVED = 2.0**26
# Largest scale that float32 holds: scaling by powers of two and rounding are then as exact in it as in float64.
MOST_IN_FLOAT32 = 2.0**127
# Sums of integers up to this one are exact in float64, in which CPUs add much faster: half of what it holds, since
# bounds may be a little too small.
MOST_IN_FLOAT64 = 2.0**52


class ExactOverflowError(ValueError):
    """A term is so much larger than the first that the sum can't hold it."""


class ExactTotal:
    """A sum of integers: in float64 as long as this is exact, in int64 beyond."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self._latest = torch.zeros(shape, dtype=torch.float64, device=device)
        self._largest = 0.0
        self._earlier: Tensor | None = None

    def with_room_for(self, largest: float) -> Tensor:
        """Return the float64 part of the sum, to which integers up to about ``largest`` can be added exactly, once."""
        assert self._latest.dtype == torch.float64, "over"
        if self._largest and self._largest + largest > MOST_IN_FLOAT64:
            self._earlier = self.integers()
            self._latest = torch.zeros_like(self._earlier, dtype=torch.float64)
            self._largest = 0.0
        self._largest += largest
        return self._latest

    def integers(self) -> Tensor:
        """Return the sum, int64, which may be overwritten with that of all ranks; nothing can be added any more."""
        if self._latest.dtype != torch.int64:
            latest_N1, self._latest = self._latest.view(-1, 1), self._latest.view(torch.int64)  # in the same memory
            integers_N1 = self._latest.view(-1, 1)
            for rows in row_blocks(latest_N1, scratch_bytes=torch.int64.itemsize):
                integers_N1[rows] = latest_N1[rows].to(torch.int64)
            if self._earlier is not None:
                self._latest += self._earlier
                self._earlier = None
        return self._latest


class GramScale:
    """Scale at which the Gram matrices x x^T of many terms are rounded to integers: fixed for each row and column.

    Totals are packed (see ``core.triangle``), since terms are symmetric.

    Args:
        first_diagonal_D: the diagonal of one term that all ranks agree on; it determines the scale.
        terms: number of terms in the whole sum.
    """

    OUT_OF_RANGE = "values are NaN, infinite, or more than a thousand times those of the first windows"

    def __init__(self, first_diagonal_D: Tensor, terms: int) -> None:
        diagonal_D = first_diagonal_D.double()
        # A channel may be silent in the first term.
        floor = diagonal_D.mean().clamp(min=1e-30) * 2.0**-10
        largest_D = torch.maximum(diagonal_D, floor) * terms * HEADROOM
        # A power of two, so that scaling rounds nothing; between 2^-60 and 2^76, so that float32 holds it.
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
        return (packed_size(size[0]),)

    def holds(self, term_DD: Tensor) -> Tensor:
        """Return whether a term can be added: a bool on the term's device, also False if the term is not finite."""
        return self.holds_squares(term_DD.diagonal())

    def holds_squares(self, diagonal_D: Tensor) -> Tensor:
        """Return the same for the term with this diagonal."""
        return (diagonal_D.double() <= self._limit_D).all()

    def largest(self, term_DD: Tensor) -> Tensor:
        """Return a bound of the integers that a term is rounded to, float64: the largest on its diagonal."""
        return term_DD.diagonal().double().mul(self._scale_D).mul_(self._scale_D).amax()

    def rounded_squares(self, diagonal_D: Tensor) -> Tensor:
        """Return the integers that a term's diagonal adds to that of a total."""
        return diagonal_D.double().mul(self._scale_D).mul_(self._scale_D).round_().to(torch.int64)

    def squares_of(self, total_D: Tensor) -> Tensor:
        """Return the values that a total's diagonal represents, float64."""
        return total_D.double().div_(self._scale_D).div_(self._scale_D)

    def add(self, term_DD: Tensor, total_P: Tensor) -> None:
        """Add a term that this scale ``holds``, float32 or float64, to a total: int64, or float64 if it has room."""
        scale_D = self._scale_D.to(term_DD.dtype)
        for start, end, first in block_rows(len(term_DD)):
            term_RE = term_DD[start:end, start:]
            total_RE = total_P[first : first + term_RE.numel()].view(term_RE.shape)
            for rows in row_blocks(term_RE, scratch_bytes=_scratch_bytes(term_RE.dtype)):
                scaled_RE = term_RE[rows].mul(scale_D[start:end][rows, None]).mul_(scale_D[start:])
                total_RE[rows] += scaled_RE.round_().to(total_P.dtype)

    def diagonal_of(self, total_P: Tensor) -> Tensor:
        """Return the integers on a total's diagonal."""
        size = len(self._scale_D)
        parts = [total_P[first :: size - start + 1][: end - start] for start, end, first in block_rows(size)]
        return torch.cat(parts)

    def value_of(self, total_P: Tensor) -> Tensor:
        """Return the whole matrix that a total represents, float64."""
        size = len(self._scale_D)
        value_DD = total_P.new_empty(size, size, dtype=torch.float64)
        for start, end, first in block_rows(size):
            row_RE = value_DD[start:end, start:]
            row_RE.copy_(total_P[first : first + row_RE.numel()].view_as(row_RE))
            row_RE.div_(self._scale_D[start:end, None]).div_(self._scale_D[start:])
            value_DD[end:, start:end] = row_RE[:, end - start :].T
        return value_DD


class ExactGram:
    """The sum of the Gram matrices x x^T of many terms, as integers.

    Args:
        first_diagonal_D: the diagonal of one term that all ranks agree on; it determines the scale.
        terms: number of terms in the whole sum.

    Attributes:
        total_P: packed; add the totals of all ranks to get the whole sum.
    """

    def __init__(self, first_diagonal_D: Tensor, terms: int) -> None:
        self._scale = GramScale(first_diagonal_D, terms)
        shape = self._scale.total_shape(tuple(first_diagonal_D.shape))
        self.total_P = ExactTotal(shape, first_diagonal_D.device)

    def add(self, term_DD: Tensor) -> None:
        """Add one term, a float32 or float64 Gram matrix.

        Raises:
            ExactOverflowError: if the term is out of range or not finite; the sum is then unchanged.
        """
        if not bool(self._scale.holds(term_DD)):
            raise ExactOverflowError(GramScale.OUT_OF_RANGE)
        self._scale.add(term_DD, self.total_P.with_room_for(float(self._scale.largest(term_DD))))

    @property
    def is_resolved(self) -> bool:
        """Whether the sum is much larger than the errors that rounding its terms may have caused."""
        return bool(self._scale.diagonal_of(self.total_P.integers()).double().mean() >= RESOLVED)

    def value(self) -> Tensor:
        """Return the sum, float64."""
        return self._scale.value_of(self.total_P.integers())


class TensorScale:
    """Scale at which the tensors of a sum are rounded to integers: one fixed scale for all numbers.

    Args:
        first_maximum: float64 scalar, the largest absolute value of one term that all ranks agree on; it determines the
            scale. If it is not finite, no term can be added.
        terms: number of terms in the whole sum.
    """

    OUT_OF_RANGE = "values are NaN, infinite, or more than a million times those of the first windows"

    def __init__(self, first_maximum: Tensor, terms: int) -> None:
        first = float(first_maximum)
        largest = max(first, 1e-30) * HEADROOM if math.isfinite(first) else 1.0
        self._scale = 2.0 ** math.floor(62 - math.log2(largest * terms))
        # The largest integer that may come from a term.
        self.most = largest * self._scale if math.isfinite(first) else -1.0

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
        return self.largest(term) <= self.most

    def largest(self, term: Tensor) -> Tensor:
        """Return the largest absolute value of a scaled term, float64; NaN if there is one."""
        least, most = torch.aminmax(term)
        return torch.maximum(-least, most).double() * self._scale

    def add(self, term: Tensor, total: Tensor) -> None:
        """Add a term that this scale ``holds``, float32 or float64, to a total: int64, or float64 if it has room."""
        term_RD, total_RD = term.reshape(len(term), -1), total.view(len(term), -1)
        dtype = term.dtype if self._scale <= MOST_IN_FLOAT32 else torch.float64
        for rows in row_blocks(term_RD, scratch_bytes=_scratch_bytes(dtype)):
            total_RD[rows] += term_RD[rows].to(dtype, copy=True).mul_(self._scale).round_().to(total.dtype)

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
        total: add the totals of all ranks to get the whole sum.
    """

    def __init__(self, first_maximum: float, terms: int, shape: torch.Size, device: torch.device) -> None:
        if not math.isfinite(first_maximum):
            raise ExactOverflowError(TensorScale.OUT_OF_RANGE)
        self._scale = TensorScale(torch.tensor(first_maximum, dtype=torch.float64), terms)
        self.total = ExactTotal(shape, device)

    def add(self, term: Tensor) -> None:
        """Add one term, float32 or float64.

        Raises:
            ExactOverflowError: if the term is out of range or not finite; the sum is then unchanged.
        """
        largest = float(self._scale.largest(term))
        if not largest <= self._scale.most:
            raise ExactOverflowError(TensorScale.OUT_OF_RANGE)
        self._scale.add(term, self.total.with_room_for(largest))

    def value(self) -> Tensor:
        """Return the sum, float64."""
        return self._scale.value_of(self.total.integers())


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
            raise ExactOverflowError(GramScale.OUT_OF_RANGE)
        self.total_D += self._scale.rounded_squares(term_D)

    def value(self) -> Tensor:
        """Return the sum, float64."""
        return self._scale.squares_of(self.total_D)


def _scratch_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of temporary results for each number of a term in a dtype: scaled, and as wide as a total."""
    return dtype.itemsize + torch.int64.itemsize
