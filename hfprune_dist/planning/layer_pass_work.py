"""Floating-point operations of passes layer by layer: forwards, Gram matrices, least squares, steps on whole MLPs.

Matrix products, Cholesky factors and solves with them are counted as the code performs them, a product of [m, k] and
[k, n] as 2 m k n; elementwise work is not. Gram matrices count in full, as on a GPU. A bare number counts operations in
one dtype; ``Operations`` holds several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hfprune_dist.core.triangle import packed_size
from hfprune_dist.planning.dimensions import Dimensions, Outputs, attention_flops
from hfprune_dist.planning.layer_pass_footprint import NORM_TOKENS, windows_for_norms
from hfprune_dist.planning.model_shape import ModelShape
from hfprune_dist.planning.operations import Operations

# distributed.gram_sums: one of this many micro-batches is held out. core.least_squares: ridges that are tried.
HOLD_OUT_EVERY, RIDGES = 8, 5
# refit.gauss_newton_ranks: iterations of the first and the second step; step lengths that are tried.
ITERATIONS, STEP_LENGTHS = 4, 3


@dataclass(frozen=True)
class WindowCounts:
    """Windows of text that go through a model, on all ranks together.

    Attributes:
        count: how many.
        length: tokens of each.
        micro_batch: windows per forward pass.
    """

    count: int
    length: int
    micro_batch: int

    @property
    def tokens(self) -> int:
        return self.count * self.length

    @property
    def batches(self) -> int:
        """Number of micro-batches."""
        return -(-self.count // self.micro_batch)

    @property
    def held_out(self) -> int:
        """Tokens in micro-batches that are held out; a single micro-batch is both held out and fitted."""
        every = min(HOLD_OUT_EVERY, self.batches)
        windows = self.batches // every * self.micro_batch
        missing = self.batches * self.micro_batch - self.count  # in the last one
        return (windows - (missing if self.batches % every == 0 else 0)) * self.length

    @property
    def fitted(self) -> int:
        """Tokens in micro-batches that are fitted."""
        return self.tokens - (self.held_out if self.batches > 1 else 0)


# Operations per token in one layer.


def attention_core(dims: Dimensions, length: int) -> float:
    """Both products of attention."""
    return attention_flops(dims, length) / dims.num_layers


def attention_block(dims: Dimensions, length: int) -> float:
    """Attention with its projections."""
    return 2 * dims.attention_parameters + attention_core(dims, length)


def mlp_block(dims: Dimensions) -> float:
    return 2 * dims.mlp_matrices * dims.hidden_size * dims.intermediate_size


def forward(dims: Dimensions, length: int) -> float:
    """A whole layer."""
    return attention_block(dims, length) + mlp_block(dims)


def gram(size: int) -> float:
    """The Gram matrix of vectors of this size."""
    return 2 * size**2


def forward_of_all(shape: ModelShape, length: int) -> float:
    """Operations per token in all layers."""
    return sum(forward(dims, length) for dims in shape.layers)


# Least squares.


def channels_of(dims: Dimensions, kv_groups: bool) -> list[int]:
    """Numbers of channels that the fitted output projections read: the MLP's, then attention's."""
    return [dims.intermediate_size, *([dims.attention_size] if kv_groups else [])]


def outputs_of(dims: Dimensions, kv_groups: bool) -> list[Outputs]:
    """The same output projections, grouped by size."""
    return [*dims.mlp_outputs, *([Outputs(dims.attention_size)] if kv_groups else [])]


def summed_numbers(shape: ModelShape, kv_groups: bool) -> float:
    """Numbers in the packed Gram matrices of all fitted output projections."""
    return sum(it.count * packed_size(it.channels) for dims in shape.layers for it in outputs_of(dims, kv_groups))


def multiplied_numbers(shape: ModelShape, kv_groups: bool) -> float:
    """Numbers in the products of all fitted output projections with their Gram matrices."""
    return sum(
        it.count * shape.hidden_size * it.channels for dims in shape.layers for it in outputs_of(dims, kv_groups)
    )


def summing(shape: ModelShape, kv_groups: bool) -> float:
    """Operations per token for the Gram matrices of all fitted output projections."""
    return sum(it.count * it.share * gram(it.channels) for dims in shape.layers for it in outputs_of(dims, kv_groups))


def least_squares(outputs: int, channels: int, kept: int) -> Operations:
    """Least squares for one output projection: its problem on two sets of tokens, a weight and its error per ridge, and
    the weight on all tokens with the errors before and after; ranks wait for this weight and the error after.
    """
    tried = least_squares_for(outputs, channels, kept, problems=2, ridges=RIDGES, errors=RIDGES + 1)
    return tried + least_squares_for(outputs, channels, kept, problems=0, ridges=1, errors=1)


def least_squares_for(outputs: int, channels: int, kept: int, *, problems: int, ridges: int, errors: int) -> Operations:
    """Setting up this many problems, solving for a weight per ridge and computing this many errors, all in float64.

    Ranks that fit together set up a problem each, then try a ridge each, with its error. So however many they are, they
    wait for one of each: of n pieces among N ranks, one has at most 1 + (n - 1) / N.
    """
    product, error = 2 * outputs * channels**2, 2 * outputs * kept**2
    solved = cholesky(kept) + 2 * kept**2 * outputs

    def of(problems: int, ridges: int, errors: int) -> float:
        return problems * product + ridges * solved + errors * error

    awaited = of(min(problems, 1), min(ridges, 1), min(errors, 1))
    return Operations(float64=of(problems, ridges, errors) - awaited, own_float64=awaited)


def cholesky(size: int) -> float:
    return size**3 / 3


def dense_refit(
    dense: ModelShape, kept: ModelShape, windows: WindowCounts, *, kv_groups: bool, dropped: Sequence[int] = ()
) -> Operations:
    """A pass through the dense model with the Gram matrices of the layers that stay, and their least squares.

    Args:
        dropped: indices of the layers that go; the pass ends with the last layer that stays.
    """
    last = max(number for number in range(len(dense.layers)) if number not in dropped)
    flops = Operations(windows.tokens * sum(forward(dims, windows.length) for dims in dense.layers[: last + 1]))
    for whole, left in zip(dense.layers, kept.layers, strict=False):
        flops += Operations(windows.tokens * _experts_again(whole))
        for read, stay in zip(outputs_of(whole, kv_groups), outputs_of(left, kv_groups), strict=True):
            flops += Operations(float32=windows.tokens * read.count * read.share * gram(read.channels))
            flops += least_squares(dense.hidden_size, read.channels, stay.channels).shared() * read.count
    return flops


def _experts_again(dims: Dimensions) -> float:
    """Operations per token to recompute the inputs of experts' down projections, which the layer doesn't expose."""
    routed = 0 if dims.experts is None else dims.experts.chosen * dims.experts.width
    return 2 * dims.row_projections * dims.hidden_size * routed


def sequential_refit(
    dense: ModelShape,
    kept: ModelShape,
    windows: WindowCounts,
    *,
    kv_groups: bool,
    other_norms: bool = False,
    more_iterations: int = 0,
) -> Operations:
    """A pass through both models, every block fitted towards the dense one's hidden states on the way; besides
    ``residual_checks``.

    Args:
        other_norms: an earlier round refitted the norms, so that no layer's attention works as the dense one's does.
        more_iterations: of the step on all windows; 0 without Gauss-Newton steps.
    """
    tokens, length = windows.tokens, windows.length
    # A layer that goes is run again behind the block that makes up for it.
    gone = dense.layers[len(kept.layers) :]
    flops = Operations(tokens * (forward_of_all(dense, length) + sum(forward(dims, length) for dims in gone)))
    for whole, left in zip(dense.layers, kept.layers, strict=False):
        flops += Operations(tokens * forward(left, length))
        if kv_groups:
            flops += Operations(tokens * attention_block(whole, length))
            # With the same weights before them, both output projections read the same.
            if other_norms or left.attention_size < whole.attention_size:
                read = attention_block(left, length) - 2 * left.attention_size * left.hidden_size
                flops += Operations(tokens * read)
            flops += _fitted_to_targets(left.hidden_size, left.attention_size, tokens)
        read = 2 * left.row_projections * left.hidden_size * left.intermediate_size
        flops += Operations(tokens * (mlp_block(whole) + read))
        flops += _fitted_to_targets(left.hidden_size, left.intermediate_size, tokens)
        if more_iterations:
            flops += steps(left, windows, more_iterations)
    return flops


def copies(dense: ModelShape, windows: WindowCounts) -> Operations:
    """Copies of windows for a refit: the dense model's logits of all tokens, whatever the number of copies."""
    return Operations(windows.tokens * (forward_of_all(dense, windows.length) + head(dense)))


