"""Units: the smallest structures that pruning removes as a whole.

Everything between scores and files speaks of the units of a model's layers. What a unit is, this object says: which
entries of which tensors go with it, which channels of an output projection's input are its own, and which fields of
config.json tell how many a layer has. A kind of unit is a function from a ``config.json`` to ``Units``; ``neurons`` is
one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Where a config.json has what layers differ in: field -> its value in each layer. Fields beside it are of no layer.
LAYER_SIZES = "layer_sizes"
# Where it names output projections, by their names within a layer, that have biases which their family's don't.
OUTPUT_BIASES = "output_biases"
# The same as earlier versions wrote it: layer's number -> field -> value.
PER_LAYER = "per_layer_config"


@dataclass(frozen=True)
class Owned:
    """What the units of a layer own of one of its tensors: unit ``u`` has the entries from ``u * per_unit`` on.

    Attributes:
        tensor: its name within the layer. A checkpoint may lack it, as it may lack biases.
        axis: the dimension along which units follow one another.
        per_unit: consecutive entries of one unit.
        parts: matrices that lie one behind the other along that dimension, each with such entries of every unit: two
            where an architecture has gate and up in one.
        expert: the one whose units own it, where every expert has a tensor of its own.
        stacked: whether its first dimension is experts, each of which has entries of its own units.
        unit: the one that it goes with as a whole, where every unit has a tensor of its own.
    """

    tensor: str
    axis: int
    per_unit: int = 1
    parts: int = 1
    expert: int | None = None
    stacked: bool = False
    unit: int | None = None

    @property
    def entries(self) -> int:
        """Of one unit, in all parts."""
        return self.per_unit * self.parts

    def numbered(self, name: str, number: int) -> str:
        """What a tensor is called, of this name, that goes with its unit as a whole, where that gets a number."""
        begin, _, end = name.rpartition(f".{self.unit}.")
        return f"{begin}.{number}.{end}"


@dataclass(frozen=True)
class Block:
    """The attention or the MLP of a model's layers.

    Attributes:
        layers: what the names of a layer's tensors begin with, before the layer's number.
        name: of the block within a layer; empty where its projections are the layer's own.
        norm: name within a layer of the norm whose output the block reads; None: it reads the residual stream.
        norm_after: name of the norm that its outputs go through before they are added to the residual stream, if any.
        multiplier: of what is added.
    """

    layers: str
    name: str
    norm: str | None
    norm_after: str | None = None
    multiplier: float = 1.0

    def within(self, name: str) -> str:
        """Name within a layer of a part of the block."""
        return f"{self.name}.{name}" if self.name else name

    @property
    def reader(self) -> str:
        """Name within a layer of what reads the residual stream: its norm, or the block itself."""
        return self.norm or self.name


@dataclass(frozen=True)
class Units:
    """The units of one kind in a model.

    Attributes:
        kind: what they are called, in the plural.
        counts: how many each layer has.
        rows: what they own of projections that make the channels.
        output: name within a layer of the projection that reads the channels; units own columns of its weight.
        block: the attention or MLP that they are of.
        channels_per_unit: consecutive channels of that projection's input that are one unit's.
        fields: field of config.json -> how much of it is one unit.
        implied: field -> its value, which config.json must state once it can't be computed from ``fields`` any more.
        columns: what they own of what reads the channels; empty: columns of the output projection's weight.
        experts: of a layer, among which the channels are divided, one expert's behind the other's; 1: they are of none.
        parts: equal parts of a layer's units, one behind the other, each of which keeps as many.
        copies: units for each one that ``fields`` count.
    """

    kind: str
    counts: tuple[int, ...]
    rows: tuple[Owned, ...]
    output: str
    block: Block
    channels_per_unit: int
    fields: Mapping[str, int]
    implied: Mapping[str, int] = field(default_factory=dict)
    columns: tuple[Owned, ...] = ()
    experts: int = 1
    parts: int = 1
    copies: int = 1

    @property
    def layers(self) -> str:
        """What the names of a layer's tensors begin with, before the layer's number."""
        return self.block.layers

    @property
    def num_layers(self) -> int:
        return len(self.counts)

    @property
    def most(self) -> int:
        """Units of the layer that has most."""
        return max(self.counts)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers that have some have as many."""
        return len({*self.counts} - {0}) == 1

    @property
    def width(self) -> int:
        """What ``fields`` count of the layer that has most."""
        return self.most // self.copies

    @cached_property
    def owned(self) -> tuple[Owned, ...]:
        """What they own in their layer, the output projection's columns included."""
        return *self.rows, *self.output_columns

    @property
    def output_columns(self) -> tuple[Owned, ...]:
        """What they own of what reads the channels: of one tensor, or of one for each expert."""
        return self.columns or (Owned(f"{self.output}.weight", 1, self.channels_per_unit),)

    def tensor(self, layer: int, name: str) -> str:
        """A tensor or module of a layer, by the name that it has in the whole model."""
        return f"{self.layers}.{layer}.{name}"

    def output_weight(self, layer: int) -> str:
        """The output projection's weight [hidden_size, units * channels_per_unit]."""
        return self.tensor(layer, f"{self.output}.weight")

    def output_bias(self, layer: int) -> str:
        """The output projection's bias [hidden_size], which a checkpoint may lack."""
        return self.tensor(layer, f"{self.output}.bias")

    def row_weights(self, layer: int) -> list[str]:
        """Weights [units * rows of a unit, ...] of which they own rows, without biases."""
        return [self.tensor(layer, name) for name in self.weights[:-1]]

    @property
    def row_parts(self) -> list[int]:
        """Of each of the weights of ``row_weights``, how many parts it has."""
        return [owned.parts for owned in self.rows if owned.tensor.endswith(".weight")]

    @property
    def weights(self) -> list[str]:
        """Names within a layer of the weights that they own something of: rows of all but the last, then columns."""
        return [owned.tensor for owned in self.owned if owned.tensor.endswith(".weight")]

    def in_layer(self, layer: int, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Owned]]:
        """Of these tensors the ones that the layer's units own something of: (name in the whole model, what)."""
        for owned in self.owned:
            name = self.tensor(layer, owned.tensor)
            if name in tensors:
                yield name, owned

    def outputs_of(self, model: nn.Module) -> list[nn.Module]:
        """The output projections of a model's layers, in order."""
        return [model.get_submodule(self.tensor(layer, self.output)) for layer in range(self.num_layers)]

    def parameters_per_unit(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Parameters that go when one unit of one layer goes, the same in every layer.

        Args:
            shapes: of the model's tensors.
        """
        layer = next(layer for layer, count in enumerate(self.counts) if count)
        return sum(math.prod(shapes[name]) for name, _ in self.in_layer(layer, shapes)) // self.counts[layer]

    def shape_of(self, owned: Owned, layer: int, hidden: int) -> list[int]:
        """The shape of a tensor that a layer's units own something of, which isn't of whole experts.

        Args:
            hidden: the hidden size, which is the other dimension of matrices.
        """
        within = owned.axis - owned.stacked
        size = self.counts[layer] // self.parts * owned.entries
        matrix = [size] if "bias" in owned.tensor else [size, hidden] if within == 0 else [hidden, size]
        return [self.parts, *matrix] if owned.stacked else matrix

    def values(self, counts: Sequence[int]) -> dict[str, list[int]]:
        """What config.json states of layers that have so many units: field -> its value in each layer; 0 where a layer
        has none.
        """
        return {field: [count * size // self.copies for count in counts] for field, size in self.fields.items()}

    def sizes(self, counts: Sequence[int]) -> dict[str, Any]:
        """What results tell of so many units in each layer: a field of config.json (None where layers differ), and the
        value of each layer, under the field's plural, if all layers have some.
        """
        values = self.values(counts)
        one = {field: max(row) if len({*row} - {0}) == 1 else None for field, row in values.items()}
        return one | {plural_of(field): row for field, row in values.items() if 0 not in row}

    def described(self, layer: int) -> str:
        """A layer's units as config.json states them, for messages."""
        stated = self.values([self.counts[layer]])
        return " and ".join(f"{field} {value}" for field, (value,) in stated.items())


def plural_of(field: str) -> str:
    """What results call the values that a field of config.json has in each layer."""
    return f"{field}_by_layer" if field.endswith("s") else f"{field}s"


def read_counts(config: Mapping[str, Any], field: str, per_unit: int = 1) -> tuple[int, ...]:
    """Units of each layer, by a field of a config.json; layers may differ.

    Args:
        per_unit: how much of the field is one unit.
    """
    own = config.get(PER_LAYER) or {}
    everywhere = config[field]
    layers = range(int(config["num_hidden_layers"]))
    values = (config.get(LAYER_SIZES) or {}).get(field) or [
        own.get(str(layer), {}).get(field, everywhere) for layer in layers
    ]
    return tuple(int(value) // per_unit for value in values)
