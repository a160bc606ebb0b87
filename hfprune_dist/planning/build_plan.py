"""Expansion of a configuration into a plan: the stages that the rows of its table need, with their settings.

Pure and instant: no torch, no clock, nothing written. Two sweeps that want the same result plan the same stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_dist.config.method import Method
from hfprune_dist.config.parameters import (
    DistillParameters,
    EfficiencyParameters,
    EvaluateParameters,
    LoraPruneParameters,
    RecoverParameters,
    ReferenceParameters,
    StudentParameters,
)
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import TextSource
from hfprune_dist.config.texts import FIRST, reference_role
from hfprune_dist.data.formats import identity_of
from hfprune_dist.errors import UserError
from hfprune_dist.planning.cuts import cut_parameters
from hfprune_dist.planning.expert_shapes import can_do, refuse_criteria, refuse_with_experts
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.multiples import suited, with_numbers
from hfprune_dist.planning.plan import NONE, OWN, Cell, Plan, label_of
from hfprune_dist.planning.ratios import check_ratios
from hfprune_dist.planning.refusals import check_positions, check_recovery, place_of, refuse_same_rows
from hfprune_dist.planning.rounds import round_ratios
from hfprune_dist.planning.scoring_passes import (
    Scored,
    check_criteria,
    first_criteria,
    importance_parameters,
    part_of,
    pass_parameters,
    scored_for,
)
from hfprune_dist.planning.students import student_of
from hfprune_dist.planning.targets import protected_by
from hfprune_dist.planning.told_apart import adapted_in, pairs_of_a_row, positions_read
from hfprune_dist.planning.training_memory import choose_micro_batches
from hfprune_dist.planning.user_files import own_tasks
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.provenance import package_versions
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
        UserError: for a ratio that a model can't reach, rows that would be the same, input text that can't be read, a
            calibration that is to end early although no criterion can tell when, generations beyond a model's
            positions, or a method that prunes during recovery if there is no recovery.
    """
    config = choose_micro_batches(config, [], {})  # 1 where still to be chosen
    check_criteria(config, methods)
    check_recovery(config, methods)
    planner = _Planner(config, methods, hashes, device)
    cells = [cell for model in models for cell in planner.cells(model)]
    refuse_same_rows(cells)
    return Plan(planner.stages, tuple(cells), tuple(planner.asked))


@dataclass(frozen=True)
class _Variant:
    """A checkpoint before recovery: the dense one, or one that a method pruned at a ratio.

    ``cut`` has the same shape: if the checkpoint was distilled, ``cut`` is what it was before distillation.
    """

    label: str
    source: ModelSource
    dense: Input
    checkpoint: Input
    cut: Input
    layers_may_differ: bool
    ratio: float | None = None
    method: str | None = None
    producers: tuple[str, ...] = ()

    @property
    def sizes_differ(self) -> bool:
        """Whether layers of the dense model differ in parameters."""
        return len(set(self.source.checkpoint.parameter_counts.layers)) > 1


