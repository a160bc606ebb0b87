"""What pruning removes as a whole, and what of a checkpoint belongs to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

# The kinds of units, which are scored.
Kind = Literal["neurons", "kv_groups", "experts"]
# What methods name. Layers have no scores: what a model loses without one is measured.
Structure = Literal[Kind, "layers"]
NEURONS: Kind = "neurons"
KV_GROUPS: Kind = "kv_groups"
EXPERTS: Kind = "experts"
LAYERS: Structure = "layers"
# What may go together, neurons in any case. Experts go alone.
TOGETHER: tuple[Structure, ...] = (NEURONS, KV_GROUPS, LAYERS)
# What methods call neurons too: those of experts, and of the MLP that all tokens go through beside them.
EXPERT_NEURONS, SHARED_NEURONS = "expert_neurons", "shared_neurons"


def kinds_among(structures: Iterable[Structure]) -> list[Kind]:
    """The kinds of units among structures that are pruned, in one order whatever the order that they are given in."""
    pruned = set(structures)
    return [kind for kind in get_args(Kind) if kind in pruned]


def structure_of(kind: str) -> str:
    """What methods call a kind of units."""
    return NEURONS if kind in (EXPERT_NEURONS, SHARED_NEURONS) else kind
