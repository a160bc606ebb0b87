"""Calibration passes in a plan: their criteria and settings, and how other stages identify them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.importance import ImportanceParameters
from hfprune_dist.methods import CRITERIA, CriterionName
from hfprune_dist.store.stage import Input, Stage
from hfprune_dist.structures import Kind, kinds_among


@dataclass(frozen=True)
class Scored:
    """What a calibration pass scores: units of these kinds, each by all of these criteria."""

    criteria: Set[CriterionName]
    structures: list[Kind]


def scored_for(method: Method) -> Scored:
    """The scores that a method prunes by."""
    return Scored(method.scored_before, kinds_among(method.structures))


def first_criteria(method: Method) -> frozenset[CriterionName]:
    """The criterion by which a method needs the dense model scored: its own, or the one that chooses its student; empty
    if the method scores while it prunes.
    """
    return frozenset(CRITERIA[name].student_of or name for name in method.scored_before)


def part_of(importance: Stage, scored: Scored) -> Input:
    """The artifact of a calibration pass, identified as if the pass had computed only these scores: others that share
    the pass change neither these scores nor the windows.
    """
    params = importance_parameters(importance)
    alone = replace(importance, params=params.scoring(scored.criteria, scored.structures))
    return replace(importance.as_input(), identity=alone.id)


def importance_parameters(stage: Stage) -> ImportanceParameters:
    """The settings of a planned pass."""
    assert isinstance(stage.params, ImportanceParameters)
    return stage.params


def check_criteria(config: SweepConfig) -> None:
    """Refuse further criteria that score a student, which only a method can choose."""
    for name in config.importance.criteria:
        chosen_by = CRITERIA[name].student_of
        if chosen_by is not None:
            raise UserError(
                f"importance.criteria: {name} scores a student that a method chooses by {chosen_by}; prune by it "
                "instead, as the method sdmprune does"
            )
