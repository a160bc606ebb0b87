"""Placement of the scored model's weights: sharded over all ranks, or whole on each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.distributed.frozen_model import DecidedSharding, load_whole, release_whole
from hfprune_dist.distributed.world import World
from hfprune_dist.models.memory_efficient_backward import branch_off

WeightAndBias = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Placed:
    """A frozen model, ready for backward passes to its activations, with the same bits in either placement.

    Attributes:
        module: the Hugging Face model. If it is sharded, its forwards and backwards are collectives.
        head: returns a context that provides the head's whole weight [vocabulary, hidden_size] and bias while it lasts.
        before_backward: called after a forward; the function that it returns is called before each backward.
        release: frees the memory of the weights.
    """

    module: nn.Module
    head: Callable[[], AbstractContextManager[WeightAndBias]]
    before_backward: Callable[[], Callable[[], None]]
    release: Callable[[], None]


def load_placed(
    checkpoint: Checkpoint, dtype: torch.dtype, micro_batch_size: int, sharding: DecidedSharding, world: World
) -> Placed:
    """Load a checkpoint; collective."""
    family = checkpoint.family
    if sharding != "zero3":
        module = load_whole(checkpoint, dtype, world)
        branch_off(module, family)
        head = family.head_of(module)
        return Placed(
            module=module,
            head=lambda: nullcontext((head.weight.data, None if head.bias is None else head.bias.data)),
            before_backward=lambda: lambda: None,
            release=partial(release_whole, module),
        )
    # DeepSpeed takes long to import, and one rank doesn't need it.
    from hfprune_dist.distributed.zero3 import before_backward, empty_shards, gathered, load_frozen

    module = load_frozen(checkpoint.path, dtype, micro_batch_size, world, family.body_of)
    return Placed(
        module=module,
        head=partial(gathered, family.head_of(module)),
        before_backward=partial(before_backward, module),
        release=partial(empty_shards, module),
    )
