"""The memory that a stage needs of each GPU: weights on a rank + activations + the largest temporary.

Each kind's module has the formula for its job. They count what the code keeps, from a model's dimensions; tests compare
them with the bytes that small models take. What they leave out is ``MARGIN``: CUDA's context, communication buffers,
fragmentation, smaller values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.parameters import Parameters
from hfprune_dist.core.memory_limits import CHUNK_BYTES
from hfprune_dist.kinds.dimensions import Dimensions
from hfprune_dist.store.stage import Stage

GIB = 2**30
MARGIN = 1.2
# Bytes of a number in each compute dtype, and in the dtypes of sums and of solves.
ITEMSIZE = {"float32": 4, "bfloat16": 2}
FLOAT32, FLOAT64 = 4, 8
# How many parameters DeepSpeed gathers at a time, by default.
LIVE_PARAMETERS = 1_000_000_000
# core.head: of a chunk, logits and another loss's gradient in bfloat16; logits, exponentials and products in float32.
HEAD_BYTES = 8 * CHUNK_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak.

    Attributes:
        weights: a rank's share, with what training keeps for it, and what is gathered for the layers being computed.
        activations: what a micro-batch keeps for backward, or the widest layer of a forward.
        temporary: the largest values that are there only for a while, and sums.
    """

    weights: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.temporary

    @property
    def needed(self) -> float:
        """The bytes that a GPU should have."""
        return MARGIN * self.total


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a job runs on, one for each rank; ``memory``: bytes of one."""

    nodes: int
    per_node: int
    memory: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Job(ABC):
    """What a stage does with a model: ``batch`` sequences of ``tokens`` at a time, in numbers of ``itemsize`` bytes.

    With ``checkpointing``, layers keep only their inputs, and run again in backward. ``is_placed``: whether the model's
    weights lie whole on each rank or are sharded, as ``placement`` decides.
    """

    is_placed: ClassVar[bool] = True

    batch: int
    tokens: int
    itemsize: int = 2
    checkpointing: bool = False

    @abstractmethod
    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """The memory of one of ``ranks``, over which the model is sharded."""

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank for hidden states that wait there."""
        return 0

    def _weights(self, dims: Dimensions, ranks: int) -> float:
        if ranks == 1:
            return dims.parameters * self.itemsize
        # A layer's experts are two tensors of one module, which are gathered together, however many that makes.
        live = max(LIVE_PARAMETERS, dims.expert_parameters)
        gathered = min(dims.parameters, live + dims.head_parameters)
        return (dims.parameters / ranks + gathered) * self.itemsize


@dataclass(frozen=True)
class LayerPass(Job):
    """Windows through a model layer by layer, one at a time on each rank; ``samples``: all windows, copies included."""

    is_placed: ClassVar[bool] = False

    samples: int = 1

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """See ``Job``."""
        return one_layer(self, dims, temporary=0.0)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """See ``Job``."""
        return states(self, dims, self.samples, ranks) * self.itemsize


@dataclass(frozen=True)
class Planned:
    """A stage in its plan.

    Attributes:
        stages: all stages, by id.
        dense: the checkpoint that its model is, or was made from.
        checkpointing: ``runtime.activation_checkpointing``.
    """

    stage: Stage
    stages: Mapping[str, Stage]
    dense: Checkpoint
    checkpointing: bool

    def source(self, *roles: str) -> Parameters:
        """The settings of the stage that makes an input or, with several roles, an input of that input."""
        stage = self.stage
        for role in roles:
            stage = self.stages[stage.inputs[role].location]
        return stage.params


class StageParameters(Parameters, ABC):
    """The settings of a kind of stage, and what it needs of a machine.

    Attributes:
        tokenizes: whether it reads text with the tokenizer of its model.
        dtype_setting: the setting for its compute dtype, where it has one of its own.
        batch_setting: the setting for how many sequences run at a time.
        remedy: what helps where no number of nodes is enough.
    """

    tokenizes: ClassVar[bool] = False
    dtype_setting: ClassVar[str | None] = None
    batch_setting: ClassVar[str] = "calibration.micro_batch_size"
    remedy: ClassVar[str] = "no number of nodes is enough: GPUs with more memory, or shorter sequences"

    @abstractmethod
    def job(self, planned: Planned) -> Job | None:
        """What the stage does with a model; None if it runs none."""

    def allows(self, rows: int) -> bool:
        """Whether the micro-batches of all ranks can have so many sequences together."""
        return True


def parameters_of(stage: Stage) -> StageParameters:
    """The settings of a stage."""
    assert isinstance(stage.params, StageParameters)
    return stage.params


def fits(job: Job, dims: Dimensions, gpus: Gpus) -> bool:
    """Whether the GPUs have what a job needs if its model is sharded over all of them."""
    return job.memory(dims, gpus.ranks).needed <= gpus.memory


def widest_of_a_token(dims: Dimensions) -> int:
    """Numbers per token that a forward without gradients holds at a time."""
    of_mlp = 2 * dims.row_projections * dims.intermediate_size
    copy = dims.routed_channels  # each expert reads copies of its tokens; its outputs are weighted and reordered
    return max(of_mlp + copy, 4 * copy) + 8 * dims.hidden_size


def one_layer(job: Job, dims: Dimensions, temporary: float, models: int = 1) -> Memory:
    """Memory of one layer at a time of each model, while the next one and the next micro-batch arrive."""
    tokens, read = job.batch * job.tokens, max(channels(dims, attention=True))
    if dims.experts is not None:
        read = max(read, dims.experts.chosen * dims.experts.width)
    numbers = (widest_of_a_token(dims) + (1 + models) * dims.hidden_size) * job.itemsize
    return Memory(
        weights=2 * models * dims.layer_parameters * job.itemsize,
        activations=tokens * (numbers + FLOAT32 * read * (temporary > 0)),
        temporary=temporary,
    )


def channels(dims: Dimensions, attention: bool) -> list[int]:
    """Channels that output projections read: of MLPs or experts, and of attention."""
    return [*dims.mlp_channels, *([dims.attention_size] if attention else [])]


def tokens_of_a_rank(job: Job, samples: int, ranks: int) -> int:
    """The most tokens that any rank gets when whole micro-batches are distributed."""
    return min(samples, -(-samples // (job.batch * ranks)) * job.batch) * job.tokens


def states(job: Job, dims: Dimensions, samples: int, ranks: int) -> int:
    """Numbers of the hidden states of a rank's windows."""
    return tokens_of_a_rank(job, samples, ranks) * dims.hidden_size
