"""How much of a sharded model DeepSpeed gathers at a time."""

from __future__ import annotations

from hfprune_dist.planning.dimensions import Dimensions

# How many elements DeepSpeed gathers at a time, by default.
LIVE_PARAMETERS = 1_000_000_000


def gathered_at_a_time(dims: Dimensions, itemsize: int, ranks: int) -> float:
    """Bytes of gathered parameters that DeepSpeed holds; 0 on a single rank, which owns all of them.

    A layer's experts are two tensors of one module, which are gathered together, however many parameters that makes.
    """
    live = max(LIVE_PARAMETERS, dims.expert_parameters)
    return 0.0 if ranks == 1 else min(dims.parameters, live + dims.head_parameters) * itemsize
