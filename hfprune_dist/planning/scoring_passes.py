"""Calibration passes in a plan: their criteria and settings, and how other stages identify them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from hfprune_dist.config.method import Method
from hfprune_dist.config.parameters import ImportanceParameters, StudentParameters
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.core.criteria import CRITERIA, CriterionName
from hfprune_dist.errors import UserError
from hfprune_dist.store.stage import Input, Stage
from hfprune_dist.structures import Kind, kinds_among


@dataclass(frozen=True)
class Scored:
    """What a calibration pass scores: units of these kinds, each by all of these criteria.

    ``biased``: whether the model has biases.
    """

    criteria: Set[CriterionName]
    structures: list[Kind]
    biased: bool = False


def scored_for(method: Method, *, biased: bool) -> Scored:
    """The scores that a method prunes by."""
    return Scored(method.scored_before, kinds_among(method.structures), biased)


def first_criteria(method: Method) -> frozenset[CriterionName]:
    """The criterion by which a method needs the dense model scored: its own, or the one that chooses its student; empty
    if the method scores while it prunes.
    """
    return frozenset(CRITERIA[name].student_of or name for name in method.scored_before)


def pass_parameters(
    config: SweepConfig, scored: Scored, student: StudentParameters | None = None
) -> ImportanceParameters:
    """The settings of a pass that computes the given scores."""
    by_sums = None
    if config.calibration.settled is not None:
        # Criteria whose scores are more than sums have a say in where the pass ends, too, by their sums. Fingerprints
        # include them, since there are older artifacts whose passes ignored them.
        beyond_sums = [name for name in scored.criteria if CRITERIA[name].has_halves and not CRITERIA[name].is_its_sum]
        by_sums = sorted(beyond_sums) or None
    return ImportanceParameters(
        # The stage has one setting for BOS, wherever the configuration sets it.
        calibration=config.calibration.model_copy(update={"add_bos_token": None}),
        criteria=[],
        dtype=config.importance.dtype,
        add_bos_token=config.calibrates_with_bos,
        seed=config.seed,
        settled_by_sums_of=by_sums,
        biases="added before rounding" if scored.biased and config.importance.dtype == "bfloat16" else None,
        student=student,
    ).scoring(scored.criteria, scored.structures)


def part_of(importance: Stage, scored: Scored) -> Input:
    """The artifact of a calibration pass, identified as if the pass had computed only these scores: others that share
    the pass change neither these scores nor the windows, unless criteria decide where it ends.
    """
    params = importance_parameters(importance)
    if params.calibration.settled is not None:
        return importance.as_input()
    alone = replace(importance, params=params.scoring(scored.criteria, scored.structures))
    return replace(importance.as_input(), identity=alone.id)


def importance_parameters(stage: Stage) -> ImportanceParameters:
    """The settings of a planned pass."""
    assert isinstance(stage.params, ImportanceParameters)
    return stage.params


def check_criteria(config: SweepConfig, methods: Mapping[str, Method]) -> None:
    """Refuse further criteria that score a student, which only a method can choose, and an early end of calibration if
    no criterion of the sweep can tell when.
    """
    for name in config.importance.criteria:
        chosen_by = CRITERIA[name].student_of
        if chosen_by is not None:
            raise UserError(
                f"importance.criteria: {name} scores a student that a method chooses by {chosen_by}; prune by it "
                "instead, as the method sdmprune does"
            )
    criteria = {*config.importance.criteria}.union(*map(first_criteria, methods.values()))
    scoring = [method for method in methods.values() if method.prunes_in == "calibration"]
    if config.calibration.settled is None or any(CRITERIA[name].has_halves for name in criteria):
        return
    if not scoring and not criteria:
        return  # no pass
    of_none = {method.scored_by for method in scoring if not method.scored_before}
    named = ", ".join(sorted(criteria | of_none))
    able = [name for name, it in CRITERIA.items() if it.has_halves and it.student_of is None]
    raise UserError(
        f"calibration.settled: {named} alone can't show when what is kept has settled; set it to null, or add one of "
        f"these to importance.criteria: {', '.join(able)}"
    )
