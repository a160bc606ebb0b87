"""Layers with the same forward, on CPUs bit for bit, and a cheaper backward (see ``core.memory_efficient``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm as fused_rms_norm
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hfprune_dist.checkpoints.families import Family
from hfprune_dist.core.memory_efficient import frozen_linear, gated_product, rms_norm

SILU = tuple({type(ACT2FN[name]) for name in ("silu", "swish")})
# Whether torch has one kernel for a norm's forward on GPUs and one for its backward; ours and transformers' take many.
# If it hasn't, autograd would keep float32 copies, which kinds.memory doesn't count.
FUSES_NORMS = hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def use_memory_efficient_backward(model: nn.Module, family: Family) -> None:
    """Make norms and gated MLPs that compute the same as Llama's use our backward; others stay as they are."""
    replace_norms(model)
    for layer in family.layers_of(model):
        for mlp in layer.get_submodule(family.mlp).modules():
            if _computes_as(mlp, LlamaMLP) and isinstance(mlp.act_fn, SILU):
                mlp.forward = partial(_run_mlp, mlp)


def replace_norms(model: nn.Module) -> None:
    """Make norms that compute the same as Llama's cheaper; on a CPU, their weights get no gradient then."""
    for module in model.modules():
        if _computes_as(module, LlamaRMSNorm):
            module.forward = partial(_normalize, module)


def keep_no_gathered_weights(model: nn.Module) -> None:
    """Make a frozen, sharded model's linear layers gather their weights again for backward.

    torch's own layers would hold the weights that were gathered for forward until backward.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_project, module)  # type: ignore[method-assign]


def checkpoint_activations(model: nn.Module, family: Family) -> None:
    """Keep only each layer's input for backward, and run the layer again then: less memory, one more forward.

    The first layer stays as it is: it has little to keep, since the graph begins inside it.
    """
    for layer in family.layers_of(model)[1:]:
        layer.forward = partial(_run_checkpointed, layer.forward)


def branch_off(model: nn.Module, family: Family) -> None:
    """Sum the gradients of each MLP's or norm's input separately, before adding those of other readers of the same
    tensor, as DeepSpeed's hooks do in a sharded model. The input of a mixture of experts goes to several of its parts.
    """
    parts = {part for layer in family.layers_of(model) for part in _branching(layer.get_submodule(family.mlp))}
    for module in model.modules():
        if module in parts or type(module).__name__.endswith("Norm"):
            module.register_forward_pre_hook(view_input)


def _branching(mlp: nn.Module) -> list[nn.Module]:
    """An MLP, with its parts if it is a mixture of experts."""
    is_mixture = any(hasattr(part, "_apply_gate") for part in mlp.children())
    return [part for part in mlp.modules() if not isinstance(part, nn.Linear)] if is_mixture else [mlp]


def view_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hook before a module's forward: give it a view of its input, whose gradients from inside it are summed apart."""
    return inputs[0].view_as(inputs[0]), *inputs[1:]


def _computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether a module's forward is that of a transformers class, which many architectures copy."""
    codes = [getattr(kind.forward, "__code__", None) for kind in (type(module), known)]
    ours, theirs = ((code.co_code, code.co_names, code.co_consts) if code else None for code in codes)
    return ours == theirs is not None


def _project(layer: nn.Linear, x_NC: Tensor) -> Tensor:
    return frozen_linear(x_NC, layer.weight, layer.bias)


def _normalize(norm: Any, x_NC: Tensor) -> Tensor:
    if x_NC.is_cuda and (FUSES_NORMS or norm.weight.requires_grad):
        output_NC: Tensor = norm.weight * fused_rms_norm(x_NC, norm.weight.shape, eps=norm.variance_epsilon)
        return output_NC
    return rms_norm(x_NC, norm.weight, norm.variance_epsilon)


def _run_mlp(mlp: Any, x_NC: Tensor) -> Tensor:
    output_NC: Tensor = mlp.down_proj(gated_product(mlp.gate_proj(x_NC), mlp.up_proj(x_NC)))
    return output_NC


def _run_checkpointed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
