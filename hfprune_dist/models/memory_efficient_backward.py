"""Layers with the same forward, bit for bit, and a cheaper backward (see ``core.memory_efficient``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hfprune_dist.checkpoints.families import Family
from hfprune_dist.core.memory_efficient import frozen_linear, gated_product, rms_norm

SILU = ("silu", "swish")


def use_memory_efficient_backward(model: nn.Module, family: Family) -> None:
    """Let a model's norms and gated MLPs run with backwards of ours; an MLP with another activation stays as it is."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_normalize, module)
    config: Any = model.config
    if config.hidden_act in SILU:
        for layer in family.layers_of(model):
            mlp = layer.get_submodule(family.mlp)
            gate, up = (mlp.get_submodule(name) for name in family.row_projections)
            mlp.forward = partial(_run_mlp, gate, up, mlp.get_submodule(family.down_projection))


def keep_no_gathered_weights(model: nn.Module) -> None:
    """Let a frozen, sharded model's linear layers gather their weights again for backward.

    torch's own would hold every layer's weights, as they were gathered for forward, until backward.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_project, module)  # type: ignore[method-assign]


def checkpoint_activations(model: nn.Module, family: Family) -> None:
    """Keep a layer's input alone for backward, and run the layer again there: less memory, one more forward.

    The first layer has little to keep, since the graph begins within it.
    """
    for layer in family.layers_of(model)[1:]:
        layer.forward = partial(_run_checkpointed, layer.forward)


def _project(layer: nn.Linear, x_NC: Tensor) -> Tensor:
    return frozen_linear(x_NC, layer.weight, layer.bias)


def _normalize(norm: Any, x_NC: Tensor) -> Tensor:
    return rms_norm(x_NC, norm.weight, norm.variance_epsilon)


def _run_mlp(gate: nn.Module, up: nn.Module, down: nn.Module, x_NC: Tensor) -> Tensor:
    output_NC: Tensor = down(gated_product(gate(x_NC), up(x_NC)))
    return output_NC


def _run_checkpointed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
