"""Units in mixtures of experts: whole experts, the neurons of experts, and the neurons of the shared expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, SHARED_NEURONS
from hfprune_dist.structures.neurons import neurons
from hfprune_dist.structures.units import Block, Owned, Units, read_counts

# Names of an MLP's row projections, the name of its down projection, and the number of matrices per row projection.
Projections = tuple[Sequence[str], str, int]

# Keys of config.json for the number of experts in a layer, and for the number of them that process each token.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
# Keys for an expert's width (the first one present counts), and for the shared expert's: its width, or a multiple.
WIDTHS = ("moe_intermediate_size", "intermediate_size")
SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")
SHARED_NUMBERS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
# Multiple of an expert's width that the shared one has, for model types without a key for it.
_UNSTATED_SHARED = {"hunyuan_v1_moe": 1}
# Keys for the width of MLPs in layers without experts, where it isn't ``intermediate_size``.
_DENSE_WIDTHS = ("dense_intermediate_size", "prefix_dense_intermediate_size")
# Keys that say which layers have experts. Lists with an entry for each layer: names, as transformers writes them, or
# numbers that are 0 for layers without experts, as in files of mimo_v2_flash and minimax_m3.
_KINDS, _FLAGS = "mlp_layer_types", "moe_layer_freq"
# The first layer that has experts.
_FIRSTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# A step: only layers whose number plus one is divisible by it have experts.
_STEPS = ("decoder_sparse_step", "moe_layer_interval")
# A period: only layers whose number modulo it is the offset have experts.
_PERIOD, _OFFSET = "expert_layer_period", "expert_layer_offset"
# A list of layers that have none all the same, and the last layer that has some.
LAYERS_WITHOUT, _LAST = "mlp_only_layers", "moe_layer_end_index"


@dataclass(frozen=True)
class Shared:
    """The shared expert: the MLP next to a layer's experts that every token goes through.

    Attributes:
        name: its name within a layer.
        field: the field of config.json that determines its width.
        copies: number of its neurons for each one that the field counts.
        projections: its projections.
    """

    name: str
    field: str
    copies: int
    projections: Projections


@dataclass(frozen=True)
class Experts:
    """The experts of a model, in its modules and in its files.

    Attributes:
        count: number of experts in a layer that has any.
        chosen: number of experts that process each token.
        layers: numbers of the layers that have experts; the others have a plain MLP.
        module: name within a layer of the module that contains all of its experts.
        fields: fields of config.json that state an expert's width.
        numbers: fields of config.json that state the number of experts.
        rows, columns: the parts of the files' tensors that the experts' neurons own.
        whole: what each expert owns there as a whole, including its rows of the router.
        groups: number of groups of experts among which the router chooses first.
        fewest: number of experts that must stay for the router to find as many as it chooses.
        shared: the shared expert, or None.
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

    @property
    def each(self) -> bool:
        """Whether each expert has tensors of its own in the files."""
        return not self.rows[0].stacked


def number_of_experts(config: Mapping[str, Any]) -> int:
    """Return the number of experts in a layer that has any; 0 if the config.json states no more than one."""
    stated = [int(config[key]) for key in EXPERT_COUNT_KEYS if isinstance(config.get(key), int)]
    has_some = stated and max(stated) > 1 and config.get("is_moe", True)
    return max(stated) if has_some else 0


def chosen_experts(config: Mapping[str, Any]) -> Any:
    """Return the number of experts that process each token, as config.json states it; None if it doesn't."""
    return next((config[key] for key in CHOSEN if config.get(key) is not None), None)


def shared_experts(config: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the key of config.json for the shared expert's width, and the multiple of its value that the width is.

    The multiple is None if no key states it.
    """
    own = next((key for key in SHARED_WIDTHS if config.get(key)), None)
    if own:
        return own, 1
    unstated = _UNSTATED_SHARED.get(str(config.get("model_type")))
    number = next((config[key] for key in SHARED_NUMBERS if config.get(key) is not None), unstated)
    return _width_key(config), number


def mlp_widths(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return for each layer the number of neurons that process each token, and of all, including those of experts."""
    experts = number_of_experts(config)
    if not experts:
        return [(width, width) for width in read_counts(config, "intermediate_size")]
    dense = read_counts(config, _dense_width_key(config))
    width = int(config[_width_key(config)])
    field, copies = shared_experts(config)
    shared = int(config[field]) * int(copies or 0)
    sparse = width * int(chosen_experts(config) or 1) + shared, width * experts + shared
    return [sparse if has_experts(config, layer) else (count, count) for layer, count in enumerate(dense)]


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer of a mixture of experts has experts rather than a plain MLP."""
    kinds, flags = config.get(_KINDS), config.get(_FLAGS)
    if kinds:
        return bool(kinds[layer] == "sparse")
    if isinstance(flags, list):
        return bool(flags[layer])
    last = config.get(_LAST)
    if layer in (config.get(LAYERS_WITHOUT) or ()) or (last not in (None, -1) and layer > last):
        return False
    if config.get(_PERIOD):
        return bool(layer % config[_PERIOD] == (config.get(_OFFSET) or 0))
    in_turn = all((layer + 1) % (config.get(key) or 1) == 0 for key in _STEPS)
    return in_turn and all(layer >= (config.get(key) or 0) for key in _FIRSTS)


def expert_neurons(config: Mapping[str, Any], mlp: Block, experts: Experts) -> Units:
    """Return the neurons of a model's experts, expert by expert: unit ``e * width + n`` of a layer is neuron ``n`` of
    its expert ``e``. All experts of a model are equally wide, so each of them keeps the same number of neurons.
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
    """Return the experts of a model, each with all its neurons and its row of the router. If the router first chooses
    among groups, these are equal parts of a layer's experts, and each group keeps the same number of experts.
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
    """Return the neurons of the shared experts of a model that has them."""
    shared = experts.shared
    assert shared is not None, "the model has no shared experts"
    units = neurons(config, replace(mlp, name=shared.name), *shared.projections)
    counts = _counts(config, shared.field, shared.copies, experts.layers)
    return replace(units, kind=SHARED_NEURONS, counts=counts, fields={shared.field: 1}, copies=shared.copies)


def dense_neurons(config: Mapping[str, Any], mlp: Block, experts: Experts, projections: Projections) -> Units:
    """Return the neurons of the layers that have a plain MLP instead of experts."""
    units, field = neurons(config, mlp, *projections), _dense_width_key(config)
    counts = tuple(0 if it in experts.layers else count for it, count in enumerate(read_counts(config, field)))
    return replace(units, counts=counts, fields={field: 1})


def _width_key(config: Mapping[str, Any]) -> str:
    """Return the key of config.json for the width of an expert."""
    return next(key for key in WIDTHS if config.get(key) is not None)


def _dense_width_key(config: Mapping[str, Any]) -> str:
    """Return the key of config.json for the width of MLPs in layers without experts."""
    return next((key for key in _DENSE_WIDTHS if config.get(key) is not None), "intermediate_size")


def _counts(config: Mapping[str, Any], field: str, copies: int, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of units in each layer: ``copies`` for each one that the field counts, and none outside
    ``layers``.
    """
    return tuple(width * copies if it in layers else 0 for it, width in enumerate(read_counts(config, field)))