class _Planner:
    """Collects stages by id while the cells of each model are laid out."""

    def __init__(self, config: SweepConfig, methods: Mapping[str, Method], hashes: FileHashes, device: str) -> None:
        self.config = config
        self.methods = methods
        self.hashes = hashes
        self.device = device
        self.own_tasks = own_tasks(config.evaluation.include_path, hashes)
        self.stages: dict[str, Stage] = {}
        self.asked: list[str] = []

    def cells(self, model: ModelSource) -> list[Cell]:
        methods = self._methods_for(model)
        for name, method in methods.items():
            check_ratios(model.checkpoint, self.config.ratios, method, place_of(model.name, name))
        check_positions(self.config.efficiency, model)
        dense = Input(model.identity, str(model.checkpoint.path), content=model.content)
        # First, since most of the sweep waits for it.
        importance = self._importance_for_all(model, dense)
        differ = not model.checkpoint.is_plain
        label = label_of(model.name, None, None, NONE)
        cells = self._finish(_Variant(label, model, dense, dense, dense, differ))
        for ratio in self.config.ratios:
            for name, method in methods.items():
                settled = with_numbers(method, model.checkpoint, ratio, place_of(model.name, name))
                label = label_of(model.name, ratio, name if len(self.methods) > 1 else None, NONE)
                variant = _Variant(label, model, dense, dense, dense, differ, ratio, name)
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
            refuse_with_experts(method, model.checkpoint.family.model_type, place_of(model.name, name))
        return left

    def _pruned(self, variant: _Variant, method: Method, importance: Stage | None) -> list[Cell]:
        """Lay out the stages and cells of a dense model that a method prunes at the variant's ratio.

        Args:
            method: with numbers, as ``with_numbers`` returns it.
            importance: None if no method needs scores.
        """
        assert variant.ratio is not None
        if method.prunes_in == "recovery":
            return [self._pruned_in_recovery(variant, method, variant.ratio)]
        assert importance is not None, "the method needs scores"
        chain = self._rounds(variant, importance, variant.ratio, method)
        cut = next(stage.as_input() for stage in reversed(chain) if stage.kind == "prune")
        made = replace(variant, checkpoint=chain[-1].as_input(), cut=cut, producers=tuple(stage.id for stage in chain))
        return self._finish(replace(made, layers_may_differ=made.layers_may_differ or method.tells_layers_apart))

    def _importance_for_all(self, model: ModelSource, dense: Input) -> Stage | None:
        """One pass for all methods that need scores and for further criteria; None if there are neither."""
        methods = [suited(method, model.checkpoint) for method in self._methods_for(model).values()]
        scoring = [method for method in methods if method.prunes_in == "calibration"]
        needed = {criterion for method in scoring for criterion in first_criteria(method)}
        pruned = {structure for method in scoring for structure in method.structures} or {NEURONS}
        refuse_criteria(self.config.importance.criteria, model.checkpoint, pruned)
        criteria = needed.union(self.config.importance.criteria)
        if not scoring and not criteria:
            return None
        biased = any(name.endswith(".bias") for name in model.checkpoint.tensors)
        importance = self._importance(model.name, {"model": dense}, Scored(criteria, kinds_among(pruned), biased))
        has_further_criteria = criteria > needed
        self.asked += [importance.id] if has_further_criteria else []
        return importance

    def _pruned_in_recovery(self, variant: _Variant, method: Method, ratio: float) -> Cell:
        """Lay out the training that prunes and recovers at the same time, and its evaluation."""
        (first, last), multiple_of = protected_by(method), method.multiple_of
        assert isinstance(multiple_of, int), "planned with a number"
        params = LoraPruneParameters(
            recovery=self.config.recovery,
            seed=self.config.seed,
            ratio=ratio,
            structures=kinds_among(method.structures),
            multiple_of=multiple_of,
            tensor_parallel=method.split,
            protect_first=first,
            protect_last=last,
            adapted=adapted_in(variant.source.checkpoint),
            pairs_of_a_row=pairs_of_a_row(variant.source.checkpoint),
        )
        inputs = {"model": variant.dense, **self._text("instructions", self.config.recovery)}
        made = self._add(Stage("loraprune", variant.label, params, inputs))
        pruned = replace(variant, checkpoint=made.as_input(), cut=made.as_input())
        return self._cell(pruned, OWN, (made.id,), self._evaluate(variant.label, pruned, made.as_input()))

    def _finish(self, variant: _Variant) -> list[Cell]:
        """Lay out recovery and evaluation of one checkpoint; the dense model is also evaluated as it is."""
        recovery = self.config.recovery.method
        cells = []
        if variant.ratio is None or recovery == NONE:
            evaluate = self._evaluate(variant.label, variant, variant.checkpoint)
            cells.append(self._cell(variant, NONE, variant.producers, evaluate))
        if recovery != NONE:
            recover = self._recover(variant)
            evaluate = self._evaluate(f"{variant.label} + {recovery}", variant, recover.as_input())
            cells.append(self._cell(variant, recovery, (*variant.producers, recover.id), evaluate))
        return cells

    def _cell(self, variant: _Variant, recovery: str, producers: tuple[str, ...], evaluate: Stage) -> Cell:
        criterion = None if variant.method is None else self.methods[variant.method].criterion
        measured = self._efficiency(variant).id if self.config.efficiency.enabled else None
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

    def _add(self, stage: Stage) -> Stage:
        return self.stages.setdefault(stage.id, stage)

    def _rounds(self, variant: _Variant, importance: Stage, ratio: float, method: Method) -> list[Stage]:
        """Alternating importance and prune stages, from the dense model to the one pruned at ``ratio``, and then the
        method's distillation, if it has one.
        """
        label, dense = variant.label, variant.dense
        chain, model = [importance], dense
        scored = scored_for(method, biased=importance_parameters(importance).biases is not None)
        student = student_of(method, ratio)
        if student is not None:
            chosen_by = Scored(first_criteria(method), [NEURONS])
            inputs = {"model": dense, "student": part_of(importance, chosen_by)}
            chain.append(self._importance(f"{label} student", inputs, scored, student))
        rounds = round_ratios(method, ratio)
        for step, reached in enumerate(rounds, start=1):
            step_label = f"{label} step {step}/{len(rounds)}"
            if step > 1:
                chain.append(self._importance(step_label, {"model": model}, scored))
            prune_label = label if step == len(rounds) else step_label
            inputs = {"model": model, "importance": part_of(chain[-1], scored)}
            if model != dense:
                inputs["dense"] = dense  # ratios are shares of its parameters
            chain.append(self._prune(prune_label, inputs, reached, method, sizes_differ=variant.sizes_differ))
            model = chain[-1].as_input()
        if method.distill:
            chain.append(self._reference_of_calibration(importance))
            chain.append(self._distill(variant, model, chain[-1], method.distill))
        return chain

    def _importance(
        self, label: str, inputs: dict[str, Input], scored: Scored, student: StudentParameters | None = None
    ) -> Stage:
        inputs = {**inputs}
        for share in self.config.calibration.shares():
            inputs |= self._text(share.role, share.text)
        params = pass_parameters(self.config, scored, student)
        return self._add(Stage("importance", label, params, inputs))

    def _prune(
        self, label: str, inputs: dict[str, Input], ratio: float, method: Method, *, sizes_differ: bool
    ) -> Stage:
        params = cut_parameters(self.config, method, ratio, is_later="dense" in inputs, sizes_differ=sizes_differ)
        return self._add(Stage("prune", label, params, inputs))

    def _reference_of_calibration(self, importance: Stage) -> Stage:
        """The reference on the windows that the dense model was scored on."""
        distillation = self.config.distillation
        params = ReferenceParameters(dtype=distillation.dtype, micro_batch_size=distillation.rows_at_once)
        inputs = {
            "model": importance.inputs["model"],
            "importance": part_of(importance, Scored(frozenset(), [NEURONS])),
        }
        return self._add(Stage("reference", f"{importance.label} calibration", params, inputs))

    def _references_of_held_out(self, model: str, dense: Input) -> dict[str, Input]:
        """References on the texts that fidelity is measured on: role of an evaluation's input -> reference."""
        evaluation = self.config.evaluation
        references: dict[str, Input] = {}
        for name, text in evaluation.fidelity.each().items():
            params = ReferenceParameters(
                dtype=evaluation.dtype,
                micro_batch_size=1,
                add_bos_token=evaluation.add_bos_token,
                text=text,
            )
            inputs = {"model": dense, **self._text("text", text)}
            stage = self._add(Stage("reference", f"{model} held-out {name}".rstrip(), params, inputs))
            if stage.as_input() in references.values():
                raise UserError(
                    f"evaluation.fidelity.texts: {name} has the content of another text; leave one of them out"
                )
            references[reference_role(name if references else FIRST)] = stage.as_input()
        return references

    def _distill(self, variant: _Variant, pruned: Input, reference: Stage, passes: int) -> Stage:
        adapted = adapted_in(variant.source.checkpoint)
        params = DistillParameters(
            distillation=self.config.distillation, passes=passes, seed=self.config.seed, adapted=adapted
        )
        inputs = {"model": pruned, "reference": reference.as_input()}
        return self._add(Stage("distill", variant.label, params, inputs))

    def _recover(self, variant: _Variant) -> Stage:
        params = RecoverParameters(
            recovery=self.config.recovery,
            seed=self.config.seed,
            layers_may_differ=variant.layers_may_differ,
            adapted=adapted_in(variant.source.checkpoint),
            pairs_of_a_row=pairs_of_a_row(variant.source.checkpoint),
        )
        inputs = {"model": variant.checkpoint, **self._text("instructions", self.config.recovery)}
        return self._add(Stage("recover", variant.label, params, inputs))

    def _evaluate(self, label: str, variant: _Variant, checkpoint: Input) -> Stage:
        evaluation = self.config.evaluation
        positions = positions_read(variant.source.checkpoint, evaluation.tasks)
        params = EvaluateParameters(**evaluation.model_dump(exclude={"include_path", "fidelity"}), positions=positions)
        inputs = {"model": checkpoint, "dense": variant.dense}
        inputs |= self._references_of_held_out(variant.source.name, variant.dense) | self.own_tasks
        return self._add(Stage("evaluate", label, params, inputs))

    def _efficiency(self, variant: _Variant) -> Stage:
        """The efficiency of the variant's shape, which recovery and distillation don't change."""
        efficiency = self.config.efficiency
        params = EfficiencyParameters(
            batch_sizes=sorted(efficiency.batch_sizes),
            prompt_tokens=sorted(efficiency.prompt_tokens),
            **efficiency.model_dump(exclude={"enabled", "batch_sizes", "prompt_tokens"}),
            device=self.device,
            packages=package_versions(("torch", "transformers")),
        )
        return self._add(Stage("efficiency", variant.label, params, {"model": variant.cut, "dense": variant.dense}))

    def _text(self, role: str, source: TextSource) -> dict[str, Input]:
        """A text file as an input, identified by its content; nothing for a data set, which the settings name."""
        if source.path is None:
            return {}
        file = Path(source.path)
        return {role: Input(identity_of(file, self.hashes), str(file), content="text")}
