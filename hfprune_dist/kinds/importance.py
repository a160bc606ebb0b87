"""Importance: a calibration pass, which scores every unit of a model on windows of text.

Inputs: ``model``, ``calibration`` (and so on) for each text that is a file, and ``student`` if the scores of another
pass choose a student.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import Field

from hfprune_dist.config.method_settings import Kinds
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import Dtype, Section
from hfprune_dist.config.texts import CalibrationConfig
from hfprune_dist.core.criterion import losses_of
from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES
from hfprune_dist.kinds.dimensions import Dimensions
from hfprune_dist.kinds.memory import (
    FLOAT32,
    FLOAT64,
    HEAD_BYTES,
    ITEMSIZE,
    Job,
    Memory,
    Planned,
    StageParameters,
    channels,
    one_layer,
    states,
)
from hfprune_dist.methods import CRITERIA, CriterionName
from hfprune_dist.structures import KV_GROUPS, NEURONS

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


class ImportanceParameters(StageParameters):
    """Settings of a calibration pass.

    ``structures``: the kinds of units that are scored, each by all criteria that have scores for it. ``student``: the
    student chosen by the scores in the input of this role.
    """

    tokenizes: ClassVar[bool] = True
    dtype_setting: ClassVar[str | None] = "importance.dtype"

    calibration: CalibrationConfig
    criteria: list[CriterionName]
    dtype: Dtype
    add_bos_token: bool
    seed: int
    structures: Kinds = Field(default=[NEURONS])
    student: StudentParameters | None = None

    @classmethod
    def of(
        cls,
        config: SweepConfig,
        criteria: Iterable[CriterionName],
        structures: Sequence[str],
        student: StudentParameters | None = None,
    ) -> ImportanceParameters:
        """The pass that computes these scores."""
        return cls(
            # The stage has one setting for BOS, wherever the configuration sets it.
            calibration=config.calibration.model_copy(update={"add_bos_token": None}),
            criteria=[],
            dtype=config.importance.dtype,
            add_bos_token=config.calibrates_with_bos,
            seed=config.seed,
            student=student,
        ).scoring(criteria, structures)

    def scoring(self, criteria: Iterable[str], structures: Sequence[str]) -> Self:
        """The same pass, for these criteria and these kinds of units."""
        return self.model_copy(update={"criteria": sorted(criteria), "structures": list(structures)})

    def job(self, planned: Planned) -> Calibration:
        return Calibration.of(self, checkpointing=planned.checkpointing)

    def allows(self, rows: int) -> bool:
        """A shard belongs to one rank, so its ``shard_size`` micro-batches run one at a time."""
        return rows <= max(1, self.calibration.samples // self.calibration.shard_size)


def calibration_of(planned: Planned, *roles: str) -> CalibrationConfig:
    """The settings of the calibration windows of a pass that is an input, or an input of an input."""
    params = planned.source(*roles)
    assert isinstance(params, ImportanceParameters)
    return params.calibration


@dataclass(frozen=True)
class Calibration(Job):
    """A pass forward, and backward for each of ``losses`` of the dense model, and of a ``student`` with fewer neurons.

    Attributes:
        samples: all windows.
        kv_groups: whether attention's heads are scored, too.
        curvature: whether g g^T is summed at the outputs of scored modules, and a pass over Gram matrices follows.
        weight_gradients: whether gradients of the weights that units own are summed.
        products: whether weights are multiplied with their gradients, window by window.
    """

    samples: int = 1
    losses: int = 1
    student: bool = False
    kv_groups: bool = False
    curvature: bool = False
    weight_gradients: bool = False
    products: bool = False

    @classmethod
    def of(cls, params: ImportanceParameters, *, checkpointing: bool) -> Calibration:
        """The pass of an importance stage."""
        criteria, calibration = [CRITERIA[name] for name in params.criteria], params.calibration
        of_student = [loss.of_student for loss in losses_of(criteria)]
        return cls(
            batch=min(calibration.micro_batch_size, calibration.samples),
            tokens=calibration.sequence_length,
            itemsize=ITEMSIZE[params.dtype],
            checkpointing=checkpointing,
            samples=calibration.samples,
            losses=of_student.count(False),
            student=any(of_student),
            kv_groups=KV_GROUPS in params.structures,
            curvature=any(it.needs_moments for it in criteria),
            weight_gradients=any(it.observes == "weight_gradients" for it in criteria),
            products=any(it.observes == "weights" for it in criteria),
        )

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """See ``Job``; of the pass, or of the one over Gram matrices if that takes more."""
        tokens, hidden = self.batch * self.tokens, dims.hidden_size
        neurons = tokens * dims.intermediate_size
        backward = (dims.mlp_matrices + self.checkpointing) * neurons * self.itemsize
        backward += GATED_PORTIONS * min(ACCELERATOR_BYTES, FLOAT32 * neurons) * (dims.row_projections > 1)
        if self.weight_gradients or self.products:  # what linear layers read, and gradients at their outputs
            backward += FLOAT32 * (neurons + tokens * hidden) + dims.row_projections * neurons * self.itemsize
        ends = tokens * hidden * self.itemsize * (self.losses + 2 + self.student)
        whole = Memory(
            weights=self._weights(dims, ranks),
            activations=tokens * dims.num_layers * self._kept_of_a_token(dims),
            temporary=max(HEAD_BYTES * (1 + self.student), backward) + ends + self._sums(dims, ranks),
        )
        if not self.curvature:
            return whole
        # Of Gram matrices, both sums and their mean; those of the next layer; or in eliminations, three more.
        grams = 4 * FLOAT64 * sum(size**2 for size in channels(dims, self.kv_groups))
        return max(whole, one_layer(self, dims, grams), key=lambda it: it.total)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """See ``Job``."""
        return self.curvature * states(self, dims, self.samples, ranks) * self.itemsize

    def _kept_of_a_token(self, dims: Dimensions) -> int:
        """Bytes for a layer's backward: norms' inputs; q, k, v and attention's output; gate and up, and h where an MLP
        has no gate or it is read again; experts' outputs; in float32, norms' scales and the log-sum-exp of each head.
        """
        reads = self.weight_gradients or self.products
        numbers = 2 * dims.hidden_size + 2 * (dims.num_heads + dims.num_key_value_heads) * dims.head_size
        kept = numbers + dims.routed_channels + reads * (1 + self.kv_groups) * dims.hidden_size
        kept += (dims.row_projections + (self.student or reads or dims.row_projections == 1)) * dims.intermediate_size
        whole = kept * self.itemsize + FLOAT32 * (2 + dims.num_heads)
        if self.checkpointing:
            return dims.hidden_size * self.itemsize + whole // dims.num_layers
        return whole

    def _sums(self, dims: Dimensions, ranks: int) -> int:
        """Bytes of sums for the layers that a rank owns, and of one that is being computed."""
        kinds = 1 + self.kv_groups
        of_layer = [dims.hidden_size**2] * (kinds * self.curvature)
        of_layer += dims.layer_weights(attention=self.kv_groups) if self.weight_gradients else []
        owned = -(-dims.num_layers // ranks)
        return FLOAT64 * owned * sum(of_layer) + 2 * FLOAT64 * max(of_layer, default=0)
