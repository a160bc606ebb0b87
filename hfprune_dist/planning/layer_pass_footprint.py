"""What passes layer by layer need: every rank has one layer at a time, and sums over tokens, but never the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hfprune_dist.core.memory_limits import KEPT_BYTES, PINNED_BYTES
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.gpu_needs import Memory

# distributed.layer_stream: for each number of a Gram matrix two exact sums, in 8 bytes each; or the two matrices that
# are made of them; and what is added to them.
GRAMS_BYTES, TERM_BYTES = 16, 20
# core.low_rank: of each number of W W^T, in float64: it, its eigenvectors and what finds them.
EIGENVECTORS_BYTES = 5 * 8
# core.gauss_newton: for each number of activations' Gram matrix, while it is inverted, and afterwards; for each
# weight of an MLP the vectors of conjugate gradients and where steps begin.
INVERSE_BYTES, INVERTED_BYTES, STEP_BYTES = 36, 12, 60


@dataclass(frozen=True)
class Refit:
    """Least squares on output projections, layer by layer, a micro-batch being ``windows`` of ``tokens``.

    Attributes:
        samples: all calibration windows.
        pursues: whether it goes through the pruned model as well as the dense one, towards the dense hidden states.
        steps: whether steps of Gauss-Newton on whole MLPs follow.
        searches: whether shapes are measured with refits of the dense model's layers before it.
        share_kept: of the widest layer's neurons.
        kv_groups: whether attention's output projections are fitted as well as MLPs', none of whose channels need go.
    """

    windows: int
    tokens: int
    samples: int
    pursues: bool
    steps: bool
    searches: bool
    share_kept: float
    itemsize: int = 2
    kv_groups: bool = False

    def resized(self, windows: int) -> Refit:
        """The same with so many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states, of one model or both, and between the dense model's
        blocks if attention pursues them; for a step, what an MLP reads and, in float32, its target; what is pinned; of
        experts what waits.
        """
        mine = tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        between = self.pursues and self.kv_groups
        number_bytes = self.itemsize * (1 + self.pursues + between + self.steps) + 4 * self.steps
        numbers = self.windows * self.tokens * dims.hidden_size
        pinned = pinned_bytes(dims, self.windows * self.tokens, self.itemsize, models=1 + self.pursues)
        if self.steps:  # results are targets, in float32
            pinned += 2 * (_of_a_block(4 * numbers) - _of_a_block(self.itemsize * numbers))
        waiting = self._waiting(dims) if dims.experts is not None and ranks > 1 else 0
        return mine * dims.hidden_size * number_bytes + pinned + waiting

    def _waiting(self, dims: Dimensions) -> int:
        """Bytes of a layer whose matrices wait until every rank has a layer to solve; with the weights that are fitted,
        of which experts have many.
        """
        channels = self._channels(dims)
        weights = 0 if dims.experts is None else self.itemsize * dims.hidden_size * sum(channels)
        return int(GRAMS_BYTES * sum(size**2 for size in channels) + weights)

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """On one rank: of the sums, of least squares, or of a step, whichever needs most."""
        tokens, blocks = self.windows * self.tokens, self._blocks(dims)
        together = [size for size, _ in blocks]
        passes = [[max(together)]] if self.pursues else [together]  # one block after another, or all at once
        passes += [self._channels(dims)] if self.searches else []
        needs = [memory_of_layer_pass(dims, tokens, self.itemsize, sizes) for sizes in passes]
        layer_pass = max(needs, key=lambda it: it.total)
        if self.pursues:
            # Each model has a next layer, and the dense one's states come along.
            more = layer_pass.weights + tokens * dims.hidden_size * self.itemsize
            layer_pass = replace(layer_pass, weights=2 * layer_pass.weights, ahead=layer_pass.ahead + more)
        elif ranks > 1 and dims.experts is None:
            layer_pass = replace(layer_pass, sums=layer_pass.sums + self._waiting(dims))
        phases = [layer_pass.sums, *self._solving(dims)]
        if self.steps:
            phases.append(self._stepping(dims, self.share_kept * dims.intermediate_size, ranks))
        return replace(layer_pass, sums=max(phases))

    def _channels(self, dims: Dimensions) -> list[float]:
        """That output projections read: of MLPs or experts, and of attention if that is fitted."""
        return [*self._mlp_channels(dims), *([dims.attention_size] if self.kv_groups else [])]

    def _mlp_channels(self, dims: Dimensions) -> list[float]:
        return [it.channels for it in dims.mlp_outputs for _ in range(it.count)]

    def _blocks(self, dims: Dimensions) -> list[tuple[float, float]]:
        """Of each block, in the order in which they are fitted: numbers a token of what its Gram matrices are summed
        of, and channels that stay.
        """
        mlp, channels = self._mlp_channels(dims), self._channels(dims)
        kept = [*(self.share_kept * it for it in mlp), *channels[len(mlp) :]]
        if self.pursues:
            return [(it + dims.hidden_size, it) for it in reversed(kept)]
        return list(zip(channels, kept, strict=True))

    def _solving(self, dims: Dimensions) -> Iterator[float]:
        """Bytes of least squares on each block: two Gram matrices of all channels, four of those that stay, and
        weights, in float64; with what is there of the block before, and of others that were summed together with it.
        """
        blocks, solved = self._blocks(dims), 0.0
        together = sum(it**2 for it, _ in blocks)
        for size, kept in blocks:
            waiting = 0 if self.pursues else GRAMS_BYTES * (together - size**2)
            yield 8 * (2 * size**2 + 4 * kept**2 + dims.hidden_size * (size + 6 * kept)) + waiting + solved
            solved = GRAMS_BYTES * kept**2 + 2 * 4 * dims.hidden_size * kept

    def _stepping(self, dims: Dimensions, kept: float, ranks: int) -> float:
        """Bytes of a step: two Gram matrices of the kept neurons in float64, what inverts them, what iterates."""
        mine = tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        linearized = min(KEPT_BYTES, mine * (dims.mlp_matrices * kept + dims.hidden_size) * self.itemsize)
        weights = dims.mlp_matrices * kept * dims.hidden_size
        inverting, iterating = INVERSE_BYTES * kept**2, INVERTED_BYTES * kept**2 + STEP_BYTES * weights
        return 16 * kept**2 + max(inverting, iterating) + linearized


@dataclass(frozen=True)
class LowRank:
    """The same of a pass in which attention gets matrices of low rank: one model's windows, and eigenvectors."""

    windows: int
    tokens: int
    samples: int
    itemsize: int = 2

    def resized(self, windows: int) -> LowRank:
        """The same with so many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states, and one micro-batch's of the whole model."""
        whole = self.windows * self.tokens * dims.hidden_size * self.itemsize
        return Reference(self.windows, self.tokens, self.samples, self.itemsize).host_bytes(dims, ranks) + whole

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """On one rank: of the windows' pass, in float64 of what they read, and of the largest matrix's eigenvectors."""
        layer_pass = memory_of_layer_pass(dims, self.windows * self.tokens, self.itemsize, [])
        squares = 8 * 2 * self.windows * self.tokens * max(dims.intermediate_size, dims.attention_size)
        rows = max(dims.hidden_size, dims.attention_size)
        solving = EIGENVECTORS_BYTES * rows**2 + 8 * 2 * rows * max(dims.hidden_size, dims.attention_size)
        factors = 8 * 2 * dims.attention_parameters
        return replace(layer_pass, sums=max(squares, solving + factors))


