"""Mixtures of experts for passes over windows, with activations that hooks can see.

As in transformers, one product computes all experts of a layer, of as many tokens as each has, but in functions that
hooks can't see into. Here, the activations of all pass through a module, the layer's ``ExpertProjections``, which has
the role that ``down_proj`` has in an MLP. The weights stay where they are: a sharded model gathers the weights of all
experts of a layer together, whatever tokens a rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers.integrations import moe

from hfprune_dist.checkpoints.families import Family
from hfprune_dist.core.memory_efficient import gated_product, routed, summed_per_token
from hfprune_dist.errors import UserError
from hfprune_dist.models.memory_efficient_backward import SILU
from hfprune_dist.models.single_layer import output_of, part_of, read_by
from hfprune_dist.structures.units import Units


class ExpertProjections(nn.Module):
    """The down projections of a layer's experts, as a module without weights of its own."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self._owner = (experts,)  # not as a module within this one

    def forward(self, hidden_SD: Tensor, expert_S: Tensor, weights_S: Tensor, routes: _Routes) -> Tensor:
        """Project experts' activations [tokens, channels] to outputs [tokens, hidden_size]. ``routes`` has the experts
        and weights too; they are arguments so that hooks see them.
        """
        (experts,) = self._owner
        biases = experts.down_proj_bias if experts.has_bias else None
        return _grouped_linear(hidden_SD, experts.down_proj, biases, routes, experts.is_transposed)


def see_experts(model: nn.Module, family: Family) -> list[ExpertProjections | None]:
    """Make a frozen model run its experts in view of hooks; models without experts stay as they are. Return for every
    layer its experts' projections, None if it has no experts; experts that compute something unknown are refused.
    """
    found: list[ExpertProjections | None] = []
    for layer in family.layers_of(model):
        projections = None
        experts: Any = next((module for module in layer.modules() if hasattr(module, "_apply_gate")), None)
        if experts is not None:
            _require_known(experts)
            projections = ExpertProjections(experts)
            experts.forward = partial(_run, experts, projections)
            if hasattr(experts.down_proj, "ds_shape"):  # sharded
                experts.register_forward_pre_hook(_in_graph, prepend=True)
        found.append(projections)
    return found


def _require_known(experts: Any) -> None:
    if not experts.has_gate or experts.has_post_expert_norm:
        kind = type(experts).__name__
        raise UserError(f"{kind}: experts that have no gate, or a norm of their own, can't be scored, nor refitted")


