"""The stages of a plan, each with its settings and inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import TextSource
from hfprune_dist.config.texts import FIRST, reference_role
from hfprune_dist.data.formats import identity_of
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.efficiency import EfficiencyParameters
from hfprune_dist.kinds.evaluate import EvaluateParameters
from hfprune_dist.kinds.importance import ImportanceParameters, StudentParameters
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.kinds.reference import ReferenceParameters
from hfprune_dist.kinds.training import DistillParameters, LoraPruneParameters, RecoverParameters
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.scoring_passes import Scored, part_of
from hfprune_dist.planning.user_files import own_tasks
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input, Stage
from hfprune_dist.structures import NEURONS


@dataclass(frozen=True)
class Variant:
    """A checkpoint before recovery: the dense one, or one that a method pruned at a ratio.

    ``cut`` has the same shape: if the checkpoint was distilled, ``cut`` is what it was before distillation.
    """

    label: str
    source: ModelSource
    dense: Input
    checkpoint: Input
    cut: Input
    ratio: float | None = None
    method: str | None = None
    producers: tuple[str, ...] = ()


class PlannedStages:
    """Makes the stages of a sweep; each method adds one and returns it, or the equal one that is there already.

    ``by_id``: all stages so far, in the order in which they were first asked for.

    Args:
        device: the device that efficiency is measured on.
    """

    def __init__(self, config: SweepConfig, hashes: FileHashes, device: str) -> None:
        self._config = config
        self._hashes = hashes
        self._device = device
        self._own_tasks = own_tasks(config.evaluation.include_path, hashes)
        self.by_id: dict[str, Stage] = {}

    def importance(
        self, label: str, inputs: dict[str, Input], scored: Scored, student: StudentParameters | None = None
    ) -> Stage:
        """A calibration pass.

        Args:
            inputs: the model and, if a student is scored, the scores that choose it.
        """
        inputs = {**inputs}
        for share in self._config.calibration.shares():
            inputs |= self._text(share.role, share.text)
        params = ImportanceParameters.of(self._config, scored.criteria, scored.structures, student)
        return self._add(Stage("importance", label, params, inputs))

    def prune(self, label: str, inputs: dict[str, Input], ratio: float, method: Method) -> Stage:
        """One cut; ``inputs`` are the dense model and its scores, ``ratio`` what is gone of it afterwards."""
        return self._add(Stage("prune", label, PruneParameters.of(self._config, method, ratio), inputs))

    def reference_of_calibration(self, importance: Stage) -> Stage:
        """The reference on the windows that the dense model was scored on."""
        params = ReferenceParameters.of_calibration(self._config.distillation)
        windows = part_of(importance, Scored(frozenset(), [NEURONS]))
        inputs = {"model": importance.inputs["model"], "importance": windows}
        return self._add(Stage("reference", f"{importance.label} calibration", params, inputs))

    def distill(self, variant: Variant, pruned: Input, reference: Stage, passes: int) -> Stage:
        """Training of a pruned model towards the dense model's outputs, which the reference keeps."""
        params = DistillParameters(distillation=self._config.distillation, passes=passes, seed=self._config.seed)
        inputs = {"model": pruned, "reference": reference.as_input()}
        return self._add(Stage("distill", variant.label, params, inputs))

    def recover(self, variant: Variant) -> Stage:
        """The fine-tuning of the variant's checkpoint on instructions."""
        params = RecoverParameters(recovery=self._config.recovery, seed=self._config.seed)
        inputs = {"model": variant.checkpoint, **self._text("instructions", self._config.recovery)}
        return self._add(Stage("recover", variant.label, params, inputs))

    def loraprune(self, variant: Variant, method: Method, ratio: float) -> Stage:
        """The training that prunes and recovers at the same time; the method is one with numbers."""
        params = LoraPruneParameters.of(self._config, method, ratio)
        inputs = {"model": variant.dense, **self._text("instructions", self._config.recovery)}
        return self._add(Stage("loraprune", variant.label, params, inputs))

    def evaluate(self, label: str, variant: Variant, checkpoint: Input) -> Stage:
        """The evaluation of a checkpoint made from the variant's dense model, and the references that it needs."""
        params = EvaluateParameters.of(self._config.evaluation)
        inputs = {"model": checkpoint, "dense": variant.dense}
        inputs |= self._references_of_held_out(variant.source.name, variant.dense) | self._own_tasks
        return self._add(Stage("evaluate", label, params, inputs))

    def efficiency(self, variant: Variant) -> Stage:
        """The efficiency of the variant's shape, which recovery and distillation don't change."""
        params = EfficiencyParameters.of(self._config.efficiency, self._device)
        return self._add(Stage("efficiency", variant.label, params, {"model": variant.cut, "dense": variant.dense}))

    def _references_of_held_out(self, model: str, dense: Input) -> dict[str, Input]:
        """References on the texts that fidelity is measured on: role of an evaluation's input -> reference."""
        evaluation = self._config.evaluation
        references: dict[str, Input] = {}
        for name, text in evaluation.fidelity.each().items():
            params = ReferenceParameters.of_held_out(evaluation, text)
            inputs = {"model": dense, **self._text("text", text)}
            stage = self._add(Stage("reference", f"{model} held-out {name}".rstrip(), params, inputs))
            if stage.as_input() in references.values():
                raise UserError(
                    f"evaluation.fidelity.texts: {name} has the content of another text; leave one of them out"
                )
            references[reference_role(name if references else FIRST)] = stage.as_input()
        return references

    def _add(self, stage: Stage) -> Stage:
        return self.by_id.setdefault(stage.id, stage)

    def _text(self, role: str, source: TextSource) -> dict[str, Input]:
        """A text file as an input, identified by its content; nothing for a data set, which the settings name."""
        if source.path is None:
            return {}
        file = Path(source.path)
        return {role: Input(identity_of(file, self._hashes), str(file), content="text")}
