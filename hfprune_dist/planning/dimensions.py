"""The dimensions of a decoder from which its memory and work are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfprune_dist.structures.experts import mlp_widths, number_of_experts


@dataclass(frozen=True)
class Dimensions:
    """A decoder's dimensions, as they decide memory and work.

    ``ranks``: of attention's query, key, value and output projections, 0 where one is whole; empty where all are.
    ``intermediate_size`` is of the neurons that compute a token, ``stored_size`` of all that a layer has: experts that
    aren't chosen count there alone. 0: as many.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    ranks: tuple[int, ...] = ()
    stored_size: int = 0

    @property
    def attention_size(self) -> int:
        """Channels that attention's output projection reads."""
        return self.num_heads * self.head_size

    @property
    def attention_parameters(self) -> int:
        if not self.ranks:
            return sum(self._attention_weights)
        sides = (weight // self.hidden_size + self.hidden_size for weight in self._attention_weights)
        matrices = zip(self._attention_weights, self.ranks, sides, strict=True)
        return sum(rank * side if rank else weight for weight, rank, side in matrices)

    @property
    def _attention_weights(self) -> list[int]:
        """Sizes of whole matrices: query, key, value, output."""
        heads = self.num_heads, self.num_key_value_heads, self.num_key_value_heads, self.num_heads
        return [self.hidden_size * self.head_size * it for it in heads]

    def layer_weights(self, *, attention: bool) -> list[int]:
        """Sizes of one layer's matrices: of the MLP, then those of attention if they are asked for."""
        heads = [self.num_heads] * 2 + [self.num_key_value_heads] * 2
        channels = [self.intermediate_size] * 3 + [it * self.head_size for it in heads if attention]
        return [self.hidden_size * it for it in channels]

    @property
    def layer_parameters(self) -> int:
        """The matrices of one layer; norms and biases are too few to matter."""
        return self.attention_parameters + 3 * self.hidden_size * (self.stored_size or self.intermediate_size)

    @property
    def body_parameters(self) -> int:
        return self.num_layers * self.layer_parameters

    @property
    def active_layer_parameters(self) -> int:
        """Those of one layer's that a token is multiplied with."""
        return self.attention_parameters + 3 * self.hidden_size * self.intermediate_size

    @property
    def active_body_parameters(self) -> int:
        return self.num_layers * self.active_layer_parameters

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.head_parameters * (1 if self.tied else 2)


def dimensions_of(config: Mapping[str, Any]) -> Dimensions:
    """The dimensions that a ``config.json`` describes."""
    heads = int(config["num_attention_heads"])
    active, stored = (round(sum(it) / len(it)) for it in zip(*mlp_widths(config), strict=True))
    experts = number_of_experts(config)
    return Dimensions(
        hidden_size=int(config["hidden_size"]),
        intermediate_size=active if experts else int(config["intermediate_size"]),
        stored_size=stored if experts else 0,
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
