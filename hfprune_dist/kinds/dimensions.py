"""The dimensions of a decoder, from which its memory is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.structures.experts import ExpertSizes, expert_sizes, mlp_widths, number_of_experts
from hfprune_dist.structures.low_rank import linear_modules


@dataclass(frozen=True)
class Dimensions:
    """The dimensions of a decoder that decide its memory.

    ``beside_decoder``: parameters outside the text decoder, in a model of images and text.
    ``row_projections``: number of matrices that produce an MLP's neurons: gate and up, or only up.
    ``adapted_sides``: inputs and outputs, each added up over the linear layers of a layer's attention that LoRA adapts,
    on average over layers; None: those of the query, key, value and output projections.
    ``intermediate_size`` counts the neurons that compute a token, ``stored_size`` all neurons of a layer, experts that
    aren't chosen included (0: no layer of the model has experts). ``experts``: sizes of the experts, for layers that
    have some; a model's are taken to be in all layers.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    beside_decoder: int = 0
    row_projections: int = 2
    adapted_sides: tuple[float, float] | None = None
    stored_size: int = 0
    experts: ExpertSizes | None = None

    @property
    def mlp_matrices(self) -> int:
        """Number of matrices of an MLP, including its down projection."""
        return self.row_projections + 1

    @property
    def mlp_channels(self) -> list[int]:
        """Channels that each output projection of a layer's MLP reads, or of its experts and the MLP beside them."""
        if self.experts is None:
            return [self.intermediate_size]
        return [self.experts.width] * self.experts.count + [self.beside_experts] * (self.beside_experts > 0)

    @property
    def is_mixture(self) -> bool:
        """Whether any layer of the model has experts."""
        return self.stored_size > 0

    @property
    def routed_channels(self) -> int:
        """Channels of all outputs of experts for one token, which the router's weights multiply and add up."""
        return 0 if self.experts is None else self.experts.chosen * self.hidden_size

    @property
    def beside_experts(self) -> int:
        """Neurons of a layer's MLP that belong to no expert."""
        routed = 0 if self.experts is None else self.experts.chosen * self.experts.width
        return max(0, self.intermediate_size - routed)

    @property
    def attention_size(self) -> int:
        """Channels that attention's output projection reads."""
        return self.num_heads * self.head_size

    @property
    def adapted_inputs(self) -> float:
        """Inputs of all linear layers of a layer's attention that LoRA adapts, added up."""
        return self.adapted_sides[0] if self.adapted_sides else 3 * self.hidden_size + self.attention_size

    @property
    def adapted_outputs(self) -> float:
        """Outputs of the same layers."""
        if self.adapted_sides:
            return self.adapted_sides[1]
        return self.attention_size + 2 * self.num_key_value_heads * self.head_size + self.hidden_size

    @property
    def attention_parameters(self) -> int:
        return 2 * self.hidden_size * self.head_size * (self.num_heads + self.num_key_value_heads)

    def layer_weights(self, *, attention: bool) -> list[int]:
        """Sizes of one layer's matrices: the MLP's, then those of attention if requested."""
        heads = [self.num_heads] * 2 + [self.num_key_value_heads] * 2
        channels = [self.intermediate_size] * self.mlp_matrices + [it * self.head_size for it in heads if attention]
        return [self.hidden_size * it for it in channels]

    @property
    def layer_parameters(self) -> int:
        """The matrices of one layer; norms and biases are too few to matter."""
        neurons = self.stored_size or self.intermediate_size
        return self.attention_parameters + self.mlp_matrices * self.hidden_size * neurons

    @property
    def expert_parameters(self) -> int:
        """The matrices of all experts of one layer, if any layer has some."""
        neurons = 0 if self.experts is None else self.experts.count * self.experts.width
        return self.mlp_matrices * self.hidden_size * neurons

    @property
    def body_parameters(self) -> int:
        return self.num_layers * self.layer_parameters

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.head_parameters * (1 if self.tied else 2) + self.beside_decoder


def checkpoint_dimensions(checkpoint: Checkpoint) -> Dimensions:
    """The dimensions of a checkpoint's decoder."""
    dims = dimensions_of(checkpoint.config, row_projections_of(checkpoint))
    beside = sum(checkpoint.tensors[name].numel for name in checkpoint.beside_decoder)
    return replace(dims, beside_decoder=beside, adapted_sides=adapted_sides_of(checkpoint))


def adapted_sides_of(checkpoint: Checkpoint) -> tuple[float, float]:
    """See ``Dimensions.adapted_sides``."""
    family = checkpoint.family
    linears = [it for name in family.adapted_attention for it in linear_modules(name, checkpoint.ranks)]
    names = (f"{family.layers}.{layer}.{it}.weight" for layer in range(checkpoint.num_layers) for it in linears)
    shapes = [checkpoint.tensors[name].shape for name in names if name in checkpoint.tensors]
    outputs, inputs = (sum(sides) / checkpoint.num_layers for sides in zip(*shapes, strict=True))
    return inputs, outputs


def row_projections_of(checkpoint: Checkpoint) -> int:
    """Number of matrices that produce the neurons of each MLP or expert."""
    return 2 if checkpoint.family.experts else sum(checkpoint.units.row_parts)


def dimensions_of(config: Mapping[str, Any], row_projections: int = 2) -> Dimensions:
    """The dimensions that a ``config.json`` describes.

    Args:
        row_projections: see ``Dimensions``; a ``config.json`` doesn't contain it.
    """
    heads = int(config["num_attention_heads"])
    active, stored = (round(sum(it) / len(it)) for it in zip(*mlp_widths(config), strict=True))
    experts = number_of_experts(config)
    return Dimensions(
        hidden_size=int(config["hidden_size"]),
        intermediate_size=active if experts else int(config["intermediate_size"]),
        stored_size=stored if experts else 0,
        experts=next(filter(None, expert_sizes(config)), None),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        row_projections=row_projections,
    )
