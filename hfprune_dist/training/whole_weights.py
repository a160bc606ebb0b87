"""Training with frozen weights whole on every rank, and with the same bits as if they were sharded.

DeepSpeed then manages only the LoRA weights: it keeps their optimizer states sharded, and reduces their gradients.
"""

from __future__ import annotations

from functools import partial

from deepspeed.runtime.zero.linear import zero3_linear_wrap
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hfprune_dist.distributed.frozen_model import free_bytes
from hfprune_dist.distributed.world import World
from hfprune_dist.models.memory_efficient_backward import view_input
from hfprune_dist.planning.dimensions import checkpoint_dimensions
from hfprune_dist.planning.gpu_needs import Gpus
from hfprune_dist.planning.training_footprint import Train
from hfprune_dist.planning.training_memory import Placement, place
from hfprune_dist.training.fine_tuning import FineTuning


def place_training(task: FineTuning, world: World) -> Placement:
    """Decide together how to place a training in the free memory; the rank with the least of it decides for all."""
    tokens = len(task.rows(0)["input_ids"])
    job = Train.of(task.settings, tokens, task.distills, masks=task.masked_to is not None)
    gpus = Gpus(nodes=1, per_node=world.size, memory=min(world.all_gather(free_bytes(world))))
    return place(job, checkpoint_dimensions(task.checkpoint), gpus, task.sharding)


def with_whole_weights(model: nn.Module, world: World) -> nn.Module:
    """Prepare a model with LoRA layers so that DeepSpeed shards nothing of it but LoRA's optimizer states."""
    # ``.to()`` before ``_keep_whole``: moving buffers would untie a head that shares the embedding's weight.
    _keep_whole(model.to(world.device))
    _compute_as_sharded(model)
    return model


def _keep_whole(model: nn.Module) -> None:
    """Turn frozen parameters into buffers: DeepSpeed shards all parameters, and leaves buffers as they are."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data, persistent=False)


def _compute_as_sharded(model: nn.Module) -> None:
    """Round where DeepSpeed's hooks and linear layers make a sharded model round, so that the bits are the same.

    Gradients of what a projection or a norm reads are added up separately before the rest of the layer's are added; a
    bias is added to a product that is already rounded; products in LoRA's gradients have the same order of factors.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) or type(module).__name__.endswith(("Norm", "MLP")):
            module.register_forward_pre_hook(view_input)
        if type(module) is nn.Linear:
            trained = module.weight.requires_grad
            module.forward = partial(_train_linear if trained else _run_frozen, module)  # type: ignore[method-assign]


def _train_linear(linear: nn.Linear, x_BTC: Tensor) -> Tensor:
    output_BTC: Tensor = zero3_linear_wrap(x_BTC, linear.weight)
    return output_BTC


def _run_frozen(linear: nn.Linear, x_BTC: Tensor) -> Tensor:
    """Run a frozen layer without keeping its inputs for backward, which DeepSpeed's layer would keep."""
    product_BTC = nn.functional.linear(x_BTC, linear.weight)
    return product_BTC if linear.bias is None else product_BTC + linear.bias
