"""Layout of symmetric matrices packed into a vector without the blocks below the diagonal; doesn't import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# Number of rows in a block: large enough for matrix products at full speed.
BLOCK = 256


class BlockRow(NamedTuple):
    """Rows ``start`` to ``end`` of a matrix, from column ``start`` on; the vector holds them from ``first`` on."""

    start: int
    end: int
    first: int


def block_rows(size: int) -> Iterator[BlockRow]:
    """Yield the block rows of a matrix of ``size`` rows, from top to bottom."""
    first = 0
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        yield BlockRow(start, end, first)
        first += (end - start) * (size - start)


def packed_size(size: int) -> int:
    """Return the length of the packed vector of a matrix of ``size`` rows: for large ones little more than half."""
    return sum((row.end - row.start) * (size - row.start) for row in block_rows(size))
