"""Structures that pruning removes as a whole, and the parts of a checkpoint that belong to them.

``layout`` says which axes the dimensions of tensors follow; ``units`` what a unit is, an index of a layer's axis, and
makes neurons and KV groups of a config.json; ``experts`` makes those of mixtures. ``kept`` is what stays of a model and
how large that is, ``low_rank`` describes projections that are replaced by two factors, ``score_names`` how scores are
stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

# Kinds of units, all of which are scored.
UnitKind = Literal["neurons", "kv_groups", "experts"]
# Structures that a method can name. Layers have no scores: what a model loses without one is measured.
Structure = Literal[UnitKind, "layers"]
NEURONS: UnitKind = "neurons"
KV_GROUPS: UnitKind = "kv_groups"
EXPERTS: UnitKind = "experts"
LAYERS: Structure = "layers"
# Structures that one method can prune together, neurons always among them. Experts are pruned by themselves.
TOGETHER: tuple[Structure, ...] = (NEURONS, KV_GROUPS, LAYERS)
# Kinds that methods also call neurons: those of experts, and those of the shared MLP that every token goes through.
EXPERT_NEURONS, SHARED_NEURONS = "expert_neurons", "shared_neurons"
ALL_KINDS: frozenset[str] = frozenset({*get_args(UnitKind), EXPERT_NEURONS, SHARED_NEURONS})


def kinds_among(structures: Iterable[Structure]) -> list[UnitKind]:
    """Return the kinds of units among the pruned structures, always in the same order."""
    pruned = set(structures)
    return [kind for kind in get_args(UnitKind) if kind in pruned]