@dataclass(frozen=True)
class Reference:
    """All of ``samples`` windows through the dense model, layer by layer, ``windows`` of ``tokens`` at a time; nothing
    but its outputs or means of its channels are kept.
    """

    windows: int
    tokens: int
    samples: int
    itemsize: int = 2

    def resized(self, windows: int) -> Reference:
        """The same with so many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states, and what is pinned."""
        mine = tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        pinned = pinned_bytes(dims, self.windows * self.tokens, self.itemsize)
        return mine * dims.hidden_size * self.itemsize + pinned

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """On one rank, whatever their number."""
        return memory_of_layer_pass(dims, self.windows * self.tokens, self.itemsize, [])


def memory_of_layer_pass(dims: Dimensions, tokens: int, itemsize: int, sizes: Sequence[float]) -> Memory:
    """Of one layer at a time, where Gram matrices of vectors of these sizes are added up; meanwhile the next one comes,
    with the next micro-batch, and the last one's result goes.
    """
    matrices = [size**2 for size in sizes]
    weights = dims.layer_parameters * itemsize
    return Memory(
        weights=weights,
        gathered=0.0,
        activations=tokens * (widest(dims) * itemsize + (4 * _read_at_a_time(dims, sizes) if sizes else 0)),
        scratch=0.0,
        sums=GRAMS_BYTES * sum(matrices) + TERM_BYTES * max(matrices, default=0),
        ahead=weights + 2 * tokens * dims.hidden_size * itemsize,
    )


def _read_at_a_time(dims: Dimensions, sizes: Sequence[float]) -> float:
    """Numbers a token that are added up, in float32: of one output projection, or of all experts together."""
    return max(sizes) if dims.experts is None else max(*sizes, dims.experts.chosen * dims.experts.width)


def pinned_bytes(dims: Dimensions, tokens: int, itemsize: int, models: int = 1) -> int:
    """Main memory that is pinned for what is on its way (distributed.host_transfers).

    Of each model, a micro-batch's hidden states twice and two portions of weights; two results back.
    """
    portion = min(PINNED_BYTES, dims.intermediate_size * dims.hidden_size * itemsize)
    states = _of_a_block(tokens * dims.hidden_size * itemsize)
    return (2 * models + 2) * states + 2 * models * _of_a_block(portion)


def _of_a_block(size: int) -> int:
    """Bytes that torch pins for so many: a power of two."""
    return 1 << (size - 1).bit_length()


def tokens_of_a_rank(samples: int, windows: int, tokens: int, ranks: int) -> int:
    """The most that any rank gets, of micro-batches that are dealt out whole."""
    return min(samples, -(-samples // (windows * ranks)) * windows) * tokens


def widest(dims: Dimensions) -> int:
    """Numbers a token that a forward without gradients has at a time."""
    of_mlp = 2 * dims.row_projections * dims.intermediate_size
    if dims.experts is not None:  # each reads copies of its tokens, and its outputs are weighted and put in order
        copy = dims.experts.chosen * dims.hidden_size
        of_mlp = max(of_mlp + copy, 4 * copy)
    return of_mlp + 8 * dims.hidden_size
