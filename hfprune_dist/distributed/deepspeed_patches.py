"""Everything that we change inside DeepSpeed, or that DeepSpeed changes inside torch, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn


def skip_inference_kernels() -> None:
    """Keep DeepSpeed from compiling a shared-memory all-reduce; to be called before ``deepspeed.init_distributed``.

    Only DeepSpeed's inference engine uses it. Compiling takes half a minute, and a compiler that not every node has.
    """
    deepspeed.ops.__compatible_ops__ = {}


@contextmanager
def torchs_linear_afterwards() -> Iterator[None]:
    """Undo, when the context ends, what loading a sharded model for training does to ``torch.nn.functional.linear``.

    DeepSpeed replaces it for the whole process, and never puts it back. Its version keeps no gathered weights for
    backward, as training needs, but rounds before it adds a bias: what runs later in the process would have other bits
    than in a process that trained nothing. Frozen models do without it (``zero3.zero3_config``).
    """
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def begin_steps_at(part: nn.Module, engine: Any) -> None:
    """Make every forward of a part of the engine's module begin a step.

    DeepSpeed learns the order of layers in one step and gathers ahead in the next. It takes a forward of the whole
    module for the beginning of a step; if only the part is run, no second step would ever begin.
    """
    coordinator = engine.optimizer.get_param_coordinator()
    part.register_forward_pre_hook(lambda *_: coordinator.reset_step(), prepend=True)


def rearming(model: nn.Module) -> Callable[[], None]:
    """Call after a forward; returns a function that readies the model's hooks for one more backward of that forward.

    DeepSpeed counts how often each module's parameters are to be gathered and released in backward, and counts down
    to zero in the first one: a second backward over the same graph would find the parameters gone.
    """
    counters = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
    counts = [
        (module, name, vars(module)[name]) for module in model.modules() for name in counters if name in vars(module)
    ]

    def rearm() -> None:
        for module, name, count in counts:
            setattr(module, name, count)

    return rearm


def keep_gathered(model: nn.Module) -> None:
    """Gather a model's parameters now and after each training step, instead of for each of its modules.

    DeepSpeed's hooks take longer than small layers themselves, and would have nothing to do. All
    parameters must be below the configuration's ``stage3_param_persistence_threshold``.
    """
    first: Any = next(model.parameters())
    offload = first._z3_optimizer.parameter_offload
    offload.destroy()
    first.all_gather(offload.persistent_parameters)


def before_each_step(model: nn.Module, action: Callable[[], None]) -> None:
    """Call an action before each optimizer step of a model in training, while its gradients are still there.

    For accelerate, a backward and the step after it are one call, and gradients are gone when that returns.
    """
    first: Any = next(it for it in model.parameters() if it.requires_grad)
    optimizer = first._z3_optimizer
    step = optimizer.step

    def stepping(*arguments: Any, **keywords: Any) -> Any:
        action()
        return step(*arguments, **keywords)

    optimizer.step = stepping


def empty_shards(model: nn.Module) -> None:
    """Free the memory of a sharded model's weights: DeepSpeed holds on to the model for ever."""
    parameters: Iterable[Any] = model.parameters()
    for parameter in parameters:
        parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)


def limit_timeouts() -> None:
    """Give all process groups the timeout that the ranks joined with: DeepSpeed makes some of half an hour."""
    joined: Any = dist.distributed_c10d._get_default_group()
    timeout = joined._get_backend(torch.device("cpu")).options._timeout
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
