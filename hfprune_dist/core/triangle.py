"""Symmetric matrices without the blocks below their diagonal, packed into a vector; numbers alone, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# Rows of a block: large enough for a product's full speed.
BLOCK = 256


class BlockRow(NamedTuple):
    """Rows ``start`` to ``end`` of a matrix from column ``start`` on, which lie in the vector from ``first`` on."""

    start: int
    end: int
    first: int


def block_rows(size: int) -> Iterator[BlockRow]:
    """The block rows of a matrix of so many rows, from above."""
    first = 0
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        yield BlockRow(start, end, first)
        first += (end - start) * (size - start)


def packed_size(size: int) -> int:
    """Numbers of the vector that a matrix of so many rows makes: of a large one little more than half."""
    return sum((row.end - row.start) * (size - row.start) for row in block_rows(size))
