"""Models sharded over all ranks with DeepSpeed ZeRO-3."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.parallel.world import World


def zero3_config(dtype: torch.dtype, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed configuration for frozen models: parameters sharded, gathered layer by layer when used."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": False},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def init_deepspeed(world: World) -> None:
    """Let DeepSpeed use the process group that the world has joined."""
    # DeepSpeed would compile a shared-memory all-reduce that its inference engine alone uses: half a minute, and a
    # compiler that not every node has.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo")


def load_frozen(
    checkpoint: Path,
    dtype: torch.dtype,
    micro_batch_size: int,
    world: World,
    body_of: Callable[[nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """Load a checkpoint sharded over the world, with no parameter that needs a gradient.

    Run the returned module itself: its hooks gather and release parameters, forward and backward.

    Args:
        body_of: the part of the module whose forwards will be run in place of the module's. DeepSpeed learns the order
            of layers in one step and gathers ahead in the next; a step begins with a forward of the whole module, or
            of this part.
    """
    config = zero3_config(dtype, micro_batch_size)
    init_deepspeed(world)
    keep_alive = HfDeepSpeedConfig(config)  # from_pretrained shards while such an object exists
    model = load_causal_lm(checkpoint, dtype)
    del keep_alive
    model.requires_grad_(False)
    model.config.use_cache = False
    engine, *_ = deepspeed.initialize(model=model, config=config)
    module: nn.Module = engine.module
    if body_of is not None:
        coordinator = engine.optimizer.get_param_coordinator()
        body_of(module).register_forward_pre_hook(lambda *_: coordinator.reset_step(), prepend=True)
    gc.freeze()  # else Python walks all modules and parameters again and again
    return module.eval()


def release_shards(model: nn.Module) -> None:
    """Give the memory of a sharded model's weights back; it can't be used any more, but DeepSpeed holds on to it."""
    parameters: Iterable[Any] = model.parameters()
    for parameter in parameters:
        parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)


def rearming(model: nn.Module) -> Callable[[], None]:
    """Call it after a forward; what it returns readies the model's hooks for one more backward of that forward.

    DeepSpeed counts how often each module's parameters are to be gathered and released in backward, and counts down
    to nothing in the first one: a second backward over the same graph would find the parameters gone.
    """
    counters = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
    counts = [
        (module, name, vars(module)[name]) for module in model.modules() for name in counters if name in vars(module)
    ]

    def rearm() -> None:
        for module, name, count in counts:
            setattr(module, name, count)

    return rearm


@contextmanager
def gathered(linear: nn.Linear) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The whole weight and bias of a sharded linear layer, for as long as the context lasts."""
    with deepspeed.zero.GatheredParameters(list(linear.parameters(recurse=False))):
        yield linear.weight.data, None if linear.bias is None else linear.bias.data
