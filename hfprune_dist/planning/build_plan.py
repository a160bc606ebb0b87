"""Expansion of a configuration into a plan: the rows of its table, and the stages that they need, with their settings.

Pure and instant: no torch, no clock, nothing written. Two sweeps that want the same result plan the same stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.load import parse
from hfprune_dist.config.method import Method
from hfprune_dist.config.parameters import Parameters
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import TextSource
from hfprune_dist.config.texts import FIRST, reference_role
from hfprune_dist.config.training import RecoveryConfig, Training, layers_of
from hfprune_dist.data.text import identity_of
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.answers import AnswersParameters
from hfprune_dist.kinds.check import CheckParameters
from hfprune_dist.kinds.efficiency import EfficiencyParameters
from hfprune_dist.kinds.evaluate import EvaluateParameters
from hfprune_dist.kinds.importance import ImportanceParameters, StudentParameters
from hfprune_dist.kinds.memory import GIB, ITEMSIZE
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.kinds.reference import ReferenceParameters
from hfprune_dist.kinds.training import LoraPruneParameters, RecoverParameters
from hfprune_dist.methods import CRITERIA
from hfprune_dist.planning.methods import can_do, refuse_criteria, refuse_rounds
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.plan import NONE, OWN, Cell, Plan, label_of, recovery_name
from hfprune_dist.planning.ratios import check_ratios, place_of, with_numbers
from hfprune_dist.planning.user_files import own_tasks
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import CUTTING, Input, Stage, releases_of
from hfprune_dist.structures import NEURONS, UnitKind, kinds_among

# The most that a dense model's hidden states may take on disk; it runs beside the model that is trained otherwise.
STORED_BYTES = 64 * GIB


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
            generations beyond a model's positions, or trainings that don't suit a model or a method.
    """
    in_recovery = [name for name, method in methods.items() if method.prunes_in == "recovery"]
    needed = {"method": "lora", "objective": "labels", "text": "instructions", "evaluate_every": None, "patience": None}
    for key, value in needed.items() if in_recovery else ():
        if (given := getattr(config.recovery, key)) not in (value, "auto"):
            raise UserError(
                f"--methods {', '.join(in_recovery)}: units go while LoRA recovers the model (prunes_in: recovery), "
                f"and recovery.{key} is {given}; set it to {value or 'null'}, or leave the method out"
            )
    if in_recovery:  # by the section itself, whatever recipes say
        section, where = config.recovery.model_dump(exclude={"recipes"}), f"recovery, for {', '.join(in_recovery)}"
        parse(RecoveryConfig, section, where)
    if config.rounds:
        refuse_rounds(methods, config.recovery)
    planner = _Planner(config, methods, hashes, device)
    for model in models:  # before any text is read
        planner.check(model)
    cells = [cell for model in models for cell in planner.rows(model)]
    _refuse_same_rows(cells)
    return Plan(planner.stages, tuple(cells), tuple(planner.asked))


def _refuse_same_rows(cells: Iterable[Cell]) -> None:
    """Refuse rows that differ in nothing but their names."""
    labels: dict[str, str] = {}
    for cell in cells:
        if cell.evaluate in labels:
            raise UserError(
                f"rows {labels[cell.evaluate]!r} and {cell.label!r} would be the same: their models have the same "
                "content, and their methods and recipes do the same; leave one of them out"
            )
        labels[cell.evaluate] = cell.label


def _first_criteria(method: Method) -> set[str]:
    """The criterion by which a method needs the dense model scored: its own, or the one that chooses its student; empty
    if the method scores while it prunes.
    """
    return {CRITERIA[name].student_by or name for name in method.scored_before}


def _scores(importance: Stage, criteria: Iterable[str], structures: Sequence[UnitKind] = (NEURONS,)) -> Input:
    """The artifact of a calibration pass, identified as if the pass had computed only these scores: others that share
    the pass change neither these scores nor the windows.
    """
    scoring = {"criteria": sorted(criteria), "structures": list(structures)}
    alone = replace(importance, params=importance.params.model_copy(update=scoring))
    return replace(importance.as_input(), identity=alone.id)


