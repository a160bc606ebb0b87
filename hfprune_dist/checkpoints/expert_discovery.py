"""Where the experts of an architecture are, by the names and shapes of a checkpoint's tensors.

Files have a tensor for each expert, or all experts in one, as modules have them. What chooses among experts has a row
for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune_dist.checkpoints.families import MLP
from hfprune_dist.structures.experts import CHOSEN, NUMBERS, SHARED_NUMBER, SHARED_WIDTH, WIDTHS, Experts, Shared
from hfprune_dist.structures.units import Owned

Shapes = Mapping[str, Sequence[int]]
Refusal = Callable[[str], Exception]

_SHARED = ("shared_expert", "shared_experts")
_ROUTERS = re.compile(r"(gate|router|router\.layer)\.(weight|bias|e_score_correction_bias)")
_SHARED_GATE = "shared_expert_gate.weight"
# What a router adds to scores for its choice alone. Where it has that and groups, a group's score is that of its best
# two experts.
_CORRECTION = "e_score_correction_bias"
_OF_GROUP = 2
# Keys of a config.json: how many groups a router chooses among first, and of how many of them a token's experts are;
# and what configuration classes take, where that isn't one group.
_GROUPS, _CHOSEN_GROUPS = "n_group", "topk_group"
_GROUPS_UNSTATED = {"axk1": (8, 4), "deepseek_v3": (8, 4), "deepseek_v32": (8, 4)}
# Of stacked down projections, which is no neuron's.
_BIAS = "experts.down_proj_bias"
# What modules call tensors that files call something else.
_OF_GRANITE = (
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
)
_OF_MIXTRAL = (("block_sparse_moe.", "mlp."),)


@dataclass(frozen=True)
class _Form:
    """How files may have experts, within their block: rows, then columns; {} stands for an expert's number."""

    rows: tuple[Owned, ...]
    columns: tuple[Owned, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    blocks: tuple[str, ...] = ("mlp",)

    @property
    def needed(self) -> list[str]:
        """Names of its tensors."""
        return [owned.tensor for owned in (*self.rows, *self.columns)]

    def owned(self, block: str, count: int) -> list[tuple[Owned, ...]]:
        """What neurons of so many experts of a block own: rows, and columns."""
        return [
            tuple(one for it in part for one in _of_experts(it, block, count)) for part in (self.rows, self.columns)
        ]

    def whole(self, block: str, count: int) -> list[Owned]:
        """What so many experts of a block are."""
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
    _each("gate_proj", "up_proj", "down_proj"),
    _each("w1", "w3", "w2", blocks=("block_sparse_moe",), renamed=_OF_MIXTRAL),
    # Matrices [in, out], in which gate and up take turns.
    _Form(
        (
            Owned("experts.gate_up_proj", 2, per_unit=2, stacked=True),
            Owned("experts.gate_up_proj_bias", 1, per_unit=2, stacked=True),
        ),
        (Owned("experts.down_proj", 1, stacked=True),),
    ),
    _stacked("experts.gate_up_proj", "experts.down_proj", blocks=("mlp", "block_sparse_moe")),
    _stacked("input_linear.weight", "output_linear.weight", blocks=("block_sparse_moe",), renamed=_OF_GRANITE),
)


def _of_experts(owned: Owned, block: str, count: int) -> list[Owned]:
    if owned.stacked:
        return [Owned(f"{block}.{owned.tensor}", owned.axis, owned.per_unit, owned.parts, stacked=True)]
    names = (f"{block}.{owned.tensor.format(expert)}" for expert in range(count))
    return [Owned(name, owned.axis, expert=expert) for expert, name in enumerate(names)]


def find_experts(config: Mapping[str, Any], parts: Sequence[Shapes], refusal: Refusal) -> Experts:
    """The experts of a model that has some.

    Args:
        parts: the tensors of each layer, by their names within it.
        refusal: what to raise, made of the reason.

    Raises:
        Exception: as ``refusal`` makes it: naming what is missing, or what is there besides.
    """
    for form in _FORMS:
        for block in form.blocks:
            first = [f"{block}.{name.format(0)}" for name in form.needed]
            layers = tuple(number for number, there in enumerate(parts) if all(name in there for name in first))
            if layers:
                return _Found(config, parts, refusal, block=block).experts(form, layers)
    raise refusal("it is a mixture of experts of a kind that isn't known")


