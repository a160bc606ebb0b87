"""Units: the smallest structures that pruning removes as a whole.

``Units`` defines what a unit is: the tensor entries that go with it, the channels of an output projection's input that
belong to it, and the fields of config.json that state how many units a layer has. Each kind of unit is a function from
a config.json to ``Units``: ``neurons`` and ``kv_groups`` here, and those of ``experts``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune_dist.structures import KV_GROUPS, NEURONS
from hfprune_dist.structures.layout import OF_HIDDEN, Dimension, Tensors

# Key of config.json for sizes that differ between layers: field -> its value in each layer. It overrides the top level.
LAYER_SIZES = "layer_sizes"
# Key for the output projections (names within a layer) that have a bias although their model family has none there.
OUTPUT_BIASES = "output_biases"
# transformers' key for settings of single layers: layer number -> field -> value.
PER_LAYER = "per_layer_config"
# Names of ``intermediate_size`` in configurations of opt and granitemoehybrid; and a second one that lfm2 reads first.
OTHER_WIDTHS = ("ffn_dim", "shared_intermediate_size")
OLDER_WIDTHS = ("block_ff_dim",)


@dataclass(frozen=True)
class Block:
    """The attention or the MLP of a model's layers.

    Attributes:
        layers: prefix of the names of all layers' tensors, before the layer's number.
        name: name within a layer; empty if its projections belong to the layer directly.
        norm: name within a layer of the norm whose output the block reads; None if it reads the residual stream.
        norm_after: name of the norm that its outputs go through, if any, before they are added to that stream.
        multiplier: factor by which they are then multiplied.
    """

    layers: str
    name: str
    norm: str | None
    norm_after: str | None = None
    multiplier: float = 1.0

    def within(self, name: str) -> str:
        """Return the name within the layer of a part of the block."""
        return f"{self.name}.{name}" if self.name else name

    @property
    def reader(self) -> str:
        """Name within a layer of the module that reads the residual stream: the block's norm, or the block itself."""
        return self.norm or self.name


