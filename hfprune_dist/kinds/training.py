"""Kinds of stages that train LoRA: distillation, recovery, and LoRAPrune, which prunes as it recovers.

Inputs: ``model``, for LoRAPrune the dense one; a distillation's ``reference`` has the dense model's hidden states; the
others read ``instructions`` where the pairs are in a file.
"""

from __future__ import annotations

from typing import ClassVar

from hfprune_dist.config.method import Allocation, Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.training import DistillationConfig, LoraTraining, RecoveryConfig
from hfprune_dist.kinds.memory import FLOAT32, HEAD_BYTES, ITEMSIZE, Need, Planned, Sizes, StageParameters
from hfprune_dist.structures import UnitKind, kinds_among


class DistillParameters(StageParameters):
    """Settings of a distillation. ``passes``: number of passes over the calibration windows."""

    batch_setting: ClassVar[str] = "distillation.micro_batch_size"

    distillation: DistillationConfig
    passes: int
    seed: int

    def need(self, planned: Planned) -> Need:
        tokens = planned.source("reference", "importance").calibration.sequence_length
        rows = self.distillation.micro_batch_size
        return training_need(self.distillation, Sizes.from_checkpoint(planned.dense), rows, tokens, distills=True)


class RecoverParameters(StageParameters):
    """Settings of fine-tuning on instruction pairs."""

    tokenizes: ClassVar[bool] = True
    batch_setting: ClassVar[str] = "recovery.micro_batch_size"
    masks: ClassVar[bool] = False

    recovery: RecoveryConfig
    seed: int

    def need(self, planned: Planned) -> Need:
        tokens, rows = self.recovery.sequence_length, self.recovery.micro_batch_size
        model = Sizes.from_checkpoint(planned.dense)
        return training_need(self.recovery, model, rows, tokens, distills=False, masks=self.masks)


class LoraPruneParameters(RecoverParameters):
    """Settings of fine-tuning that prunes, with those of ``PruneParameters`` that bound what it removes."""

    masks: ClassVar[bool] = True
    allocation: ClassVar[Allocation] = "local"
    floor: ClassVar[float] = 0.0

    ratio: float
    structures: list[UnitKind]
    multiple_of: int
    tensor_parallel: int
    protect_first: int
    protect_last: int

    @classmethod
    def from_method(cls, config: SweepConfig, method: Method, ratio: float) -> LoraPruneParameters:
        """The training of a method with numbers, as ``with_numbers`` returns it."""
        bounds = method.model_dump(include={"multiple_of", "tensor_parallel", "protect_first", "protect_last"})
        structures = kinds_among(method.structures)
        return cls(recovery=config.recovery, seed=config.seed, ratio=ratio, structures=structures, **bounds)


def training_need(
    settings: LoraTraining, model: Sizes, rows: int, tokens: int, *, distills: bool, masks: bool = False
) -> Need:
    """The memory of LoRA training on all linear layers of attention and MLP; in a mixture of experts, on attention's.

    Args:
        rows: of ``tokens`` tokens each, at a time.
        distills: whether the loss is the divergence from a dense model, whose head is there as well.
        masks: whether the inputs of output projections are multiplied by masks (LoRAPrune), beside which they are kept.
    """
    tokens, itemsize, hidden, neurons = rows * tokens, ITEMSIZE[settings.dtype], model.hidden, model.neurons
    of_mlp = 0 if model.routed else neurons  # which LoRA adapts
    sides = 4 * hidden + model.attention + 3 * (hidden + of_mlp) * (of_mlp > 0)
    # In float32: weight, gradient, two moments and what a step computes; in the compute dtype: weight and gradient.
    lora = model.num_layers * settings.rank * sides * (5 * FLOAT32 + 2 * itemsize)
    # Norms in float32; attention, what the MLP multiplies, experts' outputs, and what linear layers read; with dropout,
    # a copy of that and a mask for each of them.
    kept = model.attention + masks * model.heads + 3 * neurons + model.routed + 2 * hidden
    dropped = (4 * hidden + (2 * hidden + neurons) * (of_mlp > 0)) * (itemsize + 1) * (settings.dropout > 0)
    layer = 2 * FLOAT32 * hidden + kept * itemsize + dropped
    # The logits; in float32: the logits again, their log-softmax and its gradient.
    head = tokens * model.vocabulary * (itemsize + 3 * FLOAT32)
    if distills:  # in chunks, for both models; final hidden states and the gradient there
        head = 2 * HEAD_BYTES + 3 * tokens * hidden * itemsize
    return Need(
        weights=model.parameters * itemsize,
        activations=tokens * model.num_layers * layer,
        temporary=head + lora,  # which is there all the time, and whole on each rank
        gathered=model.gathered * itemsize,
        again=tokens * (model.num_layers * hidden * itemsize + layer),
    )
