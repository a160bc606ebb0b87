"""Locating the experts of an architecture by the names and shapes of a checkpoint's tensors.

Files have either one tensor per expert or, like modules, one tensor for all experts. A router, which chooses among
experts, has a row for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS
from hfprune_dist.structures.experts import (
    EXPERT_COUNT_KEYS,
    WIDTHS,
    Experts,
    Projections,
    Shared,
    chosen_experts,
    number_of_experts,
    shared_experts,
)
from hfprune_dist.structures.layout import OF_HIDDEN, Dimension, Dimensions, Tensors

# Name of a tensor -> its shape; and what makes an error of the reason why a model can't be pruned.
Shapes = Mapping[str, Sequence[int]]
Refuse = Callable[[str], UserError]

# Names of the block of experts within a layer.
_BLOCKS = ("mlp", "feed_forward", "block_sparse_moe")
# Names of the MLP that every token goes through, inside the block of experts or next to it; and its projections.
_SHARED = ("{}.shared_expert", "{}.shared_experts", "{}.shared_mlp", "shared_mlp")
_OF_SHARED: tuple[Projections, ...] = (
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("input_linear",), "output_linear", 2),
)
# Tensors of a router: they have a row for each expert, or one row with an entry for each.
_STATICS = "gate.moe_statics.e_score_correction_bias"
_ROUTERS = re.compile(
    r"(gate|router)\.(weight|bias|e_score_correction_bias)|(router\.gate|gate\.wg)\.weight"
    r"|e_score_correction_bias|expert_bias|gate\.moe_statics\.e_score_correction_bias"
)
# Other tensors in the experts' block, of which no neuron owns a part; the bias is that of stacked down projections.
_BIAS = "experts.down_proj_bias"
_BESIDE = re.compile(rf"shared_expert_gate\.weight|post_mlp_layernorm\.weight|{re.escape(_BIAS)}")
# What a router adds to scores only to make its choice. If it has that and groups, a group's score is that of its best
# two experts.
_CORRECTION = "e_score_correction_bias"
_OF_GROUP = 2
# Keys of a config.json: how many groups a router first chooses among, and how many of them a token's experts come from;
# and the defaults of configuration classes, where these aren't one group.
_GROUPS, _CHOSEN_GROUPS = ("n_group", "num_expert_group"), "topk_group"
_GROUPS_UNSTATED = dict.fromkeys(("axk1", "bailing_hybrid", "deepseek_v3", "deepseek_v32"), (8, 4))


_EXPERTS, _NEURONS = Dimension(EXPERTS), Dimension(EXPERT_NEURONS)


def _each(gate: str, up: str, down: str) -> Tensors:
    rows = {f"experts.{{}}.{name}.weight": (_NEURONS, OF_HIDDEN) for name in (gate, up)}
    return rows | {f"experts.{{}}.{down}.weight": (OF_HIDDEN, _NEURONS)}


# Forms in which files may hold experts, within their block: tensors that make neurons, and the one that reads them.
_FORMS: tuple[Tensors, ...] = (
    _each("gate_proj", "up_proj", "down_proj"),
    _each("w1", "w3", "w2"),
    # Matrices [in, out], in which gate and up alternate.
    {
        "experts.gate_up_proj": (_EXPERTS, OF_HIDDEN, Dimension(EXPERT_NEURONS, entries=2)),
        "experts.gate_up_proj_bias": (_EXPERTS, Dimension(EXPERT_NEURONS, entries=2)),
        "experts.down_proj": (_EXPERTS, _NEURONS, OF_HIDDEN),
    },
    {
        "experts.gate_up_proj": (_EXPERTS, Dimension(EXPERT_NEURONS, stretches=2), OF_HIDDEN),
        "experts.down_proj": (_EXPERTS, OF_HIDDEN, _NEURONS),
    },
)


def find_experts(config: Mapping[str, Any], parts: Sequence[Shapes], refuse: Refuse) -> Experts | None:
    """The experts of a model, given the tensors of each layer by their names within it; None if it has none."""
    count = number_of_experts(config)
    if not count:
        return None
    for form, block in product(_FORMS, _BLOCKS):
        tensors = {f"{block}.{name}": dimensions for name, dimensions in form.items()}
        layers = tuple(number for number, there in enumerate(parts) if all(name.format(0) in there for name in tensors))
        if layers:
            return _described(config, parts, refuse, block, tensors, layers)
    keys = ", ".join(key for key in EXPERT_COUNT_KEYS if key in config)
    raise refuse(f"it is a mixture of experts ({keys}) of a kind that isn't known")


def _described(
    config: Mapping[str, Any],
    parts: Sequence[Shapes],
    refuse: Refuse,
    block: str,
    tensors: Tensors,
    layers: tuple[int, ...],
) -> Experts:
    """The experts of these layers, which have a known form; after checking that nothing else is in their block."""
    numbers = {key: config[key] for key in EXPERT_COUNT_KEYS if isinstance(config.get(key), int)}
    count, chosen, first = number_of_experts(config), chosen_experts(config), parts[layers[0]]
    if {*numbers.values()} != {count} or not isinstance(chosen, int) or not 1 <= chosen <= count:
        raise refuse(f"of {numbers} experts, a token can't have {chosen!r}")
    shared = _shared(config, first, block, refuse)
    inside = ((name, name.removeprefix(f"{block}.")) for name in sorted(first))
    routers: dict[str, Dimensions] = {
        name: (None, _EXPERTS) if own == _STATICS else (_EXPERTS, OF_HIDDEN)[: len(first[name])]
        for name, own in inside
        if own != name and _ROUTERS.fullmatch(own)
    }
    if not routers:
        raise refuse(f"layer {layers[0]} has {count} experts, and nothing that chooses among them")
    known = {name.format(expert) for name in tensors for expert in range(count)} | routers.keys()
    if shared is not None:
        of_shared = (*shared.projections[0], shared.projections[1])
        known |= {f"{shared.name}.{name}.weight" for name in of_shared}
    for layer in layers:
        there = parts[layer]
        if missing := sorted(known - there.keys()):
            raise refuse(f"layer {layer} has no {missing[0]}, of {count} experts")
        for name in sorted(there.keys() - known):
            own = name.removeprefix(f"{block}.")
            if own != name and not _BESIDE.fullmatch(own):
                raise refuse(f"in layer {layer}, {name} is not part of {count} experts of a known kind")
    # The fields that state the experts' width: one or, if no layer has a plain MLP, all that state the same.
    stated = [key for key in WIDTHS if config.get(key) is not None]
    *_, (down, dimensions) = tensors.items()
    saying = [key for key in stated if config[key] == first[down.format(0)][dimensions.index(_NEURONS)]]
    fields = (saying if len(layers) == len(parts) else saying[:1]) or stated[:1]
    corrected = any(name.endswith(_CORRECTION) for name in routers)
    groups, fewest = _groups(config, count, chosen, corrected, refuse)
    return Experts(
        count=count,
        chosen=chosen,
        layers=layers,
        module=f"{block}.experts",
        fields=tuple(fields),
        numbers=tuple(numbers),
        tensors=tensors,
        chooses={f"{block}.{_BIAS}": (_EXPERTS, OF_HIDDEN), **routers},
        groups=groups,
        fewest=fewest,
        shared=shared,
    )


def _groups(config: Mapping[str, Any], count: int, chosen: int, corrected: bool, refuse: Refuse) -> tuple[int, int]:
    """The number of groups that a router first chooses among, and how many experts it needs in all of them."""
    groups, chosen_groups = 1, 1
    # The router of deepseek_v2 has no use for groups unless this key says so.
    if config["model_type"] != "deepseek_v2" or config.get("topk_method", "greedy") != "greedy":
        unstated = _GROUPS_UNSTATED.get(str(config["model_type"]), (1, 1)) if corrected else (1, 1)
        key = next((key for key in _GROUPS if key in config), _GROUPS[0])
        stated = (config.get(name, usual) for name, usual in zip((key, _CHOSEN_GROUPS), unstated, strict=True))
        groups, chosen_groups = (1 if number is None or number is False else number for number in stated)
        if not 1 <= chosen_groups <= groups <= count or count % groups:
            raise refuse(f"{count} experts can't be {groups} groups of which a token has {chosen_groups} ({key})")
    of_group = max(-(-chosen // chosen_groups), _OF_GROUP if corrected and groups > 1 else 1)
    if of_group > count // groups:
        raise refuse(
            f"{groups} groups have {count // groups} experts each, but a router that takes {chosen} of "
            f"{chosen_groups} of them needs {of_group} in each"
        )
    # A model with one expert isn't a mixture, and a router with one group may look for the best two in it.
    return groups, max(of_group * groups, 2)


def _shared(config: Mapping[str, Any], there: Shapes, block: str, refuse: Refuse) -> Shared | None:
    for name in (name.format(block) for name in _SHARED):
        if not any(tensor.startswith(f"{name}.") for tensor in there):
            continue
        field, copies = shared_experts(config)
        for rows, down, parts in _OF_SHARED:
            if f"{name}.{rows[0]}.weight" in there and isinstance(copies, int) and copies > 0:
                return Shared(name, field, copies, (rows, down, parts))
        raise refuse(f"{name} is not an MLP of a known kind, of {copies} times {field}")
    return None
