"""What passes layer by layer need: every rank has one layer at a time, and sums over tokens, but never the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hfprune_dist.core.memory_limits import KEPT_BYTES
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.gpu_needs import Memory

# distributed.layer_stream: for each number of a Gram matrix two exact sums, in 8 bytes each, with what is added to
# them; and the two matrices that are made of them.
GRAM_BYTES, GRAMS_BYTES = 36, 16
# core.gauss_newton: for each number of activations' Gram matrix, while it is inverted, and afterwards; for each
# weight of an MLP the vectors of conjugate gradients and where steps begin.
INVERSE_BYTES, INVERTED_BYTES, STEP_BYTES = 36, 12, 60


@dataclass(frozen=True)
class Refit:
    """Least squares on every MLP, layer by layer, a micro-batch being ``windows`` of ``tokens``.

    Attributes:
        samples: all calibration windows.
        pursues: whether it goes through the pruned model as well as the dense one, towards the dense hidden states.
        steps: whether steps of Gauss-Newton on whole MLPs follow.
        searches: whether widths are searched with refits of the dense model's layers before it.
        share_kept: of the widest layer's neurons.
    """

    windows: int
    tokens: int
    samples: int
    pursues: bool
    steps: bool
    searches: bool
    share_kept: float
    itemsize: int = 2

    def resized(self, windows: int) -> Refit:
        """The same with so many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states, of one model or both; for a step, what an MLP reads
        and, in float32, its target.
        """
        mine = tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        number_bytes = self.itemsize * (1 + self.pursues + self.steps) + 4 * self.steps
        return mine * dims.hidden_size * number_bytes

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """On one rank: of the sums, of least squares, or of a step, whichever needs most."""
        tokens, kept = self.windows * self.tokens, self.share_kept * dims.intermediate_size
        size = kept + dims.hidden_size if self.pursues else dims.intermediate_size
        largest = max(size, dims.intermediate_size) if self.searches else size
        layer_pass = memory_of_layer_pass(dims, tokens, self.itemsize, largest)
        if self.pursues:
            layer_pass = replace(layer_pass, weights=2 * layer_pass.weights)
        elif ranks > 1:  # a layer's matrices wait until every rank has a layer to solve
            layer_pass = replace(layer_pass, sums=layer_pass.sums + GRAMS_BYTES * size**2)
        phases = [layer_pass.sums, self._solving(dims, kept, size)]
        if self.steps:
            phases.append(self._stepping(dims, kept, ranks))
        return replace(layer_pass, sums=max(phases))

    def _solving(self, dims: Dimensions, kept: float, size: float) -> float:
        """Bytes of least squares: two Gram matrices of all neurons, four of those that stay, and weights; float64."""
        return 8 * (2 * size**2 + 4 * kept**2 + dims.hidden_size * (size + 6 * kept))

    def _stepping(self, dims: Dimensions, kept: float, ranks: int) -> float:
        """Bytes of a step: two Gram matrices of the kept neurons in float64, what inverts them, what iterates."""
        mine = tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        linearized = min(KEPT_BYTES, mine * (3 * kept + dims.hidden_size) * self.itemsize)
        weights = 3 * kept * dims.hidden_size
        inverting, iterating = INVERSE_BYTES * kept**2, INVERTED_BYTES * kept**2 + STEP_BYTES * weights
        return 16 * kept**2 + max(inverting, iterating) + linearized


@dataclass(frozen=True)
class Reference:
    """All of ``samples`` windows through the dense model, layer by layer, ``windows`` of ``tokens`` at a time."""

    windows: int
    tokens: int
    samples: int
    itemsize: int = 2

    def resized(self, windows: int) -> Reference:
        """The same with so many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states."""
        mine = tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        return mine * dims.hidden_size * self.itemsize

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """On one rank, whatever their number."""
        return memory_of_layer_pass(dims, self.windows * self.tokens, self.itemsize, 0)


def memory_of_layer_pass(dims: Dimensions, tokens: int, itemsize: int, size: float) -> Memory:
    """Of one layer at a time, where Gram matrices of vectors of ``size`` are added up."""
    return Memory(
        weights=dims.layer_parameters * itemsize,
        gathered=0.0,
        activations=tokens * (widest(dims) * itemsize + 4 * size),
        scratch=0.0,
        sums=GRAM_BYTES * size**2,
    )


def tokens_of_a_rank(samples: int, windows: int, tokens: int, ranks: int) -> int:
    """The most that any rank gets, of micro-batches that are dealt out whole."""
    return min(samples, -(-samples // (windows * ranks)) * windows) * tokens


def widest(dims: Dimensions) -> int:
    """Numbers a token that a forward without gradients has at a time."""
    return 4 * dims.intermediate_size + 8 * dims.hidden_size
