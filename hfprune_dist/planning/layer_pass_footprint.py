"""Memory of passes layer by layer: each rank holds one layer at a time and sums over tokens, never the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hfprune_dist.core.memory_limits import KEPT_BYTES, PINNED_BYTES
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.gpu_needs import Memory
from hfprune_dist.planning.sum_footprint import grams_bytes, means_bytes

# core.low_rank: for each number of W W^T, in float64: the number, the eigenvectors and the solver's workspace.
EIGENVECTORS_BYTES = 5 * 8
# core.gauss_newton: for each number of the activations' Gram matrix, while it is inverted and afterwards; for each
# weight of an MLP, the vectors of conjugate gradients and the starting points of steps.
INVERSE_BYTES, INVERTED_BYTES, STEP_BYTES = 36, 12, 60
# refit.final_norm_refit: about the most tokens that refits of norms see. refit.norms_refit: the most in a micro-batch.
NORM_TOKENS, NORM_TOKENS_AT_ONCE = 2**15, 2**10


@dataclass(frozen=True)
class Refit:
    """Least squares on output projections, layer by layer, a micro-batch being ``windows`` of ``tokens``.

    Attributes:
        samples: all calibration windows.
        pursues: whether it runs the pruned model as well as the dense one, and fits towards the dense hidden states.
        steps: whether Gauss-Newton steps on whole MLPs follow.
        searches: whether shapes are measured before it, with refits of the dense model's layers.
        share_kept: share of the widest layer's neurons that stays.
        kv_groups: whether attention's output projections are fitted as well; all of their channels may stay.
        norms: whether a refit of all norms follows, which sees some of the windows.
        copies: of each window, which the refit sees as well.
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
    norms: bool = False
    copies: int = 0

    @property
    def _samples_seen(self) -> int:
        """Windows and their copies."""
        return self.samples * (1 + self.copies)

    def resized(self, windows: int) -> Refit:
        """A copy with this many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states in one model or both, and those between the dense model's
        blocks if attention is fitted to them; for steps, an MLP's inputs and, in float32, its targets; pinned memory;
        for experts, matrices that wait.
        """
        mine = tokens_of_a_rank(self._samples_seen, self.windows, self.tokens, ranks)
        between = self.pursues and self.kv_groups
        number_bytes = self.itemsize * (1 + self.pursues + between + self.steps) + 4 * self.steps
        numbers = self.windows * self.tokens * dims.hidden_size
        pinned = pinned_bytes(dims, self.windows * self.tokens, self.itemsize, models=1 + self.pursues)
        if self.steps:  # results are targets, in float32
            pinned += 2 * (_of_a_block(4 * numbers) - _of_a_block(self.itemsize * numbers))
        waiting = self._waiting(dims) if dims.experts is not None and ranks > 1 else 0
        needed = mine * dims.hidden_size * number_bytes + pinned + waiting
        return max(needed, self._before_layers(dims, ranks) + pinned) if self.norms else needed

    def _before_layers(self, dims: Dimensions, ranks: int) -> int:
        """Bytes of what a refit of norms keeps: hidden states before each layer and after the last, those of the dense
        model, and gradients on their way through a layer.
        """
        windows = windows_for_norms(self.windows, self.tokens)
        samples = min(self.samples, max(windows, NORM_TOKENS // self.tokens))
        numbers = tokens_of_a_rank(samples, windows, self.tokens, ranks) * dims.hidden_size
        return (dims.num_layers + 4) * numbers * self.itemsize

    def _waiting(self, dims: Dimensions) -> int:
        """Bytes of a layer whose matrices wait until every rank has a layer to solve; for experts, also those of the
        fitted weights, of which there are many.
        """
        channels = self._channels(dims)
        weights = 0 if dims.experts is None else self.itemsize * dims.hidden_size * sum(channels)
        return means_bytes(channels) + weights

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """Memory on one rank, in whichever phase needs most: the sums, least squares or a step."""
        tokens, blocks = self.windows * self.tokens, self._blocks(dims)
        together = [size for size, _ in blocks]
        passes = [[max(together)]] if self.pursues else [together]  # block by block, or all at once
        passes += [self._channels(dims)] if self.searches else []
        needs = [memory_of_layer_pass(dims, tokens, self.itemsize, sizes) for sizes in passes]
        layer_pass = max(needs, key=lambda it: it.total)
        weights = layer_pass.weights
        if self.pursues:
            # Each model has a next layer in transit, and the dense model's states travel along.
            more = weights + tokens * dims.hidden_size * self.itemsize
            layer_pass = replace(layer_pass, weights=2 * weights, in_transit=layer_pass.in_transit + more)
        elif ranks > 1 and dims.experts is None:
            layer_pass = replace(layer_pass, sums=layer_pass.sums + self._waiting(dims))
        phases = [layer_pass.sums, *self._solving(dims, ranks)]
        if self.searches:
            phases.append(self._trying(dims))
        if self.steps:
            phases.append(self._stepping(dims, self.share_kept * dims.intermediate_size, ranks))
        # Then only one model's layer is there, and nothing is summed.
        idle = layer_pass.activations + layer_pass.weights - weights
        if self.copies:
            phases.append(_head_bytes(dims, self.itemsize) - idle)
        if self.norms:
            phases.append(self._differentiating(dims) - idle)
        return replace(layer_pass, sums=max(phases))

    def _channels(self, dims: Dimensions) -> list[int]:
        """Channels that output projections read: of MLPs or experts, and of attention if that is fitted."""
        return [*self._mlp_channels(dims), *([dims.attention_size] if self.kv_groups else [])]

    def _mlp_channels(self, dims: Dimensions) -> list[int]:
        return [it.channels for it in dims.mlp_outputs for _ in range(it.count)]

    def _blocks(self, dims: Dimensions) -> list[tuple[int, int]]:
        """For each block, in the order in which blocks are fitted: the size of the vectors whose Gram matrices are
        summed, and the number of channels that stay.
        """
        mlp, channels = self._mlp_channels(dims), self._channels(dims)
        kept = [*(math.ceil(self.share_kept * it) for it in mlp), *channels[len(mlp) :]]
        if self.pursues:
            return [(it + dims.hidden_size, it) for it in reversed(kept)]
        return list(zip(channels, kept, strict=True))

    def _solving(self, dims: Dimensions, ranks: int) -> Iterator[int]:
        """Bytes of least squares on each block, in float64: two Gram matrices of all channels; while its two problems
        are set up, the weight, its product with one of these or, sent by other ranks, with both, and the problems;
        while they are solved, four matrices of the channels that stay, and weights. Plus what remains of the previous
        block, and the matrices of blocks summed together with this one.
        """
        blocks, solved = self._blocks(dims), 0
        together, products = means_bytes([size for size, _ in blocks]), 2 if self.pursues and ranks > 1 else 1
        for size, kept in blocks:
            waiting = 0 if self.pursues else together - means_bytes([size])
            set_up = 2 * kept**2 + dims.hidden_size * ((1 + products) * size + 4 * kept)
            in_solves = 4 * kept**2 + dims.hidden_size * (size + 6 * kept)
            yield means_bytes([size]) + 8 * max(set_up, in_solves) + waiting + solved
            solved = means_bytes([kept]) + 2 * 4 * dims.hidden_size * kept

    def _trying(self, dims: Dimensions) -> int:
        """Bytes of the cheap refits of a search, in float64: a layer's Gram matrices; and for the block whose are the
        largest, of which nearly all channels stay in some shape, three more, and seven times its weight: that and its
        product, the problem's three and the solution's two.
        """
        channels = self._channels(dims)
        return means_bytes(channels) + 8 * (3 * max(channels) ** 2 + 7 * dims.hidden_size * max(channels))

    def _stepping(self, dims: Dimensions, kept: float, ranks: int) -> float:
        """Bytes of a step: two Gram matrices of the kept neurons in float64, their inversion, and the iterations."""
        mine = tokens_of_a_rank(self._samples_seen, self.windows, self.tokens, ranks)
        linearized = min(KEPT_BYTES, mine * (dims.mlp_matrices * kept + dims.hidden_size) * self.itemsize)
        weights = dims.mlp_matrices * kept * dims.hidden_size
        inverting, iterating = INVERSE_BYTES * kept**2, INVERTED_BYTES * kept**2 + STEP_BYTES * weights
        return 16 * kept**2 + max(inverting, iterating) + linearized

    def _differentiating(self, dims: Dimensions) -> int:
        """Bytes of a refit of norms: the head, and one micro-batch's way back through a layer. That is at its widest in
        the MLP, whose rows are there three times, with activations and gradients; of attention, what it keeps; norms
        keep float32.
        """
        in_mlp = 3 * dims.row_projections * dims.intermediate_size
        in_attention = 2 * (dims.num_heads + dims.num_key_value_heads) * dims.head_size
        of_a_token = self.itemsize * (in_mlp + in_attention + 5 * dims.hidden_size) + 4 * 3 * dims.hidden_size
        at_once = windows_for_norms(self.windows, self.tokens) * self.tokens
        return at_once * of_a_token + _head_bytes(dims, self.itemsize)


@dataclass(frozen=True)
class LowRank:
    """A pass in which attention gets matrices of low rank: one model's windows, and eigenvectors."""

    windows: int
    tokens: int
    samples: int
    itemsize: int = 2

    def resized(self, windows: int) -> LowRank:
        """A copy with this many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states, and those of one micro-batch in the whole model."""
        whole = self.windows * self.tokens * dims.hidden_size * self.itemsize
        return Reference(self.windows, self.tokens, self.samples, self.itemsize).host_bytes(dims, ranks) + whole

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """Memory on one rank: the pass with layers' inputs in float64, or eigenvectors of the largest matrix."""
        layer_pass = memory_of_layer_pass(dims, self.windows * self.tokens, self.itemsize, [])
        squares = 8 * 2 * self.windows * self.tokens * max(dims.intermediate_size, dims.attention_size)
        rows = max(dims.hidden_size, dims.attention_size)
        solving = EIGENVECTORS_BYTES * rows**2 + 8 * 2 * rows * max(dims.hidden_size, dims.attention_size)
        factors = 8 * 2 * dims.attention_parameters
        return replace(layer_pass, sums=max(squares, solving + factors))


@dataclass(frozen=True)
class Reference:
    """All of ``samples`` windows through the dense model, layer by layer, ``windows`` of ``tokens`` at a time; only its
    outputs or the means of its channels are kept.
    """

    windows: int
    tokens: int
    samples: int
    itemsize: int = 2

    def resized(self, windows: int) -> Reference:
        """A copy with this many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states, and pinned memory."""
        mine = tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        pinned = pinned_bytes(dims, self.windows * self.tokens, self.itemsize)
        return mine * dims.hidden_size * self.itemsize + pinned

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """Memory on one rank, the same for any number of ranks."""
        return memory_of_layer_pass(dims, self.windows * self.tokens, self.itemsize, [])


def memory_of_layer_pass(dims: Dimensions, tokens: int, itemsize: int, sizes: Sequence[int]) -> Memory:
    """Memory of one layer at a time, while Gram matrices of vectors of ``sizes`` are summed. Meanwhile the next layer
    and the next micro-batch arrive, and the last micro-batch's result leaves.
    """
    weights = dims.layer_parameters * itemsize
    return Memory(
        weights=weights,
        gathered=0.0,
        activations=tokens * (widest(dims) * itemsize + (4 * _read_at_a_time(dims, sizes) if sizes else 0)),
        scratch=0.0,
        sums=grams_bytes(sizes),
        in_transit=weights + 2 * tokens * dims.hidden_size * itemsize,
    )


def _read_at_a_time(dims: Dimensions, sizes: Sequence[int]) -> int:
    """Numbers per token that are summed at a time, in float32: of one output projection, or of all experts together."""
    return max(sizes) if dims.experts is None else max(*sizes, dims.experts.chosen * dims.experts.width)


def pinned_bytes(dims: Dimensions, tokens: int, itemsize: int, models: int = 1) -> int:
    """Main memory that is pinned for data in transit (distributed.host_transfers).

    For each model, a micro-batch's hidden states twice and two portions of weights; and two results on their way back.
    """
    portion = min(PINNED_BYTES, dims.intermediate_size * dims.hidden_size * itemsize)
    states = _of_a_block(tokens * dims.hidden_size * itemsize)
    return (2 * models + 2) * states + 2 * models * _of_a_block(portion)


def _of_a_block(size: int) -> int:
    """Bytes that torch pins for a block of ``size`` bytes: the next power of two."""
    return 1 << (size - 1).bit_length()


def windows_for_norms(windows: int, tokens: int) -> int:
    """Windows of ``tokens`` in a micro-batch of a refit of all norms, given those in others."""
    return max(1, min(windows, NORM_TOKENS_AT_ONCE // tokens))


def tokens_of_a_rank(samples: int, windows: int, tokens: int, ranks: int) -> int:
    """The most tokens that any rank gets when whole micro-batches are distributed."""
    return min(samples, -(-samples // (windows * ranks)) * windows) * tokens


def _head_bytes(dims: Dimensions, itemsize: int) -> int:
    return dims.vocabulary * dims.hidden_size * itemsize


def widest(dims: Dimensions) -> int:
    """Numbers per token that a forward without gradients holds at a time."""
    of_mlp = 2 * dims.row_projections * dims.intermediate_size
    copy = dims.routed_channels  # each expert reads copies of its tokens; its outputs are weighted and reordered
    return max(of_mlp + copy, 4 * copy) + 8 * dims.hidden_size
