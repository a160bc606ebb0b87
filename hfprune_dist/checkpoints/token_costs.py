"""The cost of a token: floating-point operations, bytes of cache and parameters, computed from tensors' shapes.

Layers may differ in width and heads, because every number is a sum over the tensors of a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.families import ATTENTION
from hfprune_dist.structures.low_rank import linear_modules


@dataclass(frozen=True)
class TokenCosts:
    """Costs of one token in a model in which every layer attends to all previous tokens.

    Attributes:
        parameters: parameters of the whole model; a head tied to the embedding counts once.
        parameters_without_embeddings: the same, without the table of embeddings and the head.
        active_parameters: parameters that a token's output is computed with: all except those of experts not chosen.
        multiplied: entries of the matrices that a token's vectors are multiplied by, including the head's.
        query_channels: channels of the queries of all heads in all layers.
        cached_channels: channels of the keys and values in all layers.
    """

    parameters: int
    parameters_without_embeddings: int
    active_parameters: int
    multiplied: int
    query_channels: int
    cached_channels: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TokenCosts:
        """The costs for a checkpoint, by its tensors."""
        family, shapes = checkpoint.family, {name: info.shape for name, info in checkpoint.tensors.items()}
        table = shapes[family.embedding_tensor()]
        tied = bool(checkpoint.config.get("tie_word_embeddings"))
        outside = math.prod(table) * (1 if tied else 2)
        dimensions = (2, 3) if family.experts else (2,)
        of_layers = (
            math.prod(shape)
            for name, shape in shapes.items()
            if name.startswith(f"{family.layers}.") and len(shape) in dimensions and "bias" not in name
        )
        idle, idle_matrices = _idle(checkpoint)
        queries, cached = _attention_channels(checkpoint)
        return cls(
            parameters=checkpoint.parameters,
            parameters_without_embeddings=checkpoint.parameters - outside,
            active_parameters=checkpoint.parameters - idle,
            multiplied=sum(of_layers) - idle_matrices + math.prod(table),
            query_channels=queries,
            cached_channels=cached,
        )

    def flops(self, context: int) -> int:
        """Floating-point operations of one token's forward pass: two for each entry that it is multiplied by, and
        attention's two products with each of ``context`` tokens, itself included. Norms, activations, biases and
        rotations are left out, as in ``torch.utils.flop_counter``.
        """
        return 2 * self.multiplied + 4 * context * self.query_channels

    def cache_bytes(self, itemsize: int) -> int:
        """Bytes that the keys and values of one token take in the cache.

        Args:
            itemsize: bytes of one number in the cache.
        """
        return self.cached_channels * itemsize


def _idle(checkpoint: Checkpoint) -> tuple[int, int]:
    """Parameters, in all layers, of the experts that a token isn't given to; and how many are entries of matrices."""
    experts, units = checkpoint.family.experts, checkpoint.units
    if experts is None:
        return 0, 0
    sizes = {
        name: checkpoint.tensors[name].numel
        for layer in experts.layers
        for name, _ in units.in_layer(layer, checkpoint.tensors)
    }
    # The biases of down projections belong to no neuron.
    sizes |= {name: it.numel for name, it in checkpoint.tensors.items() if name.endswith("experts.down_proj_bias")}
    of_matrices = sum(size for name, size in sizes.items() if "bias" not in name)
    idle = experts.count - experts.chosen
    return sum(sizes.values()) // experts.count * idle, of_matrices // experts.count * idle


def _attention_channels(checkpoint: Checkpoint) -> tuple[int, int]:
    """Channels of the queries, and of the keys and values, in all layers together."""
    family = checkpoint.family
    if family.attention_projections[:3] == ATTENTION[:3]:
        projections = family.attention_modules[:3]
        query, key, value = (f".{linear_modules(name, checkpoint.ranks)[-1]}.weight" for name in projections)
        of_layers = {name: it.shape for name, it in checkpoint.tensors.items() if name.startswith(family.layers)}
        queries, cached = (
            sum(shape[0] for name, shape in of_layers.items() if name.endswith(names))
            for names in ((query,), (key, value))
        )
        return queries, cached
    config = family.completed(checkpoint.config)
    latent, heads = config.get("kv_lora_rank"), 2 * config["num_key_value_heads"] * config["head_dim"]
    cached = int(latent) + int(config.get("qk_rope_head_dim") or 0) if latent else heads
    return checkpoint.num_layers * config["num_attention_heads"] * config["head_dim"], checkpoint.num_layers * cached
