"""Mixtures of experts: those among which a router chooses, whole and by neurons, and neurons of the shared one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, SHARED_NEURONS
from hfprune_dist.structures.neurons import neurons
from hfprune_dist.structures.units import Block, Owned, Units, read_counts

# Names of an MLP's row projections and of its down projection, and the matrices in each row projection.
Projections = tuple[Sequence[str], str, int]

# Keys of a config.json: how many experts a layer has, and how many of them compute a token.
NUMBERS, CHOSEN = ("num_experts", "num_local_experts", "n_routed_experts"), "num_experts_per_tok"
# How wide they are, by the first one that is there; and how wide the shared one is, by itself or as many times as wide.
WIDTHS = ("moe_intermediate_size", "intermediate_size")
SHARED_WIDTH, SHARED_NUMBER = "shared_expert_intermediate_size", "n_shared_experts"


@dataclass(frozen=True)
class Shared:
    """The MLP beside a layer's experts that every token goes through.

    Attributes:
        name: within a layer.
        field: of config.json, which says how wide it is.
        copies: neurons for each one that the field counts.
    """

    name: str
    field: str
    copies: int = 1


@dataclass(frozen=True)
class Experts:
    """The experts of a model, in its modules and in its files.

    Attributes:
        count: of a layer that has any.
        chosen: that compute a token.
        layers: numbers of the layers that have them; the others have a plain MLP.
        module: name within a layer of the module that has them all.
        fields: of config.json, which say how wide they are.
        numbers: fields of config.json, which say how many there are.
        rows, columns: what their neurons own in the files.
        whole: what each expert has there as a whole, and its rows of what chooses among them.
        groups: among which a router chooses first.
        fewest: that must stay, so that a router finds as many as it chooses.
        shared: None where there is none.
        renamed: (what names within a layer begin with in files, and in modules), of those that differ.
    """

    count: int
    chosen: int
    layers: tuple[int, ...]
    module: str
    fields: tuple[str, ...]
    numbers: tuple[str, ...]
    rows: tuple[Owned, ...]
    columns: tuple[Owned, ...]
    whole: tuple[Owned, ...]
    groups: int
    fewest: int
    shared: Shared | None = None
    renamed: tuple[tuple[str, str], ...] = ()

    def in_modules(self, name: str) -> str:
        """What modules call a tensor within a layer that files call so."""
        for before, after in self.renamed:
            if name.startswith(before):
                return after + name.removeprefix(before)
        return name

    @property
    def each(self) -> bool:
        """Whether every expert has tensors of its own in the files."""
        return not self.rows[0].stacked


@dataclass(frozen=True)
class ExpertSizes:
    """The experts of a layer: how many there are, how many of them compute a token, and the neurons of each."""

    count: int
    chosen: int
    width: int


def expert_sizes(config: Mapping[str, Any]) -> list[ExpertSizes | None]:
    """Of each layer of a config.json; None of one that has none."""
    layers, experts = range(int(config["num_hidden_layers"])), number_of_experts(config)
    if not experts:
        return [None for _ in layers]
    width = int(next(config[key] for key in WIDTHS if config.get(key) is not None))
    sizes = ExpertSizes(experts, int(config.get(CHOSEN) or 1), width)
    return [sizes if _has_experts(config, layer) else None for layer in layers]


def number_of_experts(config: Mapping[str, Any]) -> int:
    """Of a layer that has some; 0 where a config.json speaks of no more than one."""
    stated = [int(config[key]) for key in NUMBERS if isinstance(config.get(key), int)]
    return max(stated) if stated and max(stated) > 1 else 0


def mlp_widths(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Of each layer of a config.json, the neurons that compute a token, and those that are there, experts' included."""
    dense, experts = read_counts(config, "intermediate_size"), number_of_experts(config)
    if not experts:
        return [(width, width) for width in dense]
    width = int(next(config[key] for key in WIDTHS if config.get(key) is not None))
    shared = int(config.get(SHARED_WIDTH) or (config.get(SHARED_NUMBER) or 0) * width)
    sparse = width * int(config.get(CHOSEN) or 1) + shared, width * experts + shared
    return [sparse if _has_experts(config, layer) else (count, count) for layer, count in enumerate(dense)]


def _has_experts(config: Mapping[str, Any], layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    if kinds:
        return bool(kinds[layer] == "sparse")
    in_turn = (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
    plain = config.get("mlp_only_layers") or ()
    return layer >= (config.get("first_k_dense_replace") or 0) and layer not in plain and in_turn


def expert_neurons(config: Mapping[str, Any], mlp: Block, experts: Experts) -> Units:
    """The neurons of a model's experts, those of one behind those of another: unit ``e * width + n`` of a layer is
    neuron ``n`` of its expert ``e``. All experts are equally wide, so that each keeps as many.
    """
    return Units(
        kind=EXPERT_NEURONS,
        counts=_counts(config, experts.fields[0], experts.count, experts.layers),
        rows=experts.rows,
        columns=experts.columns,
        output=experts.module,
        block=mlp,
        channels_per_unit=1,
        fields=dict.fromkeys(experts.fields, 1),
        experts=experts.count,
        parts=experts.count,
        copies=experts.count,
    )


def whole_experts(config: Mapping[str, Any], mlp: Block, experts: Experts) -> Units:
    """The experts of a model, each with all its neurons and its row of the router. Where a router chooses among groups
    first, these are equal parts of a layer's experts, and each keeps as many.
    """
    return Units(
        kind=EXPERTS,
        counts=tuple(experts.count if it in experts.layers else 0 for it in range(int(config["num_hidden_layers"]))),
        rows=(),
        columns=experts.whole,
        output=experts.module,
        block=mlp,
        channels_per_unit=max(read_counts(config, experts.fields[0])),
        fields=dict.fromkeys(experts.numbers, 1),
        experts=experts.count,
        parts=experts.groups,
    )


def shared_neurons(config: Mapping[str, Any], mlp: Block, experts: Experts, projections: Projections) -> Units:
    """The neurons of the shared experts of a model that has such."""
    shared = experts.shared
    assert shared is not None, "the model has no shared experts"
    units = neurons(config, replace(mlp, name=shared.name), *projections)
    counts = _counts(config, shared.field, shared.copies, experts.layers)
    return replace(units, kind=SHARED_NEURONS, counts=counts, fields={shared.field: 1}, copies=shared.copies)


def dense_neurons(config: Mapping[str, Any], mlp: Block, experts: Experts, projections: Projections) -> Units:
    """The neurons of the layers that have a plain MLP in place of experts."""
    units = neurons(config, mlp, *projections)
    return replace(units, counts=tuple(0 if it in experts.layers else count for it, count in enumerate(units.counts)))


def _counts(config: Mapping[str, Any], field: str, copies: int, layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(width * copies if it in layers else 0 for it, width in enumerate(read_counts(config, field)))
