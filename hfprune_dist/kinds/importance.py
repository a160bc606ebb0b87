"""Importance: a calibration pass, which scores every unit of a model on windows of text.

Inputs: ``model``, ``calibration`` (and so on) for each text that is a file, and ``student`` if the scores of another
pass choose a student.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import Dtype, Section
from hfprune_dist.config.texts import CalibrationConfig
from hfprune_dist.core.criterion import losses_of
from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES, OWN_TERMS_BYTES
from hfprune_dist.kinds.memory import FLOAT32, FLOAT64, HEAD_BYTES, ITEMSIZE, Need, Planned, Sizes, StageParameters
from hfprune_dist.methods import CRITERIA, CriterionName
from hfprune_dist.methods.sdmprune import LACKS, PUBLISHED
from hfprune_dist.structures import KV_GROUPS, NEURONS, UnitKind

# core.memory_efficient: the portions, in float32, that a gated MLP's backward holds.
GATED_PORTIONS = 7


class StudentParameters(Section):
    """Settings of a student, chosen by the scores of another pass, on which the scores of a pass are computed.

    ``lacks``: the share of each layer's neurons that it lacks. ``teacher_share``: weight of the divergence from the
    dense model in its loss; the rest is the loss on labels. ``teacher_temperature``: divisor of the logits of the dense
    model only.
    """

    lacks: float
    teacher_share: float
    teacher_temperature: float

    @classmethod
    def at_ratio(cls, ratio: float) -> StudentParameters:
        """Settings as published for the nearest ratio; of two equally near ones, for the smaller."""
        nearest = min(PUBLISHED, key=lambda published: (round(abs(published - ratio), 12), published))
        share, temperature = PUBLISHED[nearest]
        return cls(lacks=LACKS, teacher_share=share, teacher_temperature=temperature)


class ImportanceParameters(StageParameters):
    """Settings of a calibration pass.

    ``structures``: the kinds of units that are scored, each by all criteria that have scores for it. ``student``: the
    student chosen by the scores in the input of this role.
    """

    tokenizes: ClassVar[bool] = True

    calibration: CalibrationConfig
    criteria: list[CriterionName]
    dtype: Dtype
    add_bos_token: bool
    seed: int
    structures: list[UnitKind] = Field(default=[NEURONS])
    student: StudentParameters | None = None

    @classmethod
    def from_config(cls, config: SweepConfig, **scoring: Any) -> ImportanceParameters:
        """The pass that computes these scores: ``criteria``, ``structures`` and, if there is one, the ``student``."""
        # The stage has one setting for BOS, wherever the configuration sets it.
        calibration = config.calibration.model_copy(update={"add_bos_token": None})
        dtype, add_bos_token = config.importance.dtype, config.calibrates_with_bos
        return cls(calibration=calibration, dtype=dtype, add_bos_token=add_bos_token, seed=config.seed, **scoring)

    def need(self, planned: Planned) -> Need:
        sizes = self.calibration.samples, self.calibration.sequence_length, self.calibration.least_at_once
        return self.passes_over(planned.dense, *sizes, checkpointing=planned.checkpointing)

    def passes_over(
        self, checkpoint: Checkpoint, samples: int, length: int, at_once: int, *, checkpointing: bool
    ) -> Need:
        """The memory of a forward, and a backward for each loss; if Gram matrices are summed, of the pass for these."""
        model, itemsize = Sizes.from_checkpoint(checkpoint), ITEMSIZE[self.dtype]
        criteria = [CRITERIA[name] for name in self.criteria]
        losses = losses_of(criteria)
        student = any(loss.of_student for loss in losses)
        curvature = any(criterion.needs_moments for criterion in criteria)
        observed = {criterion.observes for criterion in criteria}
        gradients = "weight_gradients" in observed
        reads = gradients or "weights" in observed  # what linear layers read stays, too
        tokens = min(at_once, samples) * length
        hidden, neurons = model.hidden * itemsize, model.neurons * itemsize

        of_a_layer = (2 + 2 * reads) * hidden + (model.attention + model.routed) * itemsize
        of_a_layer += (2 + (reads or student)) * neurons
        kept = model.num_layers * hidden + of_a_layer if checkpointing else model.num_layers * of_a_layer
        backward = tokens * (4 + 4 * reads) * neurons
        backward += GATED_PORTIONS * min(ACCELERATOR_BYTES, FLOAT32 * tokens * model.neurons)
        # Of Gram matrices, both sums and their mean; those of the next layer; or in eliminations, three more.
        widths = [*model.mlp_channels, *([model.heads] if KV_GROUPS in self.structures else [])]
        grams = 4 * FLOAT64 * sum(width**2 for width in widths) * curvature
        sums = FLOAT64 * (len(self.structures) * model.hidden**2 * curvature + model.layer * gradients)
        inputs = FLOAT64 * sum(width**2 for width in widths) * curvature
        if model.num_layers * (sums + inputs) <= OWN_TERMS_BYTES:
            sums += inputs
        everything = model.num_layers * sums
        temporary = max(HEAD_BYTES * (1 + student), backward, grams) + tokens * (len(losses) + 2) * hidden
        return Need(
            weights=model.parameters * itemsize,
            activations=tokens * kept,
            temporary=temporary + 2 * sums,
            gathered=model.gathered * itemsize,
            shared=everything,
            unreduced=everything if everything <= OWN_TERMS_BYTES else 0.0,
            host=curvature * samples * length * hidden * model.pinned(tokens),
        )
