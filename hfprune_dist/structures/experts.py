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
NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
# How wide they are, by the first one that is there; and how wide the shared one is, by itself or as many times as wide.
WIDTHS = ("moe_intermediate_size", "intermediate_size")
SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")
SHARED_NUMBERS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
# How many times, where no key says it.
_UNSTATED_SHARED = {"hunyuan_v1_moe": 1}
# How wide MLPs of layers without experts are, where another key than theirs says it.
_DENSE_WIDTHS = ("dense_intermediate_size", "prefix_dense_intermediate_size")
# Which layers have some: those from a number on, ...
_FIRSTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# ... those whose number, or the next one, so many divide; and those whose number leaves such a remainder.
_STEPS = ("decoder_sparse_step", "moe_layer_interval")
_PERIOD, _OFFSET = "expert_layer_period", "expert_layer_offset"
# ... none of those that are listed, nor those behind one.
LAYERS_WITHOUT, _LAST = "mlp_only_layers", "moe_layer_end_index"
# Of all these, integers: about which layers; and widths that are positive.
PLACES = (*_FIRSTS, *_STEPS, _PERIOD, _OFFSET, _LAST)
ALL_WIDTHS = (*WIDTHS, *_DENSE_WIDTHS)


@dataclass(frozen=True)
class Shared:
    """The MLP beside a layer's experts that every token goes through.

    Attributes:
        name: within a layer.
        field: of config.json, which says how wide it is.
        copies: neurons for each one that the field counts.
        projections: that it has.
    """

    name: str
    field: str
    copies: int
    projections: Projections


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
    def routers(self) -> list[str]:
        """Names within a layer of what chooses among experts: of what goes with them all that isn't their own."""
        own = {it.tensor for it in (*self.rows, *self.columns)}
        return [it.tensor for it in self.whole if it.tensor.removesuffix("_bias") not in own]

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
    sizes = ExpertSizes(experts, int(chosen_experts(config) or 1), width)
    return [sizes if has_experts(config, layer) else None for layer in layers]


def number_of_experts(config: Mapping[str, Any]) -> int:
    """Of a layer that has some; 0 where a config.json speaks of no more than one."""
    stated = [int(config[key]) for key in NUMBERS if isinstance(config.get(key), int)]
    has_some = stated and max(stated) > 1 and config.get("is_moe", True)
    return max(stated) if has_some else 0


def chosen_experts(config: Mapping[str, Any]) -> Any:
    """How many of them compute a token, as a config.json says it; None where it doesn't."""
    return next((config[key] for key in CHOSEN if config.get(key) is not None), None)


def shared_experts(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The key of a config.json that says how wide the shared one is, and how many times as wide it is.

    The latter is None where no key says it.
    """
    own = next((key for key in SHARED_WIDTHS if config.get(key)), None)
    if own:
        return own, 1
    unstated = _UNSTATED_SHARED.get(str(config.get("model_type")))
    number = next((config[key] for key in SHARED_NUMBERS if config.get(key) is not None), unstated)
    return next(key for key in WIDTHS if config.get(key) is not None), number


def mlp_widths(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Of each layer of a config.json, the neurons that compute a token, and those that are there, experts' included."""
    experts = number_of_experts(config)
    if not experts:
        return [(width, width) for width in read_counts(config, "intermediate_size")]
    dense = read_counts(config, _dense_width(config))
    width = int(next(config[key] for key in WIDTHS if config.get(key) is not None))
    field, copies = shared_experts(config)
    shared = int(config[field]) * int(copies or 0)
    sparse = width * int(chosen_experts(config) or 1) + shared, width * experts + shared
    return [sparse if has_experts(config, layer) else (count, count) for layer, count in enumerate(dense)]


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of a mixture has experts, in place of a plain MLP."""
    kinds = config.get("mlp_layer_types")
    if kinds:
        return bool(kinds[layer] == "sparse")
    last = config.get(_LAST)
    if layer in (config.get(LAYERS_WITHOUT) or ()) or (last not in (None, -1) and layer > last):
        return False
    if config.get(_PERIOD):
        return bool(layer % config[_PERIOD] == (config.get(_OFFSET) or 0))
    in_turn = all((layer + 1) % (config.get(key) or 1) == 0 for key in _STEPS)
    return in_turn and all(layer >= (config.get(key) or 0) for key in _FIRSTS)


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


def shared_neurons(config: Mapping[str, Any], mlp: Block, experts: Experts) -> Units:
    """The neurons of the shared experts of a model that has such."""
    shared = experts.shared
    assert shared is not None, "the model has no shared experts"
    units = neurons(config, replace(mlp, name=shared.name), *shared.projections)
    counts = _counts(config, shared.field, shared.copies, experts.layers)
    return replace(units, kind=SHARED_NEURONS, counts=counts, fields={shared.field: 1}, copies=shared.copies)


def dense_neurons(config: Mapping[str, Any], mlp: Block, experts: Experts, projections: Projections) -> Units:
    """The neurons of the layers that have a plain MLP in place of experts."""
    units, field = neurons(config, mlp, *projections), _dense_width(config)
    counts = tuple(0 if it in experts.layers else count for it, count in enumerate(read_counts(config, field)))
    return replace(units, counts=counts, fields={field: 1})


def _dense_width(config: Mapping[str, Any]) -> str:
    return next((key for key in _DENSE_WIDTHS if config.get(key) is not None), "intermediate_size")


def _counts(config: Mapping[str, Any], field: str, copies: int, layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(width * copies if it in layers else 0 for it, width in enumerate(read_counts(config, field)))
