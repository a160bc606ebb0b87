"""The parameters of each kind of stage: the settings that enter its fingerprint and that it gets when it runs.

Plans build them from a configuration, the store keeps them in records (``stage.json``, manifests, ``sweep.json``), and
stages read them. They are therefore defined below all three, next to the sections of the configuration they consist of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError

from hfprune_dist.config.left_out import LeftOutAt
from hfprune_dist.config.method_settings import Allocation, Kinds, Refit, Structures
from hfprune_dist.config.recorded import OtherParameters, Parameters, Text, canonical_text
from hfprune_dist.config.section import Dtype, Section
from hfprune_dist.config.texts import CalibrationConfig, FidelityConfig
from hfprune_dist.config.told_apart import Adapted, PairsOfARow, Positions
from hfprune_dist.config.training import DistillationConfig, RecoveryConfig
from hfprune_dist.core.criteria import CRITERIA, CriterionName, MethodCriterion
from hfprune_dist.structures import NEURONS


class StudentParameters(Section):
    """Settings of a student, chosen by the scores of another pass, on which the scores of a pass are computed.

    ``lacks``: the share of each layer's neurons that it lacks. ``teacher_share``: weight of the divergence from the
    dense model in its loss; the rest is the loss on labels. ``teacher_temperature``: divisor of the logits of the dense
    model only.
    """

    lacks: float
    teacher_share: float
    teacher_temperature: float


class ImportanceParameters(Parameters):
    """Parameters of a calibration pass.

    ``biases``: how a pass in bfloat16 adds the model's biases, if it has any. ``curvature``: how second
    moments of output gradients are rounded, if a criterion needs them and it makes a difference. These are absent in
    records of passes that ignored such criteria, rounded before they added biases, or rounded once per shard.
    ``structures``: the kinds of units that are scored, each by all criteria that have scores for it. ``student``: the
    student chosen by the scores in the input of this role.
    """

    calibration: Annotated[CalibrationConfig, Text]
    criteria: list[CriterionName]
    dtype: Dtype
    add_bos_token: bool
    seed: int
    biases: Annotated[Literal["added before rounding"] | None, LeftOutAt(None)] = None
    curvature: Annotated[Literal["rounded by micro-batch"] | None, LeftOutAt(None)] = None
    structures: Annotated[Kinds, LeftOutAt([NEURONS])] = Field(default=[NEURONS])
    student: Annotated[StudentParameters | None, LeftOutAt(None)] = None

    @property
    def compute_dtype(self) -> Dtype:
        return self.dtype

    def scoring(self, criteria: Iterable[str], structures: Sequence[str]) -> Self:
        """The same pass, for these criteria and these kinds of units."""
        names = sorted(criteria)
        calibration = self.calibration
        moments = any(CRITERIA[name].needs_moments for name in names)
        # It makes no difference where a shard is a single micro-batch.
        several_to_a_shard = calibration.shard_size > 1 and calibration.samples > calibration.micro_batch_size
        curvature = "rounded by micro-batch" if moments and several_to_a_shard else None
        return self.model_copy(update={"criteria": names, "structures": list(structures), "curvature": curvature})


class ReferenceParameters(Parameters):
    """Parameters of the dense model's hidden states on held-out ``text`` or, if None, on an importance stage's windows.

    ``micro_batch_size``: windows per forward pass of one rank.
    """

    dtype: Dtype
    micro_batch_size: int
    add_bos_token: Annotated[bool | None, LeftOutAt(None)] = None
    text: Annotated[FidelityConfig | None, Text, LeftOutAt(None)] = None

    @property
    def compute_dtype(self) -> Dtype:
        return self.dtype


class PruneParameters(Parameters):
    """Parameters of one cut: the settings of a ``Method`` that it depends on.

    ``ratio``: removed parameters / all of the dense model's. ``floor``, ``protect_first`` and
    ``protect_last`` are None if the allocation doesn't use them, ``dtype`` and ``micro_batch_size`` (windows per rank's
    forward pass) if no model runs. ``tensor_parallel`` divides ``multiple_of`` and the layers' numbers of KV groups; it
    is 1 if none are pruned. ``refit_iterations``: of conjugate gradients in the last Gauss-Newton step of refit: block.
    ``refit_copies``: copies of each calibration window, with redrawn tokens, that a refit sees as well.
    ``refit_norms``: whether the weights of all norms are refitted at the end. ``plain_shapes``: for which layers a
    search sets their width, where layers differ in parameters; else absent.
    """

    ratio: float
    criterion: MethodCriterion
    allocation: Allocation
    refit: Refit
    multiple_of: int
    floor: Annotated[float | None, LeftOutAt(None)] = None
    protect_first: Annotated[int | None, LeftOutAt(None)] = None
    protect_last: Annotated[int | None, LeftOutAt(None)] = None
    dtype: Annotated[Dtype | None, LeftOutAt(None)] = None
    micro_batch_size: Annotated[int | None, LeftOutAt(None)] = None
    structures: Annotated[Structures, LeftOutAt([NEURONS])] = Field(default=[NEURONS])
    tensor_parallel: Annotated[int, LeftOutAt(1)] = 1
    refit_iterations: Annotated[int, LeftOutAt(2)] = 2
    refit_copies: Annotated[int, LeftOutAt(0)] = 0
    refit_norms: Annotated[bool, LeftOutAt(False)] = False
    plain_shapes: Annotated[Literal["of the layers that stay"] | None, LeftOutAt(None)] = None

    @property
    def compute_dtype(self) -> Dtype | None:
        return self.dtype

    def forward_pass(self) -> tuple[Dtype, int]:
        """Compute dtype, and windows per forward pass of one rank, of a cut for which a model runs."""
        assert self.dtype is not None and self.micro_batch_size is not None, "planned as one for which none runs"
        return self.dtype, self.micro_batch_size

    def protected(self) -> tuple[int, int]:
        """``protect_first`` and ``protect_last``, for an allocation that uses them."""
        first, last = self.protect_first, self.protect_last
        assert first is not None and last is not None, "planned for an allocation that protects no layers"
        return first, last

    def limits(self) -> tuple[float, int, int]:
        """``floor``, ``protect_first`` and ``protect_last``, for an allocation that uses them."""
        assert self.floor is not None, "planned for an allocation without floors"
        return self.floor, *self.protected()


class DistillParameters(Parameters):
    """Parameters of a distillation. ``passes``: number of passes over the calibration windows."""

    distillation: DistillationConfig
    passes: int
    seed: int
    adapted: Adapted = None

    @property
    def compute_dtype(self) -> Dtype:
        return self.distillation.dtype


class RecoverParameters(Parameters):
    """Parameters of fine-tuning on instruction pairs."""

    recovery: Annotated[RecoveryConfig, Text]
    seed: int
    layers_may_differ: Annotated[bool, LeftOutAt(False)] = False
    """Whether layers of the model may differ in size. Early versions didn't keep pairs in a row apart if they did."""
    adapted: Adapted = None
    pairs_of_a_row: PairsOfARow = None

    @property
    def compute_dtype(self) -> Dtype:
        return self.recovery.dtype


