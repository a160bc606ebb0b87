"""Expansion of a configuration into a plan: the rows of its table, and the stages that they need, with their settings.

Pure and instant: no torch, no clock, nothing written. Two sweeps that want the same result plan the same stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_dist.config.method import Method
from hfprune_dist.config.parameters import Parameters
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import TextSource
from hfprune_dist.config.texts import FIRST, reference_role
from hfprune_dist.data.text import identity_of
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.efficiency import EfficiencyParameters
from hfprune_dist.kinds.evaluate import EvaluateParameters
from hfprune_dist.kinds.importance import ImportanceParameters, StudentParameters
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.kinds.reference import ReferenceParameters
from hfprune_dist.kinds.training import DistillParameters, LoraPruneParameters, RecoverParameters
from hfprune_dist.methods import CRITERIA
from hfprune_dist.planning.methods import can_do, refuse_criteria, refuse_model, suited
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.plan import NONE, OWN, Cell, Plan, label_of
from hfprune_dist.planning.ratios import check_ratios, place_of, with_numbers
from hfprune_dist.planning.user_files import own_tasks
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
    in_recovery = [name for name, method in methods.items() if method.prunes_in == "recovery"]
    if in_recovery and config.recovery.method == NONE:
        raise UserError(
            f"--methods {', '.join(in_recovery)}: units go while LoRA recovers the model (prunes_in: recovery), and "
            "recovery.method is none; set it to lora, or leave the method out"
        )
    planner = _Planner(config, methods, hashes, device)
    for model in models:  # before any text is read
        for name, method in planner.methods_for(model).items():
            check_ratios(model.checkpoint, config.ratios, method, place_of(model.name, name))
    cells = [cell for model in models for cell in planner.rows(model)]
    _refuse_same_rows(cells)
    return Plan(planner.stages, tuple(cells), tuple(planner.asked))


def _refuse_same_rows(cells: Iterable[Cell]) -> None:
    """Refuse rows that differ in nothing but their names."""
    labels: dict[str, str] = {}
    for cell in cells:
        label = label_of(cell.model, cell.ratio, cell.method, cell.recovery)
        if cell.evaluate in labels:
            raise UserError(
                f"rows {labels[cell.evaluate]!r} and {label!r} would be the same: their models have the same "
                "content, and their methods do the same at this ratio; leave one of them out"
            )
        labels[cell.evaluate] = label


def _first_criteria(method: Method) -> set[str]:
    """The criterion by which a method needs the dense model scored: its own, or the one that chooses its student; empty
    if the method scores while it prunes.
    """
    return {CRITERIA[name].student_of or name for name in method.scored_before}


def _scores(importance: Stage, criteria: Iterable[str], structures: Sequence[str]) -> Input:
    """The artifact of a calibration pass, identified as if the pass had computed only these scores: others that share
    the pass change neither these scores nor the windows.
    """
    assert isinstance(importance.params, ImportanceParameters)
    alone = replace(importance, params=importance.params.scoring(criteria, structures))
    return replace(importance.as_input(), identity=alone.id)


@dataclass(frozen=True)
class _Variant:
    """A checkpoint before recovery: the dense one, or one that a method pruned at a ratio.

    ``cut`` has the same shape: if the checkpoint was distilled, ``cut`` is what it was before distillation.
    """

    label: str
    model: str
    dense: Input
    checkpoint: Input
    cut: Input
    ratio: float | None = None
    method: str | None = None
    producers: tuple[str, ...] = ()


class _Planner:
    """Lays out the rows of each model, and the stages that they need.

    Attributes:
        stages: all stages so far by id, in the order in which they were first needed.
        asked: see ``Plan``.
    """

    def __init__(self, config: SweepConfig, methods: Mapping[str, Method], hashes: FileHashes, device: str) -> None:
        self._config = config
        self._methods = methods
        self._hashes = hashes
        self._device = device
        self._own_tasks = own_tasks(config.evaluation.include_path, hashes)
        self.stages: dict[str, Stage] = {}
        self.asked: list[str] = []

    def methods_for(self, model: ModelSource) -> dict[str, Method]:
        """The methods that apply to a model, as they suit it: all but adaptive ones that can do nothing there.

        Raises:
            UserError: if none is left.
        """
        checkpoint = model.checkpoint
        left = {name: suited(own, checkpoint) for name, own in self._methods.items() if can_do(own, checkpoint)}
        if not left:
            name, method = next(iter(self._methods.items()))
            refuse_model(method, checkpoint, place_of(model.name, name))
        return left

    def rows(self, model: ModelSource) -> list[Cell]:
        """The rows of a model: the dense one, and for each ratio those of the methods."""
        self._check_positions(model)
        methods = self.methods_for(model) if self._config.ratios else {}
        dense = Input(model.identity, str(model.checkpoint.path), content=model.content)
        importance = self._importance_for_all(model, dense, methods)  # first, since most of the sweep waits for it
        cells = self._finish(_Variant(label_of(model.name, None, None, NONE), model.name, dense, dense, dense))
        for ratio in self._config.ratios:
            for name, method in methods.items():
                label = label_of(model.name, ratio, name if len(self._methods) > 1 else None, NONE)
                variant = _Variant(label, model.name, dense, dense, dense, ratio, name)
                numbered = with_numbers(method, model.checkpoint)
                if method.prunes_in == "recovery":
                    cells.append(self._pruned_in_recovery(variant, numbered, ratio))
                else:
                    assert importance is not None
                    cells += self._finish(self._pruned(variant, numbered, ratio, importance))
        return cells

    def _check_positions(self, model: ModelSource) -> None:
        """Refuse generations that are longer than the number of a model's positions."""
        efficiency, positions = self._config.efficiency, model.checkpoint.max_positions
        longest = max(efficiency.prompt_tokens) + efficiency.new_tokens
        if efficiency.enabled and positions is not None and longest > positions:
            raise UserError(
                f"efficiency: the longest of prompt_tokens and new_tokens are {longest} together, more than the "
                f"{positions} positions of model {model.name!r} (max_position_embeddings); choose fewer"
            )

    def _importance_for_all(self, model: ModelSource, dense: Input, methods: Mapping[str, Method]) -> Stage | None:
        """One pass for all methods that need scores and for further criteria; None if there are neither."""
        scoring = [method for method in methods.values() if method.prunes_in == "calibration"]
        needed = {criterion for method in scoring for criterion in _first_criteria(method)}
        pruned = {structure for method in scoring for structure in method.structures} or {NEURONS}
        refuse_criteria(self._config.importance.criteria, model.checkpoint, pruned)
        criteria = needed.union(self._config.importance.criteria)
        if not scoring and not criteria:
            return None
        importance = self._importance(model.name, {"model": dense}, criteria, kinds_among(pruned))
        self.asked += [importance.id] if criteria > needed else []
        return importance

    def _importance(
        self,
        label: str,
        inputs: dict[str, Input],
        criteria: Iterable[str],
        structures: Sequence[str],
        student: StudentParameters | None = None,
    ) -> Stage:
        for share in self._config.calibration.shares():
            inputs = inputs | self._text(share.role, share.text)
        params = ImportanceParameters.from_config(self._config, criteria, structures, student)
        return self._stage("importance", label, params, inputs)

    def _pruned(self, variant: _Variant, method: Method, ratio: float, importance: Stage) -> _Variant:
        """The dense model that a method with numbers prunes: student, cut and distillation."""
        chain, dense = [importance], variant.dense
        structures = kinds_among(method.structures)
        if method.student_chosen_by is not None:
            scores = {"model": dense, "student": _scores(importance, _first_criteria(method), [NEURONS])}
            student = StudentParameters.at_ratio(ratio)
            label = f"{variant.label} student"
            chain.append(self._importance(label, scores, method.scored_before, structures, student))
        params: Parameters = PruneParameters.from_method(self._config, method, ratio)
        inputs = {"model": dense, "importance": _scores(chain[-1], method.scored_before, structures)}
        cut = self._stage("prune", variant.label, params, inputs)
        chain.append(cut)
        if method.distill:
            params = ReferenceParameters.of_calibration(self._config.distillation)
            inputs = {"model": dense, "importance": _scores(importance, [], [NEURONS])}
            reference = self._stage("reference", f"{importance.label} calibration", params, inputs)
            settings = self._config.distillation
            params = DistillParameters(distillation=settings, passes=method.distill, seed=self._config.seed)
            inputs = {"model": cut.as_input(), "reference": reference.as_input()}
            chain += [reference, self._stage("distill", variant.label, params, inputs)]
        producers = tuple(stage.id for stage in chain)
        return replace(variant, checkpoint=chain[-1].as_input(), cut=cut.as_input(), producers=producers)

    def _pruned_in_recovery(self, variant: _Variant, method: Method, ratio: float) -> Cell:
        """The training that prunes and recovers at the same time, and its evaluation."""
        inputs = {"model": variant.dense, **self._text("instructions", self._config.recovery)}
        made = self._stage(
            "loraprune", variant.label, LoraPruneParameters.from_method(self._config, method, ratio), inputs
        )
        pruned = replace(variant, checkpoint=made.as_input(), cut=made.as_input(), producers=(made.id,))
        return self._row(pruned, OWN)

    def _finish(self, variant: _Variant) -> list[Cell]:
        """Recovery and evaluation of one checkpoint; the dense model is also evaluated as it is."""
        recovery = self._config.recovery
        cells = [self._row(variant, NONE)] if variant.ratio is None or recovery.method == NONE else []
        if recovery.method != NONE:
            inputs = {"model": variant.checkpoint, **self._text("instructions", recovery)}
            params = RecoverParameters(recovery=recovery, seed=self._config.seed)
            recover = self._stage("recover", variant.label, params, inputs)
            producers = (*variant.producers, recover.id)
            cells.append(
                self._row(replace(variant, checkpoint=recover.as_input(), producers=producers), recovery.method)
            )
        return cells

    def _row(self, variant: _Variant, recovery: str) -> Cell:
        """The row of a checkpoint, with the stages that measure it."""
        label = variant.label if recovery in (NONE, OWN) else f"{variant.label} + {recovery}"
        inputs = {"model": variant.checkpoint, "dense": variant.dense}
        inputs |= self._references_of_held_out(variant) | self._own_tasks
        evaluate = self._stage("evaluate", label, EvaluateParameters.from_config(self._config.evaluation), inputs)
        measured = None
        if self._config.efficiency.enabled:  # of the shape, which recovery and distillation don't change
            params = EfficiencyParameters.from_config(self._config.efficiency, self._device)
            inputs = {"model": variant.cut, "dense": variant.dense}
            measured = self._stage("efficiency", variant.label, params, inputs).id
        return Cell(
            label=label,
            model=variant.model,
            ratio=variant.ratio,
            method=variant.method,
            criterion=None if variant.method is None else self._methods[variant.method].criterion,
            recovery=recovery,
            producers=variant.producers,
            evaluate=evaluate.id,
            efficiency=measured,
        )

    def _references_of_held_out(self, variant: _Variant) -> dict[str, Input]:
        """References on the texts that fidelity is measured on: role of an evaluation's input -> reference."""
        evaluation = self._config.evaluation
        references: dict[str, Input] = {}
        for name, text in evaluation.fidelity.each().items():
            params = ReferenceParameters.of_held_out(evaluation, text)
            inputs = {"model": variant.dense, **self._text("text", text)}
            stage = self._stage("reference", f"{variant.model} held-out {name}".rstrip(), params, inputs)
            if stage.as_input() in references.values():
                raise UserError(
                    f"evaluation.fidelity.texts: {name} has the content of another text; leave one of them out"
                )
            references[reference_role(name if references else FIRST)] = stage.as_input()
        return references

    def _stage(self, kind: str, label: str, params: Parameters, inputs: Mapping[str, Input]) -> Stage:
        """A stage, or the equal one that is planned already."""
        stage = Stage(kind, label, params, inputs)
        return self.stages.setdefault(stage.id, stage)

    def _text(self, role: str, source: TextSource) -> dict[str, Input]:
        """A text file as an input, identified by its content; nothing for a data set, which the settings name."""
        if source.path is None:
            return {}
        file = Path(source.path)
        return {role: Input(identity_of(file, self._hashes), str(file), content="text")}
