"""Memory of exact sums (``core.exact_sums``) while terms are added to them, and of the Gram matrices made of them."""

from __future__ import annotations

from collections.abc import Sequence

from hfprune_dist.core.triangle import BLOCK, packed_size

# Bytes of each number: in a total, which is packed if it is that of Gram matrices (where later terms are a thousand
# times the first, or channels that are silent in it become loud, it needs as much again); in a term, which is float32;
# in those rows of a term that are being rounded, in float32 and then as wide as a total; in a mean over windows, which
# is float64.
TOTAL_BYTES, TERM_BYTES, ROUNDED_BYTES, MEAN_BYTES = 8, 4, 4 + 8, 8


def gram_term_bytes(size: int) -> int:
    """Bytes of a Gram matrix of vectors of ``size`` that is being added, a block of its rows rounded at a time."""
    return TERM_BYTES * size**2 + ROUNDED_BYTES * min(BLOCK, size) * size


def grams_bytes(sizes: Sequence[int]) -> int:
    """Peak bytes of a layer's Gram matrices of vectors of these sizes (``distributed.gram_sums``).

    There are two of each size, of the windows that are fitted and of those that are held out. Terms are added to all
    totals; then one total after another becomes a mean, and is freed.
    """
    totals = [TOTAL_BYTES * packed_size(size) for size in sizes]
    left, means = 2 * sum(totals), 0
    peak = left + max(map(gram_term_bytes, sizes), default=0)
    for size, total in zip(sizes, totals, strict=True):
        left, means = left - 2 * total, means + means_bytes([size])
        peak = max(peak, left + total + means)
    return peak


def means_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a layer's Gram matrices of vectors of these sizes: the two means that ``Grams`` has of each."""
    return 2 * MEAN_BYTES * sum(size**2 for size in sizes)
