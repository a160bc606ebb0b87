"""The parameters of each kind of stage: the settings that enter its fingerprint and that it gets when it runs.

Plans build them from a configuration, the store keeps them in records (``stage.json``, manifests, ``sweep.json``), and
stages read them. They are therefore defined below all three, next to the sections of the configuration they consist of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, Field

from hfprune_dist.config.method_settings import Allocation, Kinds, Refit, Structures
from hfprune_dist.config.section import Dtype, Section, TextSource
from hfprune_dist.config.texts import CalibrationConfig, FidelityConfig
from hfprune_dist.config.training import DistillationConfig, RecoveryConfig
from hfprune_dist.core.criteria import CriterionName, MethodCriterion
from hfprune_dist.structures import NEURONS

# Fields of a text source that describe a data set on the hub.
OF_A_DATA_SET = {"dataset", "name", "split", "revision"}


class Parameters(Section):
    """The settings that a stage's result depends on, besides its inputs and the version of its code.

    ``on_one_rank``: whether such stages always run on a single rank, however many ranks others have.
    """

    on_one_rank: ClassVar[bool] = False

    def to_json(self) -> dict[str, Any]:
        """The content of records, from which fingerprints are computed: all settings, but not where files are."""
        return {name: _recorded(getattr(self, name)) for name in type(self).model_fields}

    @property
    def compute_dtype(self) -> Dtype | None:
        """The dtype in which a model computes; None if no model runs."""
        return None


def _recorded(value: object, file: str = "(file)") -> Any:
    """A setting as JSON. A text's file is an input of the stage, known by its content: ``file`` stands for its path."""
    if isinstance(value, list):
        return [_recorded(part, f"(file {number})") for number, part in enumerate(value, 1)]
    if not isinstance(value, BaseModel):
        return value
    record = {name: _recorded(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, CalibrationConfig) and value.mixture is not None:  # whose texts have these settings
        return {name: it for name, it in record.items() if name not in TextSource.model_fields}
    if isinstance(value, TextSource) and value.path is not None:
        return {name: it for name, it in record.items() if name not in OF_A_DATA_SET} | {"path": file}
    return record


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

    ``structures``: the kinds of units that are scored, each by all criteria that have scores for it. ``student``: the
    student chosen by the scores in the input of this role.
    """

    calibration: CalibrationConfig
    criteria: list[CriterionName]
    dtype: Dtype
    add_bos_token: bool
    seed: int
    structures: Kinds = Field(default=[NEURONS])
    student: StudentParameters | None = None

    @property
    def compute_dtype(self) -> Dtype:
        return self.dtype

    def scoring(self, criteria: Iterable[str], structures: Sequence[str]) -> Self:
        """The same pass, for these criteria and these kinds of units."""
        return self.model_copy(update={"criteria": sorted(criteria), "structures": list(structures)})


class ReferenceParameters(Parameters):
    """Parameters of the dense model's hidden states on held-out ``text`` or, if None, on an importance stage's windows.

    ``micro_batch_size``: windows per forward pass of one rank.
    """

    dtype: Dtype
    micro_batch_size: int
    add_bos_token: bool | None = None
    text: FidelityConfig | None = None

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
    ``refit_norms``: whether the weights of all norms are refitted at the end.
    """

    ratio: float
    criterion: MethodCriterion
    allocation: Allocation
    refit: Refit
    multiple_of: int
    floor: float | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    dtype: Dtype | None = None
    micro_batch_size: int | None = None
    structures: Structures = Field(default=[NEURONS])
    tensor_parallel: int = 1
    refit_iterations: int = 2
    refit_copies: int = 0
    refit_norms: bool = False

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

    @property
    def compute_dtype(self) -> Dtype:
        return self.distillation.dtype


class RecoverParameters(Parameters):
    """Parameters of fine-tuning on instruction pairs."""

    recovery: RecoveryConfig
    seed: int

    @property
    def compute_dtype(self) -> Dtype:
        return self.recovery.dtype


class LoraPruneParameters(Parameters):
    """Parameters of fine-tuning that prunes, with the settings of ``PruneParameters`` that bound what it removes."""

    recovery: RecoveryConfig
    seed: int
    ratio: float
    structures: Kinds
    multiple_of: int
    tensor_parallel: int
    protect_first: int
    protect_last: int

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
