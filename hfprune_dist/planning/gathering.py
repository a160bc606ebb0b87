"""What of a sharded model DeepSpeed has gathered at a time, and the work of attention, which no weight has."""

from __future__ import annotations

from hfprune_dist.planning.dimensions import Dimensions

# DeepSpeed's defaults: parameters that may be gathered at a time, and those too small to be sharded, in elements.
LIVE_PARAMETERS = 1_000_000_000
SMALL_PARAMETER = 100_000


def gathered_at_a_time(dims: Dimensions, itemsize: int, ranks: int) -> float:
    """Bytes of gathered parameters that DeepSpeed holds; one rank alone holds all as its own."""
    return 0.0 if ranks == 1 else min(dims.parameters, LIVE_PARAMETERS + dims.head_parameters) * itemsize


def stays_gathered(dims: Dimensions) -> bool:
    """Whether DeepSpeed keeps what it has gathered in forward until backward is over."""
    return dims.parameters <= LIVE_PARAMETERS


def attention_flops(dims: Dimensions, tokens: int) -> float:
    """A token's share of both products of causal attention in all layers, forward."""
    return dims.num_layers * 2 * tokens * dims.num_heads * dims.head_size
