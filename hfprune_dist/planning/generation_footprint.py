"""What a measurement of efficiency needs of a GPU: two whole models, and what one of them generates."""

from __future__ import annotations

from dataclasses import dataclass

from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.gpu_needs import Memory
from hfprune_dist.planning.layer_pass_footprint import widest


@dataclass(frozen=True)
class Generate:
    """Two models in turn generate ``sequences`` at once, each of ``tokens`` in the end; rank 0 has all of it."""

    sequences: int
    tokens: int
    itemsize: int = 2

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """On rank 0, however many others wait."""
        tokens = self.sequences * self.tokens
        cache = 2 * dims.num_layers * dims.num_key_value_heads * dims.head_size
        return Memory(
            weights=2 * dims.parameters * self.itemsize,
            gathered=0.0,
            activations=tokens * (cache + widest(dims)) * self.itemsize,
            scratch=self.sequences * dims.vocabulary * self.itemsize,
        )
