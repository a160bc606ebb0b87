"""Expansion of a configuration into a plan: the stages that the rows of its table need, with their settings.

Pure and instant: no torch, no clock, nothing written. Two sweeps that want the same result plan the same stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.kinds.importance import StudentParameters
from hfprune_dist.kinds.placement import choose_micro_batches
from hfprune_dist.methods.sdmprune import LACKS, PUBLISHED
from hfprune_dist.planning.legality import can_do, refuse_criteria, refuse_model, suited
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.plan import NONE, OWN, Cell, Plan, label_of
from hfprune_dist.planning.planned_stages import PlannedStages, Variant
from hfprune_dist.planning.ratios import check_ratios, with_numbers
from hfprune_dist.planning.refusals import check_positions, check_recovery, place_of, refuse_same_rows
from hfprune_dist.planning.scoring_passes import (
    Scored,
    check_criteria,
    first_criteria,
    part_of,
    scored_for,
)
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input, Stage
from hfprune_dist.structures import NEURONS, kinds_among


def build_plan(
    config: SweepConfig,
    models: Sequence[ModelSource],
    methods: Mapping[str, Method],
    hashes: FileHashes,
    device: str = "",
) -> Plan:
    """Expand a sweep into stages and cells; stages that several cells need appear once.

    Args:
        device: the device that efficiency is measured on, if it is measured at all.

    Raises:
        UserError: for a ratio that a model can't reach, rows that would be the same, input text that can't be read,
            generations beyond a model's positions, or a method that prunes during recovery if there is no recovery.
    """
    config = choose_micro_batches(config, [], {})  # 1 where still to be chosen
    check_criteria(config)
    check_recovery(config, methods)
    planner = _Planner(config, methods, hashes, device)
    for model in models:
        planner.check_ratios(model)
    cells = [cell for model in models for cell in planner.cells(model)]
    refuse_same_rows(cells)
    return Plan(planner.stages.by_id, tuple(cells), tuple(planner.asked))


def student_of(method: Method, ratio: float) -> StudentParameters | None:
    """The settings of the model without some neurons on which a method's criterion computes its scores, as published
    for the nearest ratio (of two equally near ones, the smaller); None if its criterion needs none.
    """
    if method.student_chosen_by is None:
        return None
    share, temperature = PUBLISHED[min(PUBLISHED, key=lambda published: (round(abs(published - ratio), 12), published))]
    return StudentParameters(lacks=LACKS, teacher_share=share, teacher_temperature=temperature)


class _Planner:
    """Lays out the cells of each model, and the stages that they need."""

    def __init__(self, config: SweepConfig, methods: Mapping[str, Method], hashes: FileHashes, device: str) -> None:
        self.config = config
        self.methods = methods
        self.stages = PlannedStages(config, hashes, device)
        self.asked: list[str] = []

    def check_ratios(self, model: ModelSource) -> None:
        """Refuse ratios that a method can't reach on a model, before any text is read."""
        for name, method in self._methods_for(model).items():
            check_ratios(model.checkpoint, self.config.ratios, method, place_of(model.name, name))

    def cells(self, model: ModelSource) -> list[Cell]:
        methods = self._methods_for(model)
        check_positions(self.config.efficiency, model)
        dense = Input(model.identity, str(model.checkpoint.path), content=model.content)
        # First, since most of the sweep waits for it.
        importance = self._importance_for_all(model, dense)
        label = label_of(model.name, None, None, NONE)
        cells = self._finish(Variant(label, model, dense, dense, dense))
        for ratio in self.config.ratios:
            for name, method in methods.items():
                settled = with_numbers(method, model.checkpoint, ratio, place_of(model.name, name))
                label = label_of(model.name, ratio, name if len(self.methods) > 1 else None, NONE)
                variant = Variant(label, model, dense, dense, dense, ratio, name)
                cells += self._pruned(variant, settled, importance)
        return cells

    def _methods_for(self, model: ModelSource) -> dict[str, Method]:
        """The methods that apply to a model: all but adaptive ones that can do nothing there.

        Raises:
            UserError: if none is left.
        """
        left = {name: method for name, method in self.methods.items() if can_do(method, model.checkpoint)}
        if not left:
            name, method = next(iter(self.methods.items()))
            refuse_model(method, model.checkpoint, place_of(model.name, name))
        return left

    def _pruned(self, variant: Variant, method: Method, importance: Stage | None) -> list[Cell]:
        """Lay out the stages and cells of a dense model that a method prunes at the variant's ratio.

        Args:
            method: with numbers, as ``with_numbers`` returns it.
            importance: None if no method needs scores.
        """
        assert variant.ratio is not None
        if method.prunes_in == "recovery":
            return [self._pruned_in_recovery(variant, method, variant.ratio)]
        assert importance is not None, "the method needs scores"
        chain = self._chain(variant, importance, variant.ratio, method)
        cut = next(stage.as_input() for stage in chain if stage.kind == "prune")
        producers = tuple(stage.id for stage in chain)
        return self._finish(replace(variant, checkpoint=chain[-1].as_input(), cut=cut, producers=producers))

    def _importance_for_all(self, model: ModelSource, dense: Input) -> Stage | None:
        """One pass for all methods that need scores and for further criteria; None if there are neither."""
        used = self._methods_for(model) if self.config.ratios else {}
        methods = [suited(method, model.checkpoint) for method in used.values()]
        scoring = [method for method in methods if method.prunes_in == "calibration"]
        needed = {criterion for method in scoring for criterion in first_criteria(method)}
        pruned = {structure for method in scoring for structure in method.structures} or {NEURONS}
        refuse_criteria(self.config.importance.criteria, model.checkpoint, pruned)
        criteria = needed.union(self.config.importance.criteria)
        if not scoring and not criteria:
            return None
        importance = self.stages.importance(model.name, {"model": dense}, Scored(criteria, kinds_among(pruned)))
        has_further_criteria = criteria > needed
        self.asked += [importance.id] if has_further_criteria else []
        return importance

    def _pruned_in_recovery(self, variant: Variant, method: Method, ratio: float) -> Cell:
        """Lay out the training that prunes and recovers at the same time, and its evaluation."""
        made = self.stages.loraprune(variant, method, ratio)
        pruned = replace(variant, checkpoint=made.as_input(), cut=made.as_input())
        return self._cell(pruned, OWN, (made.id,), self.stages.evaluate(variant.label, pruned, made.as_input()))

    def _finish(self, variant: Variant) -> list[Cell]:
        """Lay out recovery and evaluation of one checkpoint; the dense model is also evaluated as it is."""
        recovery = self.config.recovery.method
        cells = []
        if variant.ratio is None or recovery == NONE:
            evaluate = self.stages.evaluate(variant.label, variant, variant.checkpoint)
            cells.append(self._cell(variant, NONE, variant.producers, evaluate))
        if recovery != NONE:
            recover = self.stages.recover(variant)
            evaluate = self.stages.evaluate(f"{variant.label} + {recovery}", variant, recover.as_input())
            cells.append(self._cell(variant, recovery, (*variant.producers, recover.id), evaluate))
        return cells

    def _cell(self, variant: Variant, recovery: str, producers: tuple[str, ...], evaluate: Stage) -> Cell:
        criterion = None if variant.method is None else self.methods[variant.method].criterion
        measured = self.stages.efficiency(variant).id if self.config.efficiency.enabled else None
        return Cell(
            label=evaluate.label,
            model=variant.source.name,
            ratio=variant.ratio,
            method=variant.method,
            criterion=criterion,
            recovery=recovery,
            producers=producers,
            evaluate=evaluate.id,
            efficiency=measured,
        )

    def _chain(self, variant: Variant, importance: Stage, ratio: float, method: Method) -> list[Stage]:
        """All stages from the dense model's scores to the checkpoint before recovery, in order."""
        scored = scored_for(method)
        scores = [importance, *self._student(variant, importance, scored, ratio, method)]
        inputs = {"model": variant.dense, "importance": part_of(scores[-1], scored)}
        cut = self.stages.prune(variant.label, inputs, ratio, method)
        return [*scores, cut, *self._distillation(variant, importance, cut.as_input(), method.distill)]

    def _student(
        self, variant: Variant, importance: Stage, scored: Scored, ratio: float, method: Method
    ) -> list[Stage]:
        """The pass over the student that the dense model's scores choose, for a method that has one."""
        student = student_of(method, ratio)
        if student is None:
            return []
        chosen_by = Scored(first_criteria(method), [NEURONS])
        inputs = {"model": variant.dense, "student": part_of(importance, chosen_by)}
        return [self.stages.importance(f"{variant.label} student", inputs, scored, student)]

    def _distillation(self, variant: Variant, importance: Stage, pruned: Input, passes: int) -> list[Stage]:
        """The distillation of a pruned model, on the windows of ``importance``, and the reference that it needs."""
        if not passes:
            return []
        reference = self.stages.reference_of_calibration(importance)
        return [reference, self.stages.distill(variant, pruned, reference, passes)]