def residual_checks(dense: ModelShape, layers: int, length: int) -> Operations:
    """One window through those of the dense model's layers that stay in any sequential refit of a stage, which shows,
    once for all its refits, that their blocks are residual.

    Args:
        layers: how many stay.
        length: tokens of a window.
    """
    return Operations(length * sum(forward(dims, length) for dims in dense.layers[:layers]))


def _fitted_to_targets(outputs: int, kept: int, tokens: int) -> Operations:
    """Least squares on vectors of the projection's inputs and of the differences between its outputs and targets."""
    size = kept + outputs
    return Operations(float32=tokens * (2 * kept * outputs + gram(size))) + least_squares(outputs, size, kept)


def steps(dims: Dimensions, windows: WindowCounts, more_iterations: int) -> Operations:
    """Gauss-Newton on a pruned MLP: one step on the windows that are not held out, judged on those that are, and one on
    all windows.
    """
    flops = Operations(STEP_LENGTHS * windows.held_out * mlp_block(dims))
    return flops + _step(dims, windows.fitted, ITERATIONS) + _step(dims, windows.tokens, more_iterations)


def _step(dims: Dimensions, tokens: int, iterations: int) -> Operations:
    """One step: at the current weights, gate and up, the inputs' Gram matrix and the residual; then in each iteration
    four products forward and four backward, one fewer of each without a gate. Preconditioners are inverted once, and
    applied before each iteration.
    """
    outputs, kept, rows = dims.hidden_size, dims.intermediate_size, dims.row_projections
    product = 2 * outputs * kept
    preconditioned = rows * 2 * kept * outputs**2 + 2 * outputs * kept**2
    return Operations(
        products=tokens * (rows + 1 + (rows + 2) * (1 + 2 * iterations)) * product,
        float32=tokens * gram(outputs),
        own_float32=iterations * preconditioned,
        own_float64=inverse(outputs) + inverse(kept),
    )


