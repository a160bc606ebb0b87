"""Units in mixtures of experts: whole experts, the neurons of experts, and the neurons of the shared expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, SHARED_NEURONS
from hfprune_dist.structures.layout import Tensors
from hfprune_dist.structures.units import Block, Units, neurons, read_counts

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


class Shared(NamedTuple):
    """The shared expert: the MLP next to a layer's experts that every token goes through. It has ``copies`` neurons for
    each one that the ``field`` of config.json counts.
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
        tensors: those of the files that the experts' neurons own parts of.
        chooses: others that experts own parts of as a whole, such as those of the router.
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
    tensors: Tensors
    chooses: Tensors
    groups: int
    fewest: int
    shared: Shared | None = None

    @property
    def has_own_tensors(self) -> bool:
        """Whether each expert has tensors of its own in the files."""
        return "{}" in next(iter(self.tensors))


def number_of_experts(config: Mapping[str, Any]) -> int:
    """Return the number of experts in a layer that has any; 0 if the config.json states no more than one."""
    stated = [int(config[key]) for key in EXPERT_COUNT_KEYS if isinstance(config.get(key), int)]
    has_some = stated and max(stated) > 1 and config.get("is_moe", True)
    return max(stated) if has_some else 0


def chosen_experts(config: Mapping[str, Any]) -> Any:
    """Return the number of experts that process each token, as config.json states it; None if it doesn't."""
    return next((config[key] for key in CHOSEN if config.get(key) is not None), None)


def shared_experts(config: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the key for the shared expert's width, and what its value is multiplied by, None if no key says it."""
    own = next((key for key in SHARED_WIDTHS if config.get(key)), None)
    if own:
        return own, 1
    unstated = _UNSTATED_SHARED.get(str(config.get("model_type")))
    number = next((config[key] for key in SHARED_NUMBERS if config.get(key) is not None), unstated)
    return next(key for key in WIDTHS if config.get(key) is not None), number


def units_of_mixture(config: Mapping[str, Any], mlp: Block, experts: Experts, projections: Projections) -> list[Units]:
    """Return the units of a model's MLPs: neurons of experts, of shared experts and of plain MLPs; and whole experts.

    Neurons of experts are numbered expert by expert: unit ``e * width + n`` of a layer is neuron ``n`` of its expert
    ``e``. All experts of a model are equally wide, so each of them keeps the same number of neurons. A whole expert has
    all its neurons and its row of the router. If the router first chooses among groups, these are equal parts of a
    layer's experts, and each group keeps the same number of experts.

    Args:
        projections: those of the layers that have a plain MLP instead of experts, if there are any.
    """

    def counts(field: str, copies: int = 1, *, has_experts: bool = True) -> tuple[int, ...]:
        widths = enumerate(read_counts(config, field))
        return tuple(width * copies if (layer in experts.layers) == has_experts else 0 for layer, width in widths)

    of_experts = Units(
        kind=EXPERT_NEURONS,
        counts=counts(experts.fields[0], experts.count),
        tensors=experts.tensors,
        output=experts.module,
        block=mlp,
        fields=dict.fromkeys(experts.fields, 1),
        experts=experts.count,
        parts=experts.count,
        copies=experts.count,
    )
    found = [of_experts]
    if (shared := experts.shared) is not None:
        units = neurons(config, replace(mlp, name=shared.name), *shared.projections, SHARED_NEURONS)
        widths = counts(shared.field, shared.copies)
        found.append(replace(units, counts=widths, fields={shared.field: 1}, copies=shared.copies))
    if len(experts.layers) < int(config["num_hidden_layers"]):
        field = next((key for key in _DENSE_WIDTHS if config.get(key) is not None), "intermediate_size")
        widths = counts(field, has_experts=False)
        found.append(replace(neurons(config, mlp, *projections), counts=widths, fields={field: 1}))
    whole = replace(
        of_experts,
        kind=EXPERTS,
        counts=tuple(experts.count * (count > 0) for count in of_experts.counts),
        tensors={**experts.tensors, **experts.chooses},
        channels_per_unit=max(read_counts(config, experts.fields[0])),
        fields=dict.fromkeys(experts.numbers, 1),
        parts=experts.groups,
        copies=1,
    )
    return [*found, whole]