class LoraPruneParameters(Parameters):
    """Parameters of fine-tuning that prunes, with the settings of ``PruneParameters`` that bound what it removes."""

    recovery: Annotated[RecoveryConfig, Text]
    seed: int
    ratio: float
    structures: Kinds
    multiple_of: int
    tensor_parallel: int
    protect_first: int
    protect_last: int
    adapted: Adapted = None
    pairs_of_a_row: PairsOfARow = None

    @property
    def compute_dtype(self) -> Dtype:
        return self.recovery.dtype

    def protected(self) -> tuple[int, int]:
        """How many layers at the beginning, and how many at the end of the model, lose nothing."""
        return self.protect_first, self.protect_last


class EvaluateParameters(Parameters):
    """Parameters of an evaluation: the settings of an ``EvaluationConfig`` that it depends on."""

    tasks: list[str]
    num_fewshot: int | None
    add_bos_token: bool
    apply_chat_template: bool
    limit: int | None
    batch_size: int
    dtype: Dtype
    positions: Positions = None

    @property
    def compute_dtype(self) -> Dtype:
        return self.dtype


class EfficiencyParameters(Parameters):
    """Parameters of a measurement of speed and memory: the settings of an ``EfficiencyConfig``, and the environment.

    ``device``: as the planner knows it, the processor or GPU of this machine or what is requested from a cluster.
    ``packages``: versions of the libraries that do the computing.
    """

    on_one_rank: ClassVar[bool] = True

    batch_sizes: list[int]
    prompt_tokens: list[int]
    new_tokens: int
    repeats: int
    dtype: Dtype
    device: str
    packages: dict[str, str | None]

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest sequence, including those generated."""
        return max(self.prompt_tokens) + self.new_tokens

    @property
    def compute_dtype(self) -> Dtype:
        return self.dtype


PARAMETERS: dict[str, type[Parameters]] = {
    "importance": ImportanceParameters,
    "reference": ReferenceParameters,
    "prune": PruneParameters,
    "distill": DistillParameters,
    "recover": RecoverParameters,
    "evaluate": EvaluateParameters,
    "efficiency": EfficiencyParameters,
    "loraprune": LoraPruneParameters,
}


def read_parameters(kind: str, record: Mapping[str, Any]) -> Parameters:
    """The settings in a record; ``OtherParameters`` if they are not exactly what today's code would record.

    Args:
        kind: kind of stage.
        record: result of ``Parameters.to_json``, in any version of the code.
    """
    try:
        parameters = PARAMETERS[kind].model_validate(dict(record))
    except (KeyError, ValidationError):
        return OtherParameters(record=dict(record))
    is_exact = canonical_text(parameters.to_json()) == canonical_text(record)
    return parameters if is_exact else OtherParameters(record=dict(record))
