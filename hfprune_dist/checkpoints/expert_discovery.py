"""Locating the experts of an architecture by the names and shapes of a checkpoint's tensors.

Files have either one tensor per expert or, like modules, one tensor for all experts. A router, which chooses among
experts, has a row for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune_dist.checkpoints.discovered_blocks import Shapes
from hfprune_dist.checkpoints.refusals import Refusals
from hfprune_dist.structures.experts import (
    CHOSEN,
    EXPERT_COUNT_KEYS,
    SHARED_NUMBERS,
    SHARED_WIDTHS,
    WIDTHS,
    Experts,
    Projections,
    Shared,
    chosen_experts,
    number_of_experts,
    shared_experts,
)
from hfprune_dist.structures.units import Owned

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
    r"(gate|router)\.(weight|bias|e_score_correction_bias)|(router\.layer|router\.gate|gate\.wg)\.weight"
    r"|e_score_correction_bias|expert_bias|gate\.moe_statics\.e_score_correction_bias"
)
# Other tensors in the experts' block, of which no neuron owns a part; the bias is that of stacked down projections.
_BIAS = "experts.down_proj_bias"
_BESIDE = re.compile(rf"shared_expert_gate\.weight|post_mlp_layernorm\.weight|{re.escape(_BIAS)}")
_OF_EXPERT, _OF_EXPERTS = re.compile(r"experts\.(\d+)\."), re.compile(r"(^|\.)experts\.|^block_sparse_moe\.")
# What a router adds to scores only to make its choice. If it has that and groups, a group's score is that of its best
# two experts.
_CORRECTION = "e_score_correction_bias"
_OF_GROUP = 2
# Keys of a config.json: how many groups a router first chooses among, and how many of them a token's experts come from;
# and the defaults of configuration classes, where these aren't one group.
_GROUPS, _CHOSEN_GROUPS = ("n_group", "num_expert_group"), "topk_group"
_GROUPS_UNSTATED = dict.fromkeys(("axk1", "bailing_hybrid", "deepseek_v3", "deepseek_v32"), (8, 4))
# Names of tensors in files, and in modules, where they differ.
_OF_GRANITE = (
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
)
_OF_MIXTRAL = (("block_sparse_moe.", "mlp."),)


@dataclass(frozen=True)
class _Form:
    """A form in which files may hold experts, within their block: rows, then columns; {} is an expert's number."""

    rows: tuple[Owned, ...]
    columns: tuple[Owned, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    blocks: tuple[str, ...] = ("mlp",)

    @property
    def needed(self) -> list[str]:
        """Names of its tensors."""
        return [owned.tensor for owned in (*self.rows, *self.columns)]

    def owned(self, block: str, count: int) -> list[tuple[Owned, ...]]:
        """What the neurons of a block's experts, ``count`` in number, own: rows, and columns."""
        return [
            tuple(one for it in part for one in _of_experts(it, block, count)) for part in (self.rows, self.columns)
        ]

    def whole(self, block: str, count: int) -> list[Owned]:
        """What a block's experts, ``count`` in number, consist of."""
        parts = [f"{block}.{name}" for name in self.needed]
        if all(it.stacked for it in self.rows):
            return [Owned(name, 0) for name in (*parts, f"{block}.{_BIAS}")]
        return [Owned(name.format(expert), 0, unit=expert) for name in parts for expert in range(count)]


def _each(gate: str, up: str, down: str, **more: Any) -> _Form:
    rows = tuple(Owned(f"experts.{{}}.{name}.weight", 0) for name in (gate, up))
    return _Form(rows, (Owned(f"experts.{{}}.{down}.weight", 1),), **more)


def _stacked(rows: str, down: str, **more: Any) -> _Form:
    return _Form((Owned(rows, 1, parts=2, stacked=True),), (Owned(down, 2, stacked=True),), **more)


_FORMS = (
    _each("gate_proj", "up_proj", "down_proj", blocks=("mlp", "feed_forward")),
    _each("w1", "w3", "w2", blocks=("mlp", "feed_forward")),
    _each("w1", "w3", "w2", blocks=("block_sparse_moe",), renamed=_OF_MIXTRAL),
    # Matrices [in, out], in which gate and up alternate.
    _Form(
        (
            Owned("experts.gate_up_proj", 2, per_unit=2, stacked=True),
            Owned("experts.gate_up_proj_bias", 1, per_unit=2, stacked=True),
        ),
        (Owned("experts.down_proj", 1, stacked=True),),
    ),
    _stacked("experts.gate_up_proj", "experts.down_proj", blocks=("mlp", "block_sparse_moe", "feed_forward")),
    _stacked("input_linear.weight", "output_linear.weight", blocks=("block_sparse_moe",), renamed=_OF_GRANITE),
)


def _of_experts(owned: Owned, block: str, count: int) -> list[Owned]:
    if owned.stacked:
        return [Owned(f"{block}.{owned.tensor}", owned.axis, owned.per_unit, owned.parts, stacked=True)]
    names = (f"{block}.{owned.tensor.format(expert)}" for expert in range(count))
    return [Owned(name, owned.axis, expert=expert) for expert, name in enumerate(names)]


def find_experts(config: Mapping[str, Any], parts: Sequence[Shapes], refusals: Refusals) -> Experts | None:
    """The experts of a model; None if it has none.

    Args:
        parts: the tensors of each layer, by their names within it.

    Raises:
        UserError: naming what is missing or unexpected.
    """
    if not number_of_experts(config):
        _refuse_experts(config, parts, refusals)
        return None
    for form in _FORMS:
        for block in form.blocks:
            first = [f"{block}.{name.format(0)}" for name in form.needed]
            layers = tuple(number for number, there in enumerate(parts) if all(name in there for name in first))
            if layers:
                return _Found(config, parts, refusals, block=block).experts(form, layers)
    raise refusals.unsupported("it is a mixture of experts of a kind that isn't known")


def _refuse_experts(config: Mapping[str, Any], parts: Sequence[Shapes], refusals: Refusals) -> None:
    """Refuse files with experts if config.json states no more than one."""
    found = next((name for there in parts for name in there if _OF_EXPERTS.search(name)), None)
    key = next((key for key in EXPERT_COUNT_KEYS if config.get(key) is not None), None)
    if found is None or key is None or not config.get("is_moe", True):
        return
    if config[key] == 1:
        raise refusals.unsupported(f"it is a mixture of one expert ({key} 1), and pruned are those of two or more")
    raise refusals.unlike_tensors(f"they have experts ({found}), and {key} is {config[key]!r}")


class _Found:
    """A model whose experts have a known form; describes them and checks that all is as it must be."""

    def __init__(self, config: Mapping[str, Any], parts: Sequence[Shapes], refusals: Refusals, *, block: str) -> None:
        self._config = config
        self._parts = parts
        self._refusals = refusals
        self._block = block

    def experts(self, form: _Form, layers: tuple[int, ...]) -> Experts:
        """The description of the experts."""
        count = self._number()
        chosen = self._chosen(count)
        rows, columns = form.owned(self._block, count)
        shared = self._shared(self._parts[layers[0]])
        routers = self._routers(self._parts[layers[0]])
        known = {owned.tensor for owned in (*rows, *columns, *routers)}
        known |= self._tensors_of(shared) if shared else set()
        for layer in layers:
            self._check(layer, known, count)
        if shared is not None and form.renamed and shared.name.startswith(f"{self._block}."):
            raise self._refusals.unsupported(f"{shared.name} is beside experts that modules call something else")
        groups, fewest = self._groups(count, chosen, routers)
        return Experts(
            count=count,
            chosen=chosen,
            layers=layers,
            module=f"{'mlp' if form.renamed == _OF_MIXTRAL else self._block}.experts",
            fields=self._fields(columns[0], layers),
            numbers=tuple(self._numbers()),
            rows=rows,
            columns=columns,
            whole=(*form.whole(self._block, count), *routers),
            groups=groups,
            fewest=fewest,
            shared=shared,
            renamed=form.renamed,
        )

    def _fields(self, column: Owned, layers: tuple[int, ...]) -> tuple[str, ...]:
        """The fields that state the experts' width: one or, if no layer has a plain MLP, all that state the same."""
        stated = [key for key in WIDTHS if self._config.get(key) is not None]
        shape = self._parts[layers[0]][column.tensor]
        saying = [key for key in stated if [self._config[key]] == [*shape[column.axis : column.axis + 1]]]
        return tuple((saying if len(layers) == len(self._parts) else saying[:1]) or stated[:1])

    def _numbers(self) -> dict[str, int]:
        return {key: self._config[key] for key in EXPERT_COUNT_KEYS if isinstance(self._config.get(key), int)}

    def _number(self) -> int:
        stated = self._numbers()
        if len({*stated.values()}) > 1:
            told = " and ".join(f"{key} is {value}" for key, value in stated.items())
            raise self._refusals.inconsistent(f"{told}, and each says how many experts there are")
        return int(next(iter(stated.values())))

    def _chosen(self, count: int) -> int:
        key, chosen = self._chosen_key, chosen_experts(self._config)
        if not _is_in(chosen, range(1, count + 1)):
            raise self._refusals.invalid(key, chosen, f"an integer from 1 to {count}, the number of experts")
        return int(chosen)

    @property
    def _chosen_key(self) -> str:
        return next((key for key in CHOSEN if self._config.get(key) is not None), CHOSEN[0])

    def _routers(self, there: Shapes) -> list[Owned]:
        """What chooses among a layer's experts: weights and biases that have a row, or an entry, for each expert."""
        inside = ((name, name.removeprefix(f"{self._block}.")) for name in sorted(there))
        return [Owned(name, int(own == _STATICS)) for name, own in inside if own != name and _ROUTERS.fullmatch(own)]

    def _groups(self, count: int, chosen: int, routers: Sequence[Owned]) -> tuple[int, int]:
        """The number of groups that a router first chooses among, and how many experts it needs in all of them."""
        corrected = any(it.tensor.endswith(_CORRECTION) for it in routers)
        groups, chosen_groups = self._stated_groups(count, corrected)
        of_group = max(-(-chosen // chosen_groups), _OF_GROUP if corrected and groups > 1 else 1)
        if of_group > count // groups:
            keys = ", ".join((self._chosen_key, self._groups_key, _CHOSEN_GROUPS))
            raise self._refusals.inconsistent(
                f"{groups} groups have {count // groups} experts each, but a router that takes {chosen} of "
                f"{chosen_groups} of them needs {of_group} in each ({keys})"
            )
        # A model with one expert isn't a mixture, and a router with one group may look for the best two in it.
        return groups, max(of_group * groups, 2)

    def _stated_groups(self, count: int, corrected: bool) -> tuple[int, int]:
        """The number of groups, and how many of them a token's experts come from; null and false count as 1."""
        if self._config.get("model_type") == "deepseek_v2" and self._config.get("topk_method", "greedy") == "greedy":
            return 1, 1  # its router doesn't use them
        unstated = _GROUPS_UNSTATED.get(str(self._config.get("model_type")), (1, 1)) if corrected else (1, 1)
        key = self._groups_key
        stated = (self._config.get(name, usual) for name, usual in zip((key, _CHOSEN_GROUPS), unstated, strict=True))
        groups, chosen_groups = (1 if it is None or it is False else it for it in stated)
        if not _is_in(groups, range(1, count + 1)) or count % groups:
            raise self._refusals.invalid(key, groups, f"an integer that divides {count}, the number of experts")
        if not _is_in(chosen_groups, range(1, groups + 1)):
            raise self._refusals.invalid(
                _CHOSEN_GROUPS, chosen_groups, f"an integer from 1 to {groups}, the number of groups"
            )
        return groups, chosen_groups

    @property
    def _groups_key(self) -> str:
        return next((key for key in _GROUPS if key in self._config), _GROUPS[0])

    def _shared(self, there: Shapes) -> Shared | None:
        named = (name.format(self._block) for name in _SHARED)
        name = next((name for name in named if any(it.startswith(f"{name}.") for it in there)), None)
        if name is None:
            return None
        field, copies = shared_experts(self._config)
        if not isinstance(copies, int) or copies < 1:
            keys = ", ".join((*SHARED_WIDTHS, *SHARED_NUMBERS))
            raise self._refusals.unlike_tensors(f"they have {name}, and none of {keys} says how wide it is")
        return Shared(name, field, copies, self._projections(name, there))

    def _projections(self, name: str, there: Shapes) -> Projections:
        for rows, down, parts in _OF_SHARED:
            if f"{name}.{rows[0]}.weight" in there:
                return rows, down, parts
        raise self._refusals.unsupported(f"{name} is not an MLP of a known kind")

    def _tensors_of(self, shared: Shared) -> set[str]:
        rows, down, _ = shared.projections
        return {f"{shared.name}.{name}.weight" for name in (*rows, down)}

    def _check(self, layer: int, known: set[str], count: int) -> None:
        there = self._parts[layer]
        if missing := sorted(known - there.keys()):
            raise self._refusals.unlike_tensors(f"layer {layer} has no {missing[0]}, of {count} experts")
        for name in sorted(there.keys() - known):
            inside = name.removeprefix(f"{self._block}.")
            if (number := _OF_EXPERT.match(inside)) and int(number[1]) >= count:
                raise self._refusals.unlike_tensors(f"layer {layer} has {name}, of {count} experts")
            if inside != name and not _BESIDE.fullmatch(inside):
                raise self._refusals.unsupported(f"in layer {layer}, {name} is not part of experts of a known kind")


def _is_in(value: Any, valid: range) -> bool:
    """Whether a value is one of these numbers, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value in valid
