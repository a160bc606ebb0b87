"""The dimensions of each layer of a dense or pruned decoder, from which its work is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.families import ATTENTION
from hfprune_dist.planning.dimensions import Dimensions, adapted_sides_of, dimensions_of, row_projections_of
from hfprune_dist.structures.experts import (
    ALL_WIDTHS,
    EXPERT_COUNT_KEYS,
    SHARED_WIDTHS,
    expert_sizes,
    mlp_widths,
    number_of_experts,
)
from hfprune_dist.structures.units import plural_of, read_counts

# Field of a config.json in which layers may differ -> its name in ``Dimensions``.
_HEADS = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_key_value_heads"}
_OF_LAYERS = {"intermediate_size": "intermediate_size", **_HEADS}

# Fields of a mixture of experts, whose values are the same in all layers.
_OF_EXPERTS = (*EXPERT_COUNT_KEYS, *ALL_WIDTHS, *SHARED_WIDTHS)


@dataclass(frozen=True)
class ModelShape:
    """A decoder whose layers may differ.

    Attributes:
        layers: for each layer, the dimensions of a model all of whose layers are like it.
        config: the ``config.json`` behind the shape, if it is a mixture of experts.
    """

    layers: tuple[Dimensions, ...]
    config: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelShape:
        """The shape of a checkpoint's decoder."""
        shape, sides = cls.of_config(checkpoint.config, row_projections_of(checkpoint)), adapted_sides_of(checkpoint)
        return cls(tuple(replace(dims, adapted_sides=sides) for dims in shape.layers), shape.config)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], row_projections: int = 2) -> ModelShape:
        """The shape that a ``config.json`` describes.

        Args:
            row_projections: see ``Dimensions``.

        Raises:
            KeyError, TypeError, ValueError: if it doesn't describe a known decoder.
        """
        whole = dimensions_of(config, row_projections)
        if number_of_experts(config):
            return cls._of_mixture(whole, config)
        by_layer = {ours: read_counts(config, field) for field, ours in _OF_LAYERS.items() if field in config}
        return cls._of_layers([whole] * whole.num_layers, by_layer)

    def pruned(self, metrics: Mapping[str, Any]) -> ModelShape:
        """The shape of the checkpoint that a prune stage made of this model.

        Args:
            metrics: the stage's metrics.
        """
        if self.config is not None:
            sizes = {key: metrics[key] for key in _OF_EXPERTS if metrics.get(key)}
            heads = {ours: metrics[field] for field, ours in _HEADS.items() if metrics.get(field)}
            return self._of_mixture(replace(self.layers[0], **heads), {**self.config, **sizes})
        count = metrics.get("num_hidden_layers") or len(self.layers)
        fields = ((plural_of(field), ours) for field, ours in _OF_LAYERS.items())
        by_layer = {ours: metrics[field] for field, ours in fields if metrics.get(field)}
        ranks = _ranks(metrics.get("attention_ranks") or {})
        return self._of_layers([replace(dims, num_layers=count, ranks=ranks) for dims in self.layers[:count]], by_layer)

    @classmethod
    def _of_mixture(cls, dims: Dimensions, config: Mapping[str, Any]) -> ModelShape:
        sizes = zip(mlp_widths(config), expert_sizes(config), strict=True)
        layers = (
            replace(dims, intermediate_size=active, stored_size=stored, experts=experts)
            for (active, stored), experts in sizes
        )
        return cls(tuple(layers), config)

    @classmethod
    def _of_layers(cls, layers: list[Dimensions], by_layer: Mapping[str, Any]) -> ModelShape:
        changes = [{name: values[number] for name, values in by_layer.items()} for number in range(len(layers))]
        return cls(tuple(replace(dims, **change) for dims, change in zip(layers, changes, strict=True)))

    @property
    def hidden_size(self) -> int:
        return self.layers[0].hidden_size

    def mean(self, of: Callable[[Dimensions], float]) -> float:
        """The mean over layers of a function of a model of equal layers; exact if the function is a sum over layers."""
        return sum(of(dims) * count for dims, count in Counter(self.layers).items()) / len(self.layers)


def _ranks(ranks: Mapping[str, int]) -> tuple[int, ...]:
    """Ranks in the order of ``Dimensions``; the output projection's name depends on the family."""
    output = next((name for name in ranks if name not in ATTENTION[:3]), ATTENTION[3])
    return tuple(ranks.get(name, 0) for name in (*ATTENTION[:3], output)) if ranks else ()