@dataclass(frozen=True)
class Units:
    """The units of one kind in a model.

    Attributes:
        kind: name of the kind, in the plural.
        counts: number of units in each layer.
        tensors: those of a layer that the units own parts of, by their names within it, if the checkpoint has them:
            first what makes the channels, then what reads them.
        output: name within a layer of the projection that reads the channels.
        block: the attention or MLP that the units are part of.
        fields: field of config.json -> the amount of it that one unit accounts for.
        channels_per_unit: number of consecutive channels of that projection's input that belong to one unit.
        experts: number of experts among which a layer's channels are divided, expert by expert; 1 without experts.
        parts: number of equal consecutive parts of a layer's units, each of which keeps the same number.
        copies: number of units for each one that ``fields`` count.
    """

    kind: str
    counts: tuple[int, ...]
    tensors: Tensors
    output: str
    block: Block
    fields: Mapping[str, int]
    channels_per_unit: int = 1
    experts: int = 1
    parts: int = 1
    copies: int = 1

    @property
    def layers(self) -> str:
        return self.block.layers

    @property
    def num_layers(self) -> int:
        return len(self.counts)

    @property
    def most(self) -> int:
        """Number of units in the layer that has the most."""
        return max(self.counts)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers that have such units have the same number of them."""
        return len({*self.counts} - {0}) == 1

    @property
    def width(self) -> int:
        """Number of units that ``fields`` count in the layer that has the most."""
        return self.most // self.copies

    @property
    def owned(self) -> list[tuple[str, int, Dimension]]:
        """What the units own: name of a tensor within a layer, and its dimension that follows them."""
        return [
            (name, place, each)
            for name, dimensions in self.tensors.items()
            for place, each in enumerate(dimensions)
            if each is not None and each.axis == self.kind
        ]

    @property
    def weights(self) -> list[str]:
        """Names within a layer of the weights that the units own parts of: columns of the last, rows of the others."""
        return [name for name in self.tensors if name.endswith(".weight")]

    @property
    def row_parts(self) -> list[int]:
        """Number of parts of each of ``weights`` but the last."""
        return [each.stretches for name, _, each in self.owned if name.endswith(".weight")][:-1]

    def tensor(self, layer: int, name: str) -> str:
        """Return the name in the whole model of a layer's tensor or module."""
        return f"{self.layers}.{layer}.{name}"

    def in_layer(self, layer: int, tensors: Container[str]) -> list[str]:
        """Return the whole names of those of the given tensors that the layer's units own parts of."""
        names = (name.format(expert) for name in self.tensors for expert in range(self.experts if "{}" in name else 1))
        return [whole for name in names if (whole := self.tensor(layer, name)) in tensors]

    def values(self, counts: Sequence[int]) -> dict[str, list[int]]:
        """Return what config.json states for layers with these numbers of units: field -> its value in each layer."""
        return {field: [count * size // self.copies for count in counts] for field, size in self.fields.items()}

    def sizes(self, counts: Sequence[int]) -> dict[str, Any]:
        """Return what results state for these numbers of units: each field of config.json (None where layers differ)
        and, under its plural, the values of all layers, if every layer has such units.
        """
        values = self.values(counts)
        one = {field: max(row) if len({*row} - {0}) == 1 else None for field, row in values.items()}
        return one | {plural_of(field): row for field, row in values.items() if 0 not in row}


def plural_of(field: str) -> str:
    """Return the name in results for the values that a field of config.json has in each layer."""
    return f"{field}_by_layer" if field.endswith("s") else f"{field}s"


def read_counts(config: Mapping[str, Any], field: str) -> tuple[int, ...]:
    """Return what a field of config.json states for each layer; layers may differ."""
    values = (config.get(LAYER_SIZES) or {}).get(field) or [config[field]] * int(config["num_hidden_layers"])
    return tuple(map(int, values))


def tensors_of_block(rows: Mapping[str, Dimension], columns: Mapping[str, Dimension]) -> Tensors:
    """Return what units own of linear layers: rows of weights and biases [size, hidden], columns [hidden, size]."""
    made = {f"{name}.weight": (own, OF_HIDDEN) for name, own in rows.items()}
    biases = {f"{name}.bias": (own,) for name, own in rows.items()}
    return {**made, **biases, **{f"{name}.weight": (OF_HIDDEN, own) for name, own in columns.items()}}


def neurons(
    config: Mapping[str, Any],
    mlp: Block,
    row_projections: Sequence[str],
    down: str,
    parts: int = 1,
    kind: str = NEURONS,
) -> Units:
    """Return the neurons of a model's MLPs: each owns a row of every row projection, weight and bias, and a column of
    the down projection. There is only one row projection if there is no gate, or if it stacks gate and up as ``parts``.
    """
    return Units(
        kind=kind,
        counts=read_counts(config, "intermediate_size"),
        tensors=tensors_of_block(
            {mlp.within(name): Dimension(kind, stretches=parts) for name in row_projections},
            {mlp.within(down): Dimension(kind)},
        ),
        output=mlp.within(down),
        block=mlp,
        fields={field: 1 for field in ("intermediate_size", *OTHER_WIDTHS, *OLDER_WIDTHS) if field in config},
    )


def kv_groups(config: Mapping[str, Any], attention: Block, projections: Sequence[str]) -> Units:
    """Return the KV groups of a model: key-value heads, each with the query heads that read it. Query head ``j``
    belongs to group ``j // (query heads per group)``.

    Each group owns its rows of the query, key and value projections, weights and biases, and its columns of the output
    projection. Norms over a head's channels (``q_norm``, ``k_norm``) are shared by all heads and stay.

    Args:
        config: includes the number of key-value heads and the size of a head.
        projections: query, key, value and output; none if groups can't go. They then own nothing, and count as if all
            layers had as many, since a class of transformers may give those of one kind fewer (``gemma4_text``).
    """
    groups, head_dim = int(config["num_key_value_heads"]), int(config["head_dim"])
    if not projections:
        counts = (groups,) * int(config["num_hidden_layers"])
        return Units(KV_GROUPS, counts, tensors={}, output=attention.name, block=attention, fields={})
    query, key, value, output = (f"{attention.name}.{name}" for name in projections)
    queries = int(config["num_attention_heads"]) // groups
    of_queries, own = (Dimension(KV_GROUPS, size) for size in (queries * head_dim, head_dim))
    return Units(
        kind=KV_GROUPS,
        counts=read_counts(config, "num_key_value_heads"),
        tensors=tensors_of_block({query: of_queries, key: own, value: own}, {output: of_queries}),
        output=output,
        block=attention,
        fields={"num_attention_heads": queries, "num_key_value_heads": 1},
        channels_per_unit=queries * head_dim,
    )
