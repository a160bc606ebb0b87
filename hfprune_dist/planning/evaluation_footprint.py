"""Memory of evaluating a model on tasks and texts, which takes only forward passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.gathering import gathered_at_a_time
from hfprune_dist.planning.gpu_needs import Memory
from hfprune_dist.planning.layer_pass_footprint import widest

# Few tasks have longer requests.
REQUEST_TOKENS = 1024


@dataclass(frozen=True)
class Evaluate:
    """Forward passes of ``sequences`` of at most ``tokens`` at a time; each rank has whole weights if they fit.

    ``window``: tokens of a window of text, which is compared by itself, whatever the size of a batch.
    """

    sequences: int
    tokens: int
    itemsize: int = 2
    window: int = 0

    @classmethod
    def of(cls, batch_size: int, sequence_length: int, itemsize: int) -> Evaluate:
        """Return the job of a stage that answers batches of tasks' requests, and compares windows of text one by one.

        Args:
            batch_size: number of requests, whose lengths aren't known before a stage runs: they are taken to be as long
                as windows, up to ``REQUEST_TOKENS``. 0 without tasks.
            sequence_length: tokens per window of text.
        """
        return cls(batch_size, min(sequence_length, REQUEST_TOKENS), itemsize, window=sequence_length)

    def resized(self, sequences: int) -> Evaluate:
        """Return a copy with this many sequences in a batch."""
        return replace(self, sequences=sequences)

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """Memory on one of the ranks that the model is sharded over."""
        tokens = max(self.sequences * self.tokens, self.window)
        return Memory(
            weights=dims.parameters * self.itemsize / ranks,
            gathered=gathered_at_a_time(dims, self.itemsize, ranks),
            activations=tokens * widest(dims) * self.itemsize,
            scratch=tokens * dims.vocabulary * (self.itemsize + 2 * 4),
        )
