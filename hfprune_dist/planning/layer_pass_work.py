"""Floating-point operations of passes layer by layer: forwards, Gram matrices, least squares, steps on whole MLPs.

Products of matrices, Cholesky factors and what is solved with them are counted as the code makes them, a product of
[m, k] and [k, n] as 2 m k n; what goes over numbers one by one is not. Gram matrices count in full, as on a GPU. A bare
number is of one dtype; sums over several are ``Operations``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hfprune_dist.planning.dimensions import Dimensions, Outputs
from hfprune_dist.planning.gathering import attention_flops
from hfprune_dist.planning.model_shape import ModelShape
from hfprune_dist.planning.operations import Operations

# distributed.gram_sums: of so many micro-batches one is held out. core.least_squares: ridges that are tried.
HOLD_OUT_EVERY, RIDGES = 8, 5
# refit.gauss_newton_ranks: iterations of the first step and of the second; lengths that are tried.
ITERATIONS, STEP_LENGTHS = (4, 2), 3


@dataclass(frozen=True)
class Windows:
    """Windows of text on their way through a model, all ranks' together.

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
        """Micro-batches."""
        return -(-self.count // self.micro_batch)

    @property
    def held_out(self) -> int:
        """Tokens in micro-batches that are held out; where there is one micro-batch alone, it is both."""
        every = min(HOLD_OUT_EVERY, self.batches)
        windows = self.batches // every * self.micro_batch
        missing = self.batches * self.micro_batch - self.count  # in the last one
        return (windows - (missing if self.batches % every == 0 else 0)) * self.length

    @property
    def fitted(self) -> int:
        """Tokens in those that are not."""
        return self.tokens - (self.held_out if self.batches > 1 else 0)


# A token's operations in one layer.


def attention_core(dims: Dimensions, length: int) -> float:
    """Of both products of attention."""
    return attention_flops(dims, length) / dims.num_layers


def attention_block(dims: Dimensions, length: int) -> float:
    """Of attention with its projections."""
    return 2 * dims.attention_parameters + attention_core(dims, length)


def mlp_block(dims: Dimensions) -> float:
    return 2 * dims.mlp_matrices * dims.hidden_size * dims.intermediate_size


def forward(dims: Dimensions, length: int) -> float:
    """Of a whole layer."""
    return attention_block(dims, length) + mlp_block(dims)


def gram(size: int) -> float:
    """Of the Gram matrix of vectors of this size."""
    return 2 * size**2


def forward_of_all(shape: ModelShape, length: int) -> float:
    """A token's operations in all layers."""
    return sum(forward(dims, length) for dims in shape.layers)


# Least squares.


def channels_of(dims: Dimensions, kv_groups: bool) -> list[int]:
    """What output projections that are fitted read: the MLP's, then attention's."""
    return [dims.intermediate_size, *([dims.attention_size] if kv_groups else [])]


def outputs_of(dims: Dimensions, kv_groups: bool) -> list[Outputs]:
    """The same output projections, in groups of those that are alike."""
    return [*dims.mlp_outputs, *([Outputs(dims.attention_size)] if kv_groups else [])]


def summed_numbers(shape: ModelShape, kv_groups: bool) -> float:
    """Of the Gram matrices of all of them."""
    return sum(it.count * it.channels**2 for dims in shape.layers for it in outputs_of(dims, kv_groups))


def least_squares(outputs: int, channels: int, kept: int) -> Operations:
    """Of one output projection: its problem on two sets of tokens, a weight for each ridge and its error, and the
    weight on all tokens with the errors before and after.
    """
    return least_squares_for(outputs, channels, kept, problems=2, ridges=RIDGES + 1, errors=RIDGES + 2)


def least_squares_for(outputs: int, channels: int, kept: int, *, problems: int, ridges: int, errors: int) -> Operations:
    """Of problems that are set up, weights that are solved for, and errors that are computed, all in float64; where
    ranks have the same problem, they share its ridges.
    """
    solved = cholesky(kept) + 2 * kept**2 * outputs
    own = problems * 2 * outputs * channels**2 + errors * 2 * outputs * kept**2
    return Operations(float64=ridges * solved, own_float64=own)


def cholesky(size: int) -> float:
    return size**3 / 3


def dense_refit(
    dense: ModelShape, kept: ModelShape, windows: Windows, *, kv_groups: bool, dropped: Sequence[int] = ()
) -> Operations:
    """A pass through the dense model with the Gram matrices of the layers that stay, and their least squares.

    Args:
        dropped: numbers of layers that go; the pass ends with the last that stays.
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
    """A token's operations up to what experts' down projections read, which the layer's own forward doesn't show."""
    routed = 0 if dims.experts is None else dims.experts.chosen * dims.experts.width
    return 2 * dims.row_projections * dims.hidden_size * routed


def sequential_refit(
    dense: ModelShape, kept: ModelShape, windows: Windows, *, kv_groups: bool, whole_mlp: bool = False
) -> Operations:
    """A pass through both models, every block fitted towards the dense one's hidden states on the way."""
    tokens, length = windows.tokens, windows.length
    # Of the dense model one window besides shows that blocks are residual. A layer that goes is run again behind the
    # block that makes up for it.
    gone = dense.layers[len(kept.layers) :]
    flops = Operations(tokens * (forward_of_all(dense, length) + sum(forward(dims, length) for dims in gone)))
    for whole, left in zip(dense.layers, kept.layers, strict=False):
        flops += Operations(length * forward(whole, length) + tokens * forward(left, length))
        if kv_groups:
            target = attention_block(whole, length)
            read = attention_block(left, length) - 2 * left.attention_size * left.hidden_size
            flops += Operations(tokens * (target + read))
            flops += _fitted_to_targets(left.hidden_size, left.attention_size, tokens)
        read = 2 * left.row_projections * left.hidden_size * left.intermediate_size
        flops += Operations(tokens * (mlp_block(whole) + read))
        flops += _fitted_to_targets(left.hidden_size, left.intermediate_size, tokens)
        if whole_mlp:
            flops += steps(left, windows)
    return flops


def _fitted_to_targets(outputs: int, kept: int, tokens: int) -> Operations:
    """Of least squares on vectors of what the projection reads and what it lacks to its targets."""
    size = kept + outputs
    return Operations(float32=tokens * (2 * kept * outputs + gram(size))) + least_squares(outputs, size, kept)


def steps(dims: Dimensions, windows: Windows) -> Operations:
    """Of Gauss-Newton on a pruned MLP: the first on the windows that are not held out, which these judge, and one on
    all.
    """
    flops = Operations(STEP_LENGTHS * windows.held_out * mlp_block(dims))
    for tokens, iterations in zip((windows.fitted, windows.tokens), ITERATIONS, strict=True):
        flops += _step(dims, tokens, iterations)
    return flops


def _step(dims: Dimensions, tokens: int, iterations: int) -> Operations:
    """Around some weights: gate and up, the Gram matrix of inputs, the residual; then four products forward and four
    backward in each iteration, one less of each without a gate. Preconditioners are inverted once.
    """
    outputs, kept, rows = dims.hidden_size, dims.intermediate_size, dims.row_projections
    product = 2 * outputs * kept
    preconditioned = rows * 2 * kept * outputs**2 + 2 * outputs * kept**2
    return Operations(
        products=tokens * (rows + 1 + (rows + 2) * (1 + 2 * iterations)) * product,
        float32=tokens * gram(outputs),
        own_float32=(iterations + 1) * preconditioned,
        own_float64=inverse(outputs) + inverse(kept),
    )


def inverse(size: int) -> float:
    """Of a symmetric matrix by its Cholesky factor."""
    return cholesky(size) + 2 * size**3 / 3


def low_rank(dense: ModelShape, kept: ModelShape, windows: Windows) -> Operations:
    """Of compressing a model layer after layer: the windows go through each layer as it is and as it becomes, one
    micro-batch through it as it is once more; and of the factors of its attention, which ranks share.
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
    """Of W W^T, about nine cubes for its eigenvectors, and a factor's product with W."""
    return 2 * outputs**2 * inputs + 9 * outputs**3 + 2 * rank * outputs * inputs


def elimination(outputs: int, channels: int) -> float:
    """Of removing all channels one after another (core.elimination): the inverse of their Gram matrix, W^T F W, and
    the products that shrink both matrices, 64 channels at a time; rows that are read meanwhile are corrected by the
    products that wait.
    """
    curvature = 2 * outputs**2 * channels + 2 * outputs * channels**2
    shrinking = 3 * 2 * channels**3 / 3
    return inverse(channels) + curvature + shrinking


def second_moments(shape: ModelShape, windows: Windows, *, kv_groups: bool) -> Operations:
    """A pass through the model with Gram matrices of what output projections read, and an elimination of each."""
    sizes = [(dims.hidden_size, channels) for dims in shape.layers for channels in channels_of(dims, kv_groups)]
    return Operations(
        products=windows.tokens * forward_of_all(shape, windows.length),
        float32=windows.tokens * sum(gram(channels) for _, channels in sizes),
        float64=sum(elimination(outputs, channels) for outputs, channels in sizes),
    )
