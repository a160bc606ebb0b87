"""Memory of sums of matrices while terms are added to them, and of the Gram matrices made of them."""

from __future__ import annotations

from collections.abc import Sequence

from hfprune_dist.core.memory_limits import LAYER_SUMS_BYTES

# Bytes of each number of a sum, which is float64, and of a term, which is float32.
SUM_BYTES, TERM_BYTES = 8, 4


def grams_bytes(sizes: Sequence[int]) -> int:
    """Peak bytes of a layer's Gram matrices of vectors of these sizes (``distributed.gram_sums``).

    There are two of each size, of the windows that are fitted and of those that are held out.
    """
    return means_bytes(sizes) + TERM_BYTES * max((size**2 for size in sizes), default=0)


def layer_sums_bytes(sizes: Sequence[int], layers: int, ranks: int) -> int:
    """Bytes of one rank's sums (``scoring.layer_sums``) of matrices; every layer has one of each of these sizes."""
    if not sizes:
        return 0
    whole = SUM_BYTES * layers * sum(sizes)
    own_terms = whole if ranks > 1 and whole <= LAYER_SUMS_BYTES else 0
    return SUM_BYTES * -(-layers // ranks) * sum(sizes) + own_terms + TERM_BYTES * max(sizes)


def means_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a layer's Gram matrices of vectors of these sizes: the two means that ``Grams`` has of each."""
    return 2 * SUM_BYTES * sum(size**2 for size in sizes)