def _in_graph(_experts: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The inputs of experts, with a gradient even if the graph would begin inside the experts.

    DeepSpeed releases a module's weights when its inputs have their gradients: if they got none, it would keep all
    weights of a layer's experts from their backward until the next forward.
    """
    if inputs[0].requires_grad or not torch.is_grad_enabled():
        return None
    return inputs[0].detach().requires_grad_(), *inputs[1:]


class _Routes(NamedTuple):
    """Which experts see which tokens, S pairs in the order of the experts.

    Attributes:
        order_S: the permutation of ``routed``.
        expert_S: the expert of each pair.
        ends_E: int32, where the pairs of each expert end.
        weights_S: factors by which experts' outputs are multiplied.
    """

    order_S: Tensor
    expert_S: Tensor
    ends_E: Tensor
    weights_S: Tensor

    @classmethod
    def of_tokens(cls, experts: int, index_NK: Tensor, weights_NK: Tensor) -> _Routes:
        order_S = index_NK.flatten().argsort(stable=True)
        expert_S = index_NK.flatten()[order_S]
        numbers_E = torch.arange(experts, device=expert_S.device)
        ends_E = torch.searchsorted(expert_S, numbers_E, right=True, out_int32=True)
        return cls(order_S, expert_S, ends_E, weights_NK.flatten()[order_S])


class _GroupedLinear(Function):
    """``frozen_linear`` with the weights and biases of each row's expert; keeps the one tensor of all weights."""

    @staticmethod
    def forward(
        ctx: Any, x_SC: Tensor, weights: Tensor, biases: Tensor | None, routes: _Routes, is_transposed: bool
    ) -> Tensor:
        ctx.weights, ctx.ends_E, ctx.is_transposed = weights, routes.ends_E, is_transposed
        biases_SD = None if biases is None else biases[routes.expert_S]
        return product_by_experts(x_SC, weights, routes.ends_E, biases_SD, is_transposed)

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient_SC = product_by_experts(gradient_SD, ctx.weights, ctx.ends_E, None, not ctx.is_transposed)
        return gradient_SC, None, None, None, None


def product_by_experts(
    x_SC: Tensor, weights: Tensor, ends_E: Tensor, biases_SD: Tensor | None, is_transposed: bool
) -> Tensor:
    """Multiply rows, in the order of experts, each with its expert's weight: in the product that transformers uses, so
    that bits are those of its models; in a release without it, expert by expert, which is slower.
    """
    if hasattr(moe, "_grouped_linear"):
        product_SD: Tensor = moe._grouped_linear(x_SC, weights, ends_E, biases_SD, is_transposed)
        return product_SD
    parts = x_SC.tensor_split(ends_E[:-1].long().cpu())
    oriented = weights if is_transposed else weights.mT
    product_SD = torch.cat([part @ weight for part, weight in zip(parts, oriented, strict=True)])
    return product_SD if biases_SD is None else product_SD + biases_SD


_grouped_linear: Callable[[Tensor, Tensor, Tensor | None, _Routes, bool], Tensor] = _GroupedLinear.apply


def _run(experts: Any, down: ExpertProjections, hidden_NC: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The output of a layer's experts for its tokens [tokens, hidden_size].

    Args:
        index_NK: the experts of each token.
        weights_NK: factors by which these experts' outputs are multiplied.
    """
    routes = _Routes.of_tokens(experts.num_experts, index_NK, weights_NK)
    hidden_SD = _activations(experts, routed(hidden_NC, routes.order_S), routes)
    output_SC = down(hidden_SD, routes.expert_S, routes.weights_S, routes)
    weighted_SC = output_SC * routes.weights_S[:, None]
    return summed_per_token(weighted_SC, routes.order_S, len(hidden_NC)).to(hidden_NC.dtype)


@torch.no_grad()
def weighted_activations(experts: Any, hidden_NC: Tensor, index_NK: Tensor, weights_NK: Tensor) -> list[Tensor]:
    """The inputs of the down projections of a layer's experts, multiplied for each token by the weight of the expert's
    output: so what a projection loses of these, the layer's output loses. For each expert, they are [tokens, channels],
    of the tokens that it was given, in the model's dtype.

    Args:
        experts: the module of all experts; the other arguments are its inputs (see ``_run``).
    """
    _require_known(experts)
    routes = _Routes.of_tokens(experts.num_experts, index_NK, weights_NK)
    hidden_SD = _activations(experts, routed(hidden_NC, routes.order_S), routes)
    weighted_SD = (hidden_SD * routes.weights_S.float()[:, None]).to(hidden_SD)
    return list(weighted_SD.tensor_split(routes.ends_E[:-1].long().cpu()))


def _activations(experts: Any, x_SC: Tensor, routes: _Routes) -> Tensor:
    """The inputs of experts' down projections [tokens, channels of an expert]."""
    biases = experts.gate_up_proj_bias if experts.has_bias else None
    made_SD = _grouped_linear(x_SC, experts.gate_up_proj, biases, routes, experts.is_transposed)
    has_own_gate = type(experts)._apply_gate.__module__ != moe.__name__
    if not has_own_gate and isinstance(experts.act_fn, SILU):
        return gated_product(*made_SD.chunk(2, dim=-1))
    gated_SD: Tensor = experts._apply_gate(made_SD)
    return gated_SD


def output_weights(layer: nn.Module, units: Units) -> list[Tensor]:
    """Weights [hidden_size, channels] that read the units' channels: one for each expert, or a single one."""
    if units.experts > 1:
        experts = part_of(layer, units.output)
        return [weight.T if experts.is_transposed else weight for weight in experts.down_proj.data]
    return [output_of(layer, units).weight.data]


@contextmanager
def observing(layer: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what modules read while the layer runs once: name within the layer -> [tokens, channels], a single one,
    or for experts those of ``weighted_activations``.
    """
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        if hasattr(module, "_apply_gate"):
            seen[name] = weighted_activations(module, *inputs)
        else:
            seen[name] = [read_by(inputs, options).flatten(0, -2)]

    with ExitStack() as hooks:
        for name in names:
            handle = part_of(layer, name).register_forward_pre_hook(partial(see, name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield seen
