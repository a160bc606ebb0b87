"""Mixtures of experts for passes over windows: one expert after another, with activations that hooks can see.

transformers runs all experts of a layer at once, in kernels that hooks can't see into. Here, each expert that has
tokens passes its activations through a module, the layer's ``ExpertProjections``, which has the role that ``down_proj``
has in an MLP. The weights stay where they are: a sharded model gathers the weights of all experts of a layer together,
whatever tokens a rank has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from hfprune_dist.checkpoints.families import Family
from hfprune_dist.core.memory_efficient import frozen_linear, gated_product, routed, summed_per_token
from hfprune_dist.errors import UserError
from hfprune_dist.models.memory_efficient_backward import SILU
from hfprune_dist.models.single_layer import output_of, part_of, read_by
from hfprune_dist.structures.units import Units

# The name of this implementation in transformers' dispatch.
_IMPLEMENTATION = "hfprune_one_by_one"
_PROJECTIONS = "seen_down_proj"


class ExpertProjections(nn.Module):
    """The down projections of a layer's experts, as a module without weights of its own.

    Attributes:
        in_features: number of channels of one expert.
        experts: number of experts.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self._owner = (experts,)  # not as a module within this one
        weight = experts.down_proj
        self.in_features = getattr(weight, "ds_shape", weight.shape)[1 if experts.is_transposed else 2]
        self.experts = experts.num_experts

    def forward(self, hidden_ND: Tensor, expert: int, _weights_N: Tensor) -> Tensor:
        """Project an expert's activations [tokens, in_features] to its output [tokens, hidden_size].

        Args:
            _weights_N: factors by which the output will be multiplied; not used here, but seen by hooks.
        """
        (experts,) = self._owner
        bias = experts.down_proj_bias if experts.has_bias else None
        return frozen_linear(hidden_ND, experts.down_proj, bias, expert, experts.is_transposed)


def see_experts(model: nn.Module, family: Family) -> list[ExpertProjections | None]:
    """Make a frozen model run its experts one after another; models without experts stay as they are.

    Returns:
        For every layer, its experts' projections; None if it has no experts.

    Raises:
        UserError: if experts compute something unknown.
    """
    found: list[ExpertProjections | None] = []
    for layer in family.layers_of(model):
        projections = None
        experts: Any = next((module for module in layer.modules() if hasattr(module, "_apply_gate")), None)
        if experts is not None:
            _require_known(experts)
            projections = ExpertProjections(experts)
            experts.add_module(_PROJECTIONS, projections)
            experts.config._experts_implementation = _IMPLEMENTATION
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


def _run(experts: Any, hidden_NC: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The output of a layer's experts for its tokens [tokens, hidden_size].

    Args:
        index_NK: the experts of each token.
        weights_NK: factors by which these experts' outputs are multiplied.
    """
    order_S, weights_S, parts = _of_each(experts, hidden_NC, index_NK, weights_NK)
    down = getattr(experts, _PROJECTIONS)
    outputs = [
        down(_activations(experts, x_NC, expert), expert, of_N)
        for expert, (x_NC, of_N) in enumerate(parts)
        if len(x_NC)
    ]
    weighted_SC = torch.cat(outputs) * weights_S[:, None]
    return summed_per_token(weighted_SC, order_S, len(hidden_NC)).to(hidden_NC.dtype)


def _of_each(
    experts: Any, hidden_NC: Tensor, index_NK: Tensor, weights_NK: Tensor
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Order and weights of all experts' inputs; and for each expert its inputs [tokens, hidden_size] and weights."""
    index_S = index_NK.flatten()
    order_S = index_S.argsort(stable=True)
    firsts_E = torch.arange(experts.num_experts + 1, device=index_S.device)
    counts = torch.searchsorted(index_S[order_S], firsts_E).diff().tolist()  # unlike bincount, one wait for a GPU
    weights_S = weights_NK.flatten()[order_S]
    parts = zip(routed(hidden_NC, order_S).split(counts), weights_S.split(counts), strict=True)
    return order_S, weights_S, list(parts)


@torch.no_grad()
def weighted_activations(experts: Any, hidden_NC: Tensor, index_NK: Tensor, weights_NK: Tensor) -> list[Tensor]:
    """The inputs of the down projections of a layer's experts, multiplied for each token by the weight of the expert's
    output: so what a projection loses of these, the layer's output loses.

    Args:
        experts: the module that holds all experts; the other arguments are its inputs (see ``_run``).

    Returns:
        For each expert, float32 [tokens, channels], for the tokens that it was given.

    Raises:
        UserError: as ``see_experts`` does.
    """
    _require_known(experts)
    _, _, parts = _of_each(experts, hidden_NC, index_NK, weights_NK)
    return [
        _activations(experts, x_NC, expert).float() * of_N.float()[:, None] for expert, (x_NC, of_N) in enumerate(parts)
    ]


def down_projections(experts: Any) -> list[Tensor]:
    """The down projection of each expert [hidden_size, channels], as views of the module's weights."""
    return [weight.T if experts.is_transposed else weight for weight in experts.down_proj.data]


def _activations(experts: Any, x_NC: Tensor, expert: int) -> Tensor:
    """The input of an expert's down projection [tokens, channels of an expert]."""
    bias = experts.gate_up_proj_bias if experts.has_bias else None
    made_ND = frozen_linear(x_NC, experts.gate_up_proj, bias, expert, experts.is_transposed)
    has_own_gate = type(experts)._apply_gate.__module__ != moe.__name__
    if not has_own_gate and isinstance(experts.act_fn, SILU):
        return gated_product(*made_ND.chunk(2, dim=-1))
    gated_ND: Tensor = experts._apply_gate(made_ND)
    return gated_ND


def output_weights(layer: nn.Module, units: Units) -> list[Tensor]:
    """Weights [hidden_size, channels] that read the units' channels: one for each expert, or a single one."""
    if units.experts > 1:
        return down_projections(part_of(layer, units.output))
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


moe.ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _run)
