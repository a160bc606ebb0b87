"""Kinds of stages that train LoRA: distillation, recovery, and LoRAPrune, which prunes as it recovers.

Inputs: ``model``, for LoRAPrune the dense one; a distillation's ``reference`` has the dense model's hidden states; the
others read ``instructions`` where the pairs are in a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hfprune_dist.config.method import Method
from hfprune_dist.config.method_settings import Kinds
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.training import DistillationConfig, LoraTraining, RecoveryConfig
from hfprune_dist.kinds.dimensions import Dimensions
from hfprune_dist.kinds.importance import calibration_of
from hfprune_dist.kinds.memory import FLOAT32, HEAD_BYTES, ITEMSIZE, Job, Memory, Planned, StageParameters
from hfprune_dist.structures import kinds_among


class DistillParameters(StageParameters):
    """Settings of a distillation. ``passes``: number of passes over the calibration windows."""

    dtype_setting: ClassVar[str | None] = "distillation.dtype"
    batch_setting: ClassVar[str] = "distillation.micro_batch_size"

    distillation: DistillationConfig
    passes: int
    seed: int

    def job(self, planned: Planned) -> Train:
        tokens = calibration_of(planned, "reference", "importance").sequence_length
        return Train.of(self.distillation, tokens, distills=True)

    def allows(self, rows: int) -> bool:
        return rows <= self.distillation.batch_size


class RecoverParameters(StageParameters):
    """Settings of fine-tuning on instruction pairs."""

    tokenizes: ClassVar[bool] = True
    dtype_setting: ClassVar[str | None] = "recovery.dtype"
    batch_setting: ClassVar[str] = "recovery.micro_batch_size"
    masks: ClassVar[bool] = False

    recovery: RecoveryConfig
    seed: int

    def job(self, planned: Planned) -> Train:
        return Train.of(self.recovery, self.recovery.sequence_length, distills=False, masks=self.masks)

    def allows(self, rows: int) -> bool:
        """Ranks share the rows of an optimizer step evenly."""
        return self.recovery.batch_size % rows == 0


class LoraPruneParameters(RecoverParameters):
    """Settings of fine-tuning that prunes, with those of ``PruneParameters`` that bound what it removes."""

    masks: ClassVar[bool] = True

    ratio: float
    structures: Kinds
    multiple_of: int
    tensor_parallel: int
    protect_first: int
    protect_last: int

    @classmethod
    def of(cls, config: SweepConfig, method: Method, ratio: float) -> LoraPruneParameters:
        """The training of a method with numbers, as ``with_numbers`` returns it."""
        (first, last), multiple_of = method.protected(), method.multiple_of
        assert isinstance(multiple_of, int), "planned with a number"
        return cls(
            recovery=config.recovery,
            seed=config.seed,
            ratio=ratio,
            structures=kinds_among(method.structures),
            multiple_of=multiple_of,
            tensor_parallel=method.split,
            protect_first=first,
            protect_last=last,
        )


@dataclass(frozen=True)
class Train(Job):
    """LoRA training, ``rank`` on all linear layers of attention and MLP; in a mixture of experts, on attention's.

    Attributes:
        distills: whether the loss is the divergence from a dense model, whose head is there as well.
        masks: whether the inputs of output projections are multiplied by masks (LoRAPrune).
    """

    rank: int = 8
    dropout: bool = False
    distills: bool = False
    masks: bool = False

    @classmethod
    def of(cls, settings: LoraTraining, tokens: int, *, distills: bool, masks: bool = False) -> Train:
        """The job of a stage with these settings on rows of ``tokens`` tokens."""
        how = {"rank": settings.rank, "dropout": settings.dropout > 0, "distills": distills, "masks": masks}
        return cls(settings.rows_at_once, tokens, ITEMSIZE[settings.dtype], **how)  # type: ignore[arg-type]

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """See ``Job``."""
        tokens, layer = self.batch * self.tokens, self.layer_bytes(dims, sharded=ranks > 1)
        # In float32: the weight, its gradient and two moments; in the compute dtype: the weight.
        lora = self.lora_parameters(dims) * (4 * FLOAT32 + self.itemsize)
        inputs = dims.num_layers * dims.hidden_size * self.itemsize + layer
        # The logits; in float32: the logits again, their log-softmax and its gradient.
        head = tokens * dims.vocabulary * (self.itemsize + 3 * FLOAT32)
        if self.distills:  # in chunks, for both models; final hidden states and the gradient there
            head = 2 * HEAD_BYTES + 3 * tokens * dims.hidden_size * self.itemsize
        return Memory(
            weights=self._weights(dims, ranks) + lora / ranks,
            activations=tokens * (inputs if self.checkpointing else dims.num_layers * layer),
            temporary=head,
        )

    def lora_parameters(self, dims: Dimensions) -> int:
        """Parameters of A and B of every projection that is trained (see ``checkpoints.lora_adapter``)."""
        sides = dims.adapted_inputs + dims.adapted_outputs
        sides += 0 if dims.is_mixture else dims.mlp_matrices * (dims.hidden_size + dims.intermediate_size)
        return round(dims.num_layers * self.rank * sides)

    def layer_bytes(self, dims: Dimensions, *, sharded: bool) -> int:
        """Bytes per token that one of Hugging Face's layers keeps for backward: norms in float32, attention, what the
        MLP multiplies, experts' outputs; what linear layers read, with dropout a copy and a mask for each.
        """
        hidden, read_by_mlp = dims.hidden_size, dims.hidden_size + dims.beside_experts
        attention = 2 * (dims.num_heads + dims.num_key_value_heads) * dims.head_size
        kept = attention + (2 * dims.row_projections - 1) * dims.intermediate_size + dims.routed_channels
        kept += dims.attention_size * (self.masks and (sharded or not self.dropout))  # masked, beside what it was
        dropped = 0.0
        if self.dropout:
            of_mlp = 0 if dims.is_mixture else dims.row_projections * hidden + dims.intermediate_size
            dropped = (dims.adapted_inputs + of_mlp) * (self.itemsize + 1)
            kept += (hidden + read_by_mlp) * sharded  # DeepSpeed's frozen linear layers keep what they read
        else:
            kept += hidden + read_by_mlp * (sharded or not dims.is_mixture)
        return round(2 * FLOAT32 * hidden + kept * self.itemsize + dropped)
