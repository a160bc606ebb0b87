"""The ratio of a pruned model as other papers define it; ours is relative to all parameters.

Their "20 %" refers to a different part of the model: the decoder's matrices (FLAP, LoRAP), or the matrices in the
layers that lose something (LLM-Pruner and LoRAPrune, which leave some layers unpruned).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.planning.dimensions import Dimensions, checkpoint_dimensions
from hfprune_dist.structures.units import plural_of


@dataclass(frozen=True)
class Decoder:
    """Sizes of a dense model whose layers are all alike.

    Attributes:
        matrices: number of weights in all layers' projections, without biases and norms.
    """

    matrices: int
    layers: int
    intermediate_size: int
    num_key_value_heads: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Decoder | None:
        """Sizes of a dense checkpoint; None for mixtures of experts, which those papers don't prune, and if its layers
        differ, since a ratio of some of them then says little.
        """
        comparable = checkpoint.is_plain and not checkpoint.family.experts
        return cls.of_dimensions(checkpoint_dimensions(checkpoint)) if comparable else None

    @classmethod
    def of_dimensions(cls, sizes: Dimensions) -> Decoder:
        return cls(sizes.body_parameters, sizes.num_layers, sizes.intermediate_size, sizes.num_key_value_heads)


def native_ratios(decoder: Decoder | None, removed: int | None, sizes: Mapping[str, Any]) -> dict[str, float | None]:
    """A row's ratios as other papers define them.

    Args:
        removed: number of removed parameters; None if it isn't known.
        sizes: the shape reported by the prune stage: ``intermediate_size`` or, by layer, ``intermediate_sizes``; if
            heads or layers were removed, ``num_key_value_heads`` and ``num_hidden_layers`` likewise; if attention got
            matrices of low rank, ``attention_ranks``.

    Returns:
        ``ratio_of_decoder``: removed / weights of all layers' matrices. ``ratio_of_pruned_layers``: removed / weights
        of the matrices in layers that lose something. Both are None if ``decoder`` or ``removed`` is.
    """
    if decoder is None or removed is None:
        return {"ratio_of_decoder": None, "ratio_of_pruned_layers": None}
    of_layer = decoder.matrices / decoder.layers
    pruned = _pruned_layers(decoder, sizes)
    of_pruned = removed / (of_layer * pruned) if pruned else 0.0
    return {"ratio_of_decoder": removed / decoder.matrices, "ratio_of_pruned_layers": of_pruned}


def _pruned_layers(decoder: Decoder, sizes: Mapping[str, Any]) -> int:
    """Number of layers that lose something, including those removed as a whole."""
    if sizes.get("attention_ranks"):
        return decoder.layers
    staying = sizes.get("num_hidden_layers") or decoder.layers
    widths = _by_layer("intermediate_size", sizes, staying, decoder.intermediate_size)
    groups = _by_layer("num_key_value_heads", sizes, staying, decoder.num_key_value_heads)
    whole = (decoder.intermediate_size, decoder.num_key_value_heads)
    return decoder.layers - sum(pair == whole for pair in zip(widths, groups, strict=True))


def _by_layer(field: str, sizes: Mapping[str, Any], layers: int, dense: int) -> list[int]:
    """A field's value in each remaining layer."""
    return list(sizes.get(plural_of(field)) or [sizes.get(field) or dense] * layers)