@dataclass(frozen=True)
class _Variant:
    """A checkpoint: the dense model, or what a chain of stages, in order, makes of it; the last one writes it.

    Fields with the names of a ``Cell``'s are those of its row; ``recovery`` is a recipe's name alone.
    """

    model: str
    dense: Input
    ratio: float | None = None
    method: str | None = None
    recovery: str = NONE
    rounds: tuple[float, ...] = ()
    chain: tuple[Stage, ...] = ()

    @property
    def label(self) -> str:
        return label_of(self.model, self.ratio, self.method, recovery_name(self.recovery, self.rounds))

    @property
    def checkpoint(self) -> Input:
        return self.chain[-1].as_input() if self.chain else self.dense

    @property
    def cut(self) -> Input:
        """The checkpoint that has the same shape, before anything was trained."""
        return next((stage.as_input() for stage in reversed(self.chain) if stage.kind in CUTTING), self.dense)


class _Planner:
    """Lays out the rows of each model, and the stages that they need.

    Attributes:
        stages: all stages so far by id, in the order in which they were first needed.
        asked: see ``Plan``.
    """

    def __init__(self, config: SweepConfig, methods: Mapping[str, Method], hashes: FileHashes, device: str) -> None:
        self._config = config
        self._methods = methods
        self._identity_of = cache(partial(identity_of, hashes=hashes))  # a text may be of many rows
        self._device = device
        self._own_tasks = own_tasks(config.evaluation.include_path, hashes)
        self._trainings = config.recovery.trainings()
        self._after_refit = config.recovery.trainings(after_refit=True)
        self.stages: dict[str, Stage] = {}
        self.asked: list[str] = []

    def check(self, model: ModelSource) -> None:
        """Refuse ratios and methods that the model doesn't take, and generations longer than its positions."""
        for name, method in self._methods_for(model).items():
            ratios = [*self._config.ratios, *self._config.rounds]
            check_ratios(model.checkpoint, ratios, method, place_of(model.name, name))
        for name, training in (self._trainings | self._after_refit).items():
            if training is not None and (why := self._unfit(training, model.checkpoint)):
                raise UserError(f"recovery {name}: {why} (model {model.name!r})")
        efficiency, positions = self._config.efficiency, model.checkpoint.max_positions
        longest = max(efficiency.prompt_tokens) + efficiency.new_tokens
        if efficiency.enabled and positions is not None and longest > positions:
            raise UserError(
                f"efficiency: the longest of prompt_tokens and new_tokens are {longest} together, more than the "
                f"{positions} positions of model {model.name!r} (max_position_embeddings); choose fewer"
            )

    def _unfit(self, training: Training, checkpoint: Checkpoint) -> str:
        """Why a training can't be done, and what to do; empty if it can."""
        parts = training.parts if training.method == "parts" else []
        if training.method != "lora" and checkpoint.family.experts:
            return "mixtures of experts are trained by LoRA alone; set method: lora"
        if "norms" in parts and f"{checkpoint.family.norm}.weight" not in checkpoint.tensors:
            return "parts: norms have no weights here; choose among lm_head, embeddings and last_N_layers"
        if too_deep := [part for part in parts if layers_of(part) > checkpoint.num_layers]:
            return (
                f"parts: {too_deep[0]} of {checkpoint.num_layers}; choose at most last_{checkpoint.num_layers}_layers"
            )
        return ""

    def _methods_for(self, model: ModelSource) -> Mapping[str, Method]:
        """The methods that apply to a model: all but adaptive ones that can do nothing there; if that leaves none, all
        of them, which the model then refuses.
        """
        left = {name: method for name, method in self._methods.items() if can_do(method, model.checkpoint)}
        return left or self._methods

    def rows(self, model: ModelSource) -> list[Cell]:
        """The rows of a model: the dense one, for each ratio those of the methods, and those that go by rounds."""
        rounds = self._config.rounds
        methods = self._methods_for(model) if self._config.ratios or rounds else {}
        numbered = {name: with_numbers(method, model.checkpoint) for name, method in methods.items()}
        dense = Input(model.identity, str(model.checkpoint.path), content=model.content)
        importance = self._importance_for_all(model, dense, numbered)  # first, since most of the sweep waits for it
        cells = self._finish(_Variant(model.name, dense), model.checkpoint, importance)
        for ratio in self._config.ratios:
            for name, method in numbered.items():
                variant = _Variant(model.name, dense, ratio, name)
                if method.prunes_in == "recovery":
                    cells.append(self._pruned_in_recovery(variant, method, ratio, model.checkpoint))
                else:
                    cells += self._finish(self._pruned(variant, method, importance), model.checkpoint, importance)
        for name, method in numbered.items() if rounds else ():
            first = _Variant(model.name, dense, method=name)
            for recipe, training in self._trainings_of(first).items():
                if training is not None:
                    cells.append(self._by_rounds(first, method, recipe, training, model.checkpoint, importance))
        return cells

    def _by_rounds(
        self,
        variant: _Variant,
        method: Method,
        recipe: str,
        training: Training,
        dense: Checkpoint,
        importance: Stage | None,
    ) -> Cell:
        """The row of a model that is pruned and trained at one ratio after another."""
        rounds = self._config.rounds
        for number, ratio in enumerate(rounds):
            variant = replace(variant, ratio=ratio, rounds=tuple(rounds[:number]))
            pruned = self._pruned(variant, method, importance)
            variant = self._trained(pruned, recipe, training, dense, importance)
        return self._row(variant)

    def _trainings_of(self, variant: _Variant) -> Mapping[str, Training | None]:
        """Name of each recipe of a variant's rows -> its training."""
        refits = variant.method is not None and self._methods[variant.method].refits_weights
        return self._after_refit if refits else self._trainings

    def _importance_for_all(self, model: ModelSource, dense: Input, methods: Mapping[str, Method]) -> Stage | None:
        """One pass for all methods that need scores, further criteria, and trainings on its windows; None without."""
        scoring = [method for method in methods.values() if method.prunes_in == "calibration"]
        needed = {criterion for method in scoring for criterion in _first_criteria(method)}
        pruned = {structure for method in scoring for structure in method.structures} or {NEURONS}
        refuse_criteria(self._config.importance.criteria, model.checkpoint, pruned)
        criteria = needed.union(self._config.importance.criteria)
        reads_windows = any(training and training.text == "calibration" for training in self._trainings.values())
        if not scoring and not criteria and not reads_windows:
            return None
        kinds = kinds_among(pruned)
        importance = self._importance(model.name, {"model": dense}, criteria=sorted(criteria), structures=kinds)
        self.asked += [importance.id] if criteria > needed else []
        return importance

    def _importance(self, label: str, inputs: dict[str, Input], **scoring: Any) -> Stage:
        for share in self._config.calibration.shares():
            inputs = inputs | self._text(share.role, share.text)
        return self._stage("importance", label, ImportanceParameters.from_config(self._config, **scoring), inputs)

    def _pruned(self, variant: _Variant, method: Method, importance: Stage | None) -> _Variant:
        """What a method with numbers prunes to the variant's ratio: the dense model, by its pass and perhaps that over
        a student, or what an earlier round has trained, by a pass of its own.
        """
        assert importance is not None and variant.ratio is not None
        structures, inputs = kinds_among(method.structures), {"model": variant.checkpoint}
        scoring: dict[str, Any] = {"criteria": sorted(method.scored_before), "structures": structures}
        chain = [*variant.chain, importance]
        if variant.rounds:
            chain[-1] = self._importance(variant.label, inputs, **scoring)
        if method.student_chosen_by is not None:
            of_first = {"student": _scores(importance, _first_criteria(method))}
            student = StudentParameters.at_ratio(variant.ratio)
            chain.append(self._importance(f"{variant.label} student", inputs | of_first, student=student, **scoring))
        inputs |= {"importance": _scores(chain[-1], method.scored_before, structures)}
        inputs |= {"dense": variant.dense} if variant.rounds else {}
        params = PruneParameters.from_method(self._config, method, variant.ratio)
        return replace(variant, chain=(*chain, self._stage("prune", variant.label, params, inputs)))

    def _pruned_in_recovery(self, variant: _Variant, method: Method, ratio: float, dense: Checkpoint) -> Cell:
        """The training that prunes and recovers at the same time, and its evaluation."""
        inputs, before = self._inputs_of(self._config.recovery.complete(), variant, dense, None)
        params = LoraPruneParameters.from_method(self._config, method, ratio)
        trained = self._stage("loraprune", variant.label, params, inputs)
        return self._row(replace(variant, recovery=OWN, chain=(*before, trained)))

    def _finish(self, variant: _Variant, dense: Checkpoint, importance: Stage | None) -> list[Cell]:
        """Training by each recipe, and evaluation, of one checkpoint; the dense model is also evaluated as it is, and
        isn't trained to be like itself.
        """
        trainings = self._trainings_of(variant)
        trainings = {NONE: None, **trainings} if variant.ratio is None else trainings
        cells = []
        for name, training in trainings.items():
            if training is None:
                cells.append(self._row(variant))
            elif variant.ratio is not None or training.teacher_share < 1:
                cells.append(self._row(self._trained(variant, name, training, dense, importance)))
        return cells

    def _trained(
        self, variant: _Variant, name: str, training: Training, dense: Checkpoint, importance: Stage | None
    ) -> _Variant:
        """A checkpoint after training by a recipe."""
        inputs, before = self._inputs_of(training, variant, dense, importance)
        variant = replace(variant, recovery=name)
        params = RecoverParameters(recovery=training, seed=self._config.seed)
        trained = self._stage("recover", variant.label, params, inputs)
        chain = *variant.chain, *(stage for stage in before if stage not in variant.chain), trained
        return replace(variant, chain=chain)

    def _inputs_of(
        self, training: Training, variant: _Variant, dense: Checkpoint, importance: Stage | None
    ) -> tuple[dict[str, Input], list[Stage]]:
        """What a training reads, and the stages that make it besides those behind the checkpoint."""
        inputs = {"model": variant.checkpoint}
        if training.evaluate_every:
            inputs["held-out"] = next(iter(self._references_of_held_out(variant).values()))
        if variant.rounds and training.method != "lora" and (training.teacher_share or training.evaluate_every):
            inputs["head"] = variant.dense  # an earlier round may have trained the model's own
        if training.text != "calibration":
            inputs |= {"dense": variant.dense} if training.teacher_share else {}
            text = self._text("text", training)
            if training.answers == "given":
                return inputs | text, []
            settings = AnswersParameters.from_training(training, self._config.seed)
            answers = self._stage("answers", variant.model, settings, {"model": variant.dense} | text)
            return inputs | {"answers": answers.as_input()}, [answers]
        assert importance is not None
        inputs["windows"] = _scores(importance, [])
        if not training.teacher_share:
            return inputs, [importance]
        calibration = self._config.calibration
        numbers = calibration.samples * calibration.sequence_length * int(dense.config["hidden_size"])
        if numbers * ITEMSIZE[training.dtype] > STORED_BYTES:
            return inputs | {"dense": variant.dense}, [importance]
        given = {"model": variant.dense, "importance": inputs["windows"]}
        params = ReferenceParameters(dtype=training.dtype)
        reference = self._stage("reference", f"{importance.label} calibration", params, given)
        return inputs | {"reference": reference.as_input()}, [importance, reference]

    def _row(self, variant: _Variant) -> Cell:
        """The row of a checkpoint, with the stages that measure it."""
        label = variant.label
        inputs = {"model": variant.checkpoint, "dense": variant.dense}
        inputs |= self._references_of_held_out(variant) | self._own_tasks
        evaluate = self._stage("evaluate", label, EvaluateParameters.from_config(self._config.evaluation), inputs)
        measured = None
        if self._config.efficiency.enabled:  # of the shape, which training doesn't change
            params = EfficiencyParameters.from_config(self._config.efficiency, self._device)
            inputs = {"model": variant.cut, "dense": variant.dense}
            measured = self._stage("efficiency", replace(variant, recovery=NONE).label, params, inputs).id
        check = None
        if self._config.engines and variant.ratio is not None:  # the dense model is known to them
            inputs, engines = {"model": variant.checkpoint}, CheckParameters(engines=sorted(self._config.engines))
            check = self._stage("check", label, engines, inputs).id
        return Cell(
            label=label,
            model=variant.model,
            ratio=variant.ratio,
            method=variant.method,
            criterion=None if variant.method is None else self._methods[variant.method].criterion,
            recovery=recovery_name(variant.recovery, variant.rounds),
            producers=tuple(stage.id for stage in variant.chain),
            evaluate=evaluate.id,
            efficiency=measured,
            check=check,
            rounds=variant.rounds,
        )

    def _references_of_held_out(self, variant: _Variant) -> dict[str, Input]:
        """References on the texts that fidelity is measured on: role of an evaluation's input -> reference."""
        evaluation = self._config.evaluation
        references: dict[str, Input] = {}
        for name, text in evaluation.fidelity.each().items():
            params = ReferenceParameters(dtype=evaluation.dtype, add_bos_token=evaluation.add_bos_token, text=text)
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
        stage = Stage(kind, label, params, inputs, releases_of(kind))
        return self.stages.setdefault(stage.id, stage)

    def _text(self, role: str, source: TextSource) -> dict[str, Input]:
        """A text file as an input, identified by its content; nothing for a data set, which the settings name."""
        if source.path is None:
            return {}
        file = Path(source.path)
        if not file.exists():
            raise UserError(f"{file}: No such file or folder; the settings name it as `path` of a text")
        return {role: Input(self._identity_of(file), str(file), content="text")}
