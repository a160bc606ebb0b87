"""Models sharded over all ranks with DeepSpeed ZeRO-3, and what we change inside DeepSpeed for them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.read_tensors import open_weights, read_module_tensor
from hfprune_dist.checkpoints.stored_names import module_tensors
from hfprune_dist.distributed.world import World
from hfprune_dist.models.loading import load_causal_lm, stays_float32


def init_deepspeed(world: World) -> None:
    """Make DeepSpeed use the process group that the world has joined."""
    # Or it would compile a shared-memory all-reduce, which only its inference engine uses: half a minute.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo")


def load_frozen(checkpoint: Path, dtype: torch.dtype, world: World) -> tuple[nn.Module, Callable[[], None]]:
    """Load a checkpoint, sharded over the world; none of its parameters needs a gradient.

    Run the returned module itself: its hooks gather and release parameters, in forward and backward. Blocks of experts
    are hooked like all other modules: otherwise some would be gathered as a whole, and gradients of their parts would
    be added up in another order. ``torch.nn.functional.linear`` stays torch's: DeepSpeed's rounds before it adds a
    bias. A forward without gradients keeps no weight in any case, and for backward there is
    ``models.memory_efficient_backward``.

    Returns:
        The module, and a function to call before each forward of only a part of it.
    """
    sharded = {"stage": 3, "overlap_comm": True, "contiguous_gradients": False, "leaf_module": {"classes": []}}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for one; nothing here depends on it
        "zero_optimization": sharded | {"memory_efficient_linear": False},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    init_deepspeed(world)
    keep_alive = HfDeepSpeedConfig(config)  # from_pretrained shards while such an object exists
    model = load_causal_lm(checkpoint, dtype)
    del keep_alive
    model.requires_grad_(False)
    model.config.use_cache = False
    engine, *_ = deepspeed.initialize(model=model, config=config)
    _shorten_timeouts()
    module: nn.Module = engine.module
    if dtype != torch.float32:
        keep_float32(module, open_checkpoint(checkpoint), world.device)
    gc.freeze()  # otherwise Python walks all modules and parameters again and again
    # DeepSpeed learns the order of layers in one step and gathers ahead in the next. It takes a forward of the whole
    # module for the beginning of a step; if only a part is run, no second step would ever begin.
    return module.eval(), engine.optimizer.get_param_coordinator().reset_step


def _shorten_timeouts() -> None:
    """Give all process groups the timeout that the ranks joined with: DeepSpeed makes some of half an hour, which they
    keep in a release of torch that sets none of a group that is there.
    """
    c10d: Any = dist.distributed_c10d
    if hasattr(c10d, "_set_pg_timeout"):
        timeout = c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
        for group in c10d._world.pg_map:
            c10d._set_pg_timeout(timeout, group)


def keep_float32(module: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
    """Keep in float32 here, too, what transformers keeps in it, such as routers: whole on every rank.

    DeepSpeed has one dtype for all parameters, and rounded routers would choose other experts.
    """
    with open_weights(checkpoint) as read:
        for name, sources in module_tensors(checkpoint).items():
            if stays_float32(checkpoint, name):
                owner, _, part = name.rpartition(".")
                whole = read_module_tensor(read, sources).to(device, torch.float32)
                vars(module.get_submodule(owner))["_parameters"].pop(part, None)
                module.get_submodule(owner).register_buffer(part, whole, persistent=False)


def gathered(linears: Sequence[nn.Linear]) -> AbstractContextManager[None]:
    """A context in which sharded linear layers have their whole weights and biases."""
    parameters = [parameter for linear in linears for parameter in linear.parameters(recurse=False)]
    gathering: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parameters)
    return gathering


def before_backward(model: nn.Module) -> Callable[[], None]:
    """Call after a forward; returns a function that readies the model's hooks for one more backward of that forward.

    DeepSpeed counts how often each module's parameters are to be gathered and released in backward, and counts down
    to zero in the first one: a second backward over the same graph would find the parameters gone.
    """
    counters = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
    counts = [
        (module, name, vars(module)[name]) for module in model.modules() for name in counters if name in vars(module)
    ]

    def restore_counts() -> None:
        for module, name, count in counts:
            setattr(module, name, count)

    return restore_counts