class _Found:
    """A model whose experts' form is known, and whether all of it is as it must be."""

    def __init__(self, config: Mapping[str, Any], parts: Sequence[Shapes], refusal: Refusal, *, block: str) -> None:
        self._config = config
        self._parts = parts
        self._refusal = refusal
        self._block = block

    def experts(self, form: _Form, layers: tuple[int, ...]) -> Experts:
        """All that is to know of them."""
        count, chosen = self._number(), self._config.get(CHOSEN)
        if not isinstance(chosen, int) or not 0 < chosen <= count:
            raise self._refusal(f"num_experts_per_tok in config.json is {chosen!r}, of {count} experts")
        rows, columns = form.owned(self._block, count)
        shared = self._shared(self._parts[layers[0]])
        routers = self._routers(self._parts[layers[0]])
        known = {owned.tensor for owned in (*rows, *columns)} | {*routers}
        known |= {f"{shared.name}.{name}.weight" for name in MLP} if shared else set()
        for layer in layers:
            self._check(layer, known)
        if shared is not None and form.renamed:
            raise self._refusal(f"{shared.name} is beside experts that modules call something else")
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
            whole=(*form.whole(self._block, count), *(Owned(name, 0) for name in routers)),
            groups=groups,
            fewest=fewest,
            shared=shared,
            renamed=form.renamed,
        )

    def _fields(self, column: Owned, layers: tuple[int, ...]) -> tuple[str, ...]:
        """Those that say how wide experts are: one, or where no layer has a plain MLP all that say the same."""
        stated = [key for key in WIDTHS if self._config.get(key) is not None]
        shape = self._parts[layers[0]][column.tensor]
        saying = [key for key in stated if self._config[key] == shape[column.axis]]
        return tuple((saying if len(layers) == len(self._parts) else saying[:1]) or stated[:1])

    def _numbers(self) -> dict[str, int]:
        return {key: self._config[key] for key in NUMBERS if isinstance(self._config.get(key), int)}

    def _number(self) -> int:
        stated = self._numbers()
        if len({*stated.values()}) > 1:
            raise self._refusal(f"config.json disagrees with itself about the number of experts ({stated})")
        return int(next(iter(stated.values())))

    def _routers(self, there: Shapes) -> list[str]:
        """What chooses among a layer's experts: weights and biases that have a row for each."""
        inside = ((name, name.removeprefix(f"{self._block}.")) for name in sorted(there))
        return [name for name, own in inside if own != name and _ROUTERS.fullmatch(own)]

    def _groups(self, count: int, chosen: int, routers: Sequence[str]) -> tuple[int, int]:
        """The groups among which a router chooses first, and how many experts it needs in all of them."""
        corrected = any(name.endswith(_CORRECTION) for name in routers)
        unstated = _GROUPS_UNSTATED.get(str(self._config.get("model_type")), (1, 1)) if corrected else (1, 1)
        stated = (self._config.get(key, usual) for key, usual in zip((_GROUPS, _CHOSEN_GROUPS), unstated, strict=True))
        groups, chosen_groups = (it or 1 for it in stated)
        if not isinstance(groups, int) or groups < 1 or count % groups:
            raise self._refusal(f"{_GROUPS} in config.json is {groups!r}, of {count} experts")
        if not isinstance(chosen_groups, int) or not 1 <= chosen_groups <= groups:
            raise self._refusal(f"{_CHOSEN_GROUPS} in config.json is {chosen_groups!r}, of {groups} groups")
        of_group = max(-(-chosen // chosen_groups), _OF_GROUP if corrected and groups > 1 else 1)
        # A model with one expert is no mixture, and a router may have one group whose best two it looks for.
        return groups, max(of_group * groups, 2)

    def _shared(self, there: Shapes) -> Shared | None:
        names = [name for name in _SHARED if any(it.startswith(f"{self._block}.{name}.") for it in there)]
        if not names:
            return None
        if self._config.get(SHARED_WIDTH) is not None:
            return Shared(f"{self._block}.{names[0]}", SHARED_WIDTH)
        copies = self._config.get(SHARED_NUMBER)
        if not isinstance(copies, int) or copies < 1 or self._config.get(WIDTHS[0]) is None:
            raise self._refusal(f"config.json doesn't say how wide {self._block}.{names[0]} is")
        return Shared(f"{self._block}.{names[0]}", WIDTHS[0], copies)

    def _check(self, layer: int, known: set[str]) -> None:
        there = self._parts[layer]
        if missing := sorted(known - there.keys()):
            raise self._refusal(f"layer {layer} has no {missing[0]}")
        others = {f"{self._block}.{name}" for name in (_BIAS, _SHARED_GATE)}
        for name in sorted(there.keys() - known - others):
            if name.startswith(f"{self._block}."):
                raise self._refusal(f"in layer {layer}, {name} is no part of experts of a kind that is known")
