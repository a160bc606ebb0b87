"""The cost of a token: floating-point operations, bytes of cache and parameters, computed from tensors' shapes.

Layers may differ in width and heads, because every number is a sum over the tensors of a checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.discovery import by_layer
from hfprune_dist.structures.low_rank import linear_modules


@dataclass(frozen=True)
class TokenCosts:
    """Costs of one token in a model in which every layer with attention attends to all previous tokens; states that
    layers carry along in place of keys and values aren't counted.

    Attributes:
        parameters: of the whole model; a head tied to the embedding counts once.
        active_parameters: those that a token's output is computed with: all except those of experts not chosen.
        multiplied: those that a token's vectors are multiplied by, including the head's.
        query_channels, value_channels: of all heads in all layers: those multiplied by keys, and those added up.
        cached_channels: of the keys and values in all layers, or of latent vectors in their place.
    """

    parameters: int
    active_parameters: int
    multiplied: int
    query_channels: int
    value_channels: int
    cached_channels: int

    def flops(self, context: int) -> int:
        """Floating-point operations of one token's forward, with attention to ``context`` tokens, itself included."""
        return 2 * (self.multiplied + context * (self.query_channels + self.value_channels))


def token_costs(checkpoint: Checkpoint) -> TokenCosts:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    of_layers = by_layer(checkpoint.config, shapes, checkpoint.family.layers)
    table = checkpoint.tensors[checkpoint.family.embedding_tensor].numel
    idle, parameters = _idle(checkpoint), checkpoint.parameters
    in_layers = sum(math.prod(shape) for there in of_layers for shape in there.values())
    channels = zip(*(_channels_of(checkpoint, there) for there in of_layers), strict=True)
    return TokenCosts(parameters, parameters - idle, in_layers - idle + table, *map(sum, channels))


def training_flops(
    checkpoint: Checkpoint, tokens: int, *, in_place: bool = False, teacher: Checkpoint | None = None
) -> int:
    """Operations that training takes for each token of rows of ``tokens`` tokens.

    A backward to activations takes as many operations as a forward, and one to weights that are trained ``in_place`` as
    many again; LoRA's own products, about a hundredth, are left out, and so is what parts of a model save; causal
    attention is to half a row on average. A dense model beside it, as ``teacher``, adds its forward.
    """
    flops = (3 if in_place else 2) * token_costs(checkpoint).flops(tokens // 2)
    flops += 0 if teacher is None else token_costs(teacher).flops(tokens // 2)
    return flops


def _idle(checkpoint: Checkpoint) -> int:
    """Parameters, in all layers, of the experts that a token isn't given to."""
    experts, units = checkpoint.family.experts, checkpoint.units
    if experts is None:
        return 0
    names = {name for layer in experts.layers for name in units.in_layer(layer, checkpoint.tensors)}
    # The biases of down projections belong to no neuron.
    names |= {name for name in checkpoint.tensors if name.endswith("experts.down_proj_bias")}
    sizes = sum(checkpoint.tensors[name].numel for name in names)
    return sizes // experts.count * (experts.count - experts.chosen)


def _channels_of(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int, int]:
    """Channels of a layer's queries, values and cache; zeros if it has no attention or carries a state along."""
    family, config = checkpoint.family, checkpoint.family.completed(checkpoint.config)
    block, projections = family.attention, family.attention_modules
    if any(re.match(r"(self_attn|attention)\.(\w+\.)?A_log$", name) for name in shapes):
        return 0, 0, 0
    if latent := shapes.get(f"{block}.kv_a_proj_with_mqa.weight"):  # one vector stands for keys and values of all heads
        queries = shapes.get(f"{block}.q_b_proj.weight") or shapes[f"{block}.q_proj.weight"]
        return queries[0], shapes[f"{block}.o_proj.weight"][1], latent[0]
    if not projections:
        channels = config["num_attention_heads"] * config["head_dim"]
        return channels, channels, 2 * config["num_key_value_heads"] * config["head_dim"]
    _, key, value, output = (linear_modules(name, checkpoint.ranks) for name in projections)
    if f"{key[-1]}.weight" not in shapes:
        return 0, 0, 0
    keys = shapes[f"{key[-1]}.weight"][0]
    values = shapes.get(f"{value[-1]}.weight", (keys,))[0]  # without a projection, keys are values too
    summed = shapes[f"{output[0]}.weight"][1]  # a projection of queries may make a gate too
    return summed * keys // values, summed, keys + values