def inverse(size: int) -> float:
    """Inverse of a symmetric matrix from its Cholesky factor."""
    return cholesky(size) + 2 * size**3 / 3


def final_norm_refit(dense: ModelShape, kept: ModelShape, windows: WindowCounts, *, passes: int) -> Operations:
    """Some of the windows through both models, and each pass over what their heads read: both models' logits, the
    gradients of two losses, and the Gram matrix of one of them.
    """
    tokens = tokens_of_norms(windows)
    through = sum(forward_of_all(it, windows.length) for it in (dense, kept))
    heads = 4 * head(dense)
    return Operations(tokens * (through + passes * heads), float32=tokens * passes * gram(dense.hidden_size))


def norms_refit(dense: ModelShape, kept: ModelShape, windows: WindowCounts, *, passes: int) -> Operations:
    """Some of the windows through the dense model, and in each pass through the pruned one: forwards, once more layer
    by layer, and backwards, without gradients of weights; and both models' logits, and the gradient of one loss.
    """
    once, cores = (
        sum(of_layer(dims, windows.length) for dims in kept.layers) for of_layer in (forward, attention_core)
    )
    backward = once + 1.5 * cores  # it computes a part of attention again
    each = 2 * once + backward + 3 * head(dense)
    windows = replace(windows, micro_batch=windows_for_norms(windows.micro_batch, windows.length))
    return Operations(tokens_of_norms(windows) * (forward_of_all(dense, windows.length) + passes * each))


def tokens_of_norms(windows: WindowCounts) -> int:
    """Number of tokens that refits of norms see."""
    first = min(windows.micro_batch, windows.count) * windows.length
    every = -(-windows.batches // max(1, NORM_TOKENS // first))
    starts = range(0, windows.count, every * windows.micro_batch)
    return sum(min(windows.micro_batch, windows.count - start) for start in starts) * windows.length


def head(shape: ModelShape) -> float:
    """Operations per token for logits."""
    return 2.0 * shape.hidden_size * shape.layers[0].vocabulary


def low_rank(dense: ModelShape, kept: ModelShape, windows: WindowCounts) -> Operations:
    """Compressing a model layer by layer: all windows go through each layer before and after compression, and one
    micro-batch through the original layer once more; plus the factors of its attention, which ranks share.
    """
    alone = min(windows.micro_batch, windows.count) * windows.length
    flops = Operations((windows.tokens + alone) * forward_of_all(dense, windows.length))
    flops += Operations(windows.tokens * forward_of_all(kept, windows.length))
    for dims in kept.layers:
        outputs = [it * dims.head_size for it in (dims.num_heads, *[dims.num_key_value_heads] * 2)]
        sizes = [*((it, dims.hidden_size) for it in outputs), (dims.hidden_size, dims.attention_size)]
        found = (factors(*size, rank) for size, rank in zip(sizes, dims.ranks, strict=True) if rank)
        flops += Operations(float64=sum(found))
    return flops


def factors(outputs: int, inputs: int, rank: int) -> float:
    """W W^T, its eigenvectors (about 9 ``outputs``^3), and the product of a factor with W."""
    return 2 * outputs**2 * inputs + 9 * outputs**3 + 2 * rank * outputs * inputs


def elimination(outputs: int, channels: int) -> float:
    """Removing all channels one by one (core.elimination): the inverse of their Gram matrix, W^T F W, and the products
    that shrink both matrices, 64 channels at a time; rows that are read in between are corrected by the pending
    products.
    """
    curvature = 2 * outputs**2 * channels + 2 * outputs * channels**2
    shrinking = 3 * 2 * channels**3 / 3
    return inverse(channels) + curvature + shrinking


def second_moments(shape: ModelShape, windows: WindowCounts, *, kv_groups: bool) -> Operations:
    """A pass through the model with Gram matrices of the output projections' inputs, and an elimination for each."""
    sizes = [(dims.hidden_size, channels) for dims in shape.layers for channels in channels_of(dims, kv_groups)]
    return Operations(
        products=windows.tokens * forward_of_all(shape, windows.length),
        float32=windows.tokens * sum(gram(channels) for _, channels in sizes),
        float64=sum(elimination(outputs, channels) for outputs, channels in sizes),
    )
