"""Kinds of stages that train: recovery, and LoRAPrune, which prunes as it recovers.

Inputs: ``model``, for LoRAPrune the dense one; what is read: ``text``, if it is a file, the dense model's ``answers``,
or the pass with the ``windows``; of a teacher, its hidden states (``reference``) or itself, to run beside (``dense``);
a reference on ``held-out`` text, for evaluations on the way; and the dense model again, for its ``head``, where rounds
may have changed the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hfprune_dist.config.method import Allocation, Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.training import Training, layers_of
from hfprune_dist.kinds.memory import FLOAT32, HEAD_BYTES, ITEMSIZE, Need, Planned, Sizes, StageParameters
from hfprune_dist.structures import UnitKind, kinds_among

# The file in an artifact, and beside snapshots, with a line for each optimizer step.
LOSSES = "loss.jsonl"
# Keys of lines: KL on held-out text, and on the first line KL before that step.
HELD_OUT_KL, UNTRAINED_KL = "held_out_kl", "untrained_kl"


class RecoverParameters(StageParameters):
    """Settings of a training."""

    tokenizes: ClassVar[bool] = True
    batch_setting: ClassVar[str] = "recovery.micro_batch_size"
    masks: ClassVar[bool] = False

    recovery: Training
    seed: int

    def need(self, planned: Planned) -> Need:
        tokens, inputs = self.recovery.sequence_length, planned.stage.inputs
        if "windows" in inputs:
            tokens = planned.source("windows").calibration.sequence_length
        model = Sizes.from_checkpoint(planned.dense)
        rows = self.recovery.least_at_once
        return training_need(self.recovery, model, rows, tokens, has_teacher="dense" in inputs, masks=self.masks)


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
        return cls(recovery=config.recovery.complete(), seed=config.seed, ratio=ratio, structures=structures, **bounds)


def has_converged(losses: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether a training with these lines of losses ends early."""
    divergences = [line[HELD_OUT_KL] for line in losses if HELD_OUT_KL in line]
    patience = patience or len(divergences)
    return len(divergences) > patience and min(divergences[-patience:]) >= min(divergences[:-patience])


def training_need(
    settings: Training, model: Sizes, rows: int, row_tokens: int, *, has_teacher: bool = False, masks: bool = False
) -> Need:
    """The memory of a training.

    Args:
        rows: of ``row_tokens`` tokens each, at a time.
        has_teacher: whether the dense model runs beside the one that is trained.
        masks: whether the inputs of output projections are multiplied by masks (LoRAPrune), beside which they are kept.
    """
    tokens, itemsize, hidden, neurons = rows * row_tokens, ITEMSIZE[settings.dtype], model.hidden, model.neurons
    of_mlp = 0 if model.routed else neurons  # which LoRA adapts
    sides = 4 * hidden + model.attention + 3 * (hidden + of_mlp) * (of_mlp > 0)
    # In float32: weight, gradient, two moments and what a step computes; in the compute dtype: weight and gradient.
    trained, own, shared = model.num_layers * settings.rank * sides, 5 * FLOAT32 + 2 * itemsize, 0
    if not (lora := settings.method == "lora"):  # gradients; ranks share weights, moments and what a step computes
        trained, own, shared = trained_in_place(settings, model), FLOAT32, 5 * FLOAT32
    # Norms in float32; attention, what the MLP multiplies, experts' outputs, and what linear layers read; with dropout,
    # a copy of that and a mask for each of them.
    kept = model.attention + masks * model.heads + 3 * neurons + model.routed + 2 * hidden
    dropped = (4 * hidden + (2 * hidden + neurons) * (of_mlp > 0)) * (itemsize + 1) * (lora and settings.dropout > 0)
    layer = 2 * FLOAT32 * hidden + kept * itemsize + dropped
    # The logits; in float32: the logits again, their log-softmax and its gradient.
    head = tokens * model.vocabulary * (itemsize + 3 * FLOAT32)
    if settings.teacher_share:  # in chunks, for both models; final hidden states and the gradient there
        head = 2 * HEAD_BYTES + 3 * tokens * hidden * itemsize + (not lora) * model.vocabulary * hidden * 2 * FLOAT32
    forward = has_teacher * tokens * model.forward * itemsize
    teacher, gathered = has_teacher * model.parameters * itemsize, (1 + has_teacher) * model.gathered * itemsize
    return Need(
        weights=model.parameters * itemsize + teacher * lora,
        activations=tokens * model.num_layers * layer,
        # What is trained is there all the time, and whole on each rank.
        temporary=max(head, forward) + trained * own + gathered / 2 * (has_teacher and not lora),
        gathered=gathered if lora else None,
        again=tokens * (model.num_layers * hidden * itemsize + layer),
        shared=trained * shared + teacher * (not lora),
    )


def trained_in_place(settings: Training, model: Sizes) -> int:
    """About how many parameters are trained themselves."""
    if settings.method == "full":
        return model.parameters
    table, of_parts = model.vocabulary * model.hidden, 0
    for part in settings.parts:
        of_norms = 4 * model.num_layers * model.hidden
        of_parts += layers_of(part) * model.layer or (of_norms if part == "norms" else table)
    return min(of_parts, model.parameters)
