"""Prune: cuts a model by its scores, refits what stays, and writes the checkpoint.

Inputs: ``model``; ``importance``, its scores and the windows that they were made on; and ``dense``, the dense model, if
``model`` is what an earlier round of pruning and training has left of it.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Allocation, Effort, Method, Refit, Structures
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import Dtype, PositiveOrAuto
from hfprune_dist.core.memory_limits import KEPT_BYTES, NORM_TOKENS
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import (
    FLOAT32,
    FLOAT64,
    HEAD_BYTES,
    ITEMSIZE,
    Need,
    Planned,
    Sizes,
    StageParameters,
    layer_by_layer,
)
from hfprune_dist.methods import MethodCriterion
from hfprune_dist.structures import KV_GROUPS, NEURONS


class PruneParameters(StageParameters):
    """Settings of one cut: those of a ``Method`` that it depends on.

    ``ratio``: removed parameters, those of earlier rounds included / all of the dense model's. ``dtype`` and
    ``micro_batch_size`` (windows per rank's forward pass) are None if no model runs. ``tensor_parallel`` divides
    ``multiple_of`` and numbers of KV groups.
    """

    ratio: float
    criterion: MethodCriterion
    allocation: Allocation
    refit: Refit
    multiple_of: int
    floor: float = 0.0
    protect_first: int = 0
    protect_last: int = 0
    dtype: Dtype | None = None
    micro_batch_size: PositiveOrAuto | None = None
    structures: Structures = Field(default=[NEURONS])
    tensor_parallel: int = 1
    effort: Effort = "thorough"

    @property
    def is_thorough(self) -> bool:
        return self.effort == "thorough"

    @property
    def sees_copies(self) -> bool:
        """Whether a refit also sees a copy of each window, with redrawn tokens."""
        return self.is_thorough and self.refit in ("dense", "layerwise", "block")

    @property
    def refits_norms(self) -> bool:
        """Whether the weights of all norms are refitted at the end."""
        return self.is_thorough and self.refit in ("layerwise", "block")

    @classmethod
    def from_method(cls, config: SweepConfig, method: Method, ratio: float) -> PruneParameters:
        """The cut of a method with numbers, as ``with_numbers`` returns it."""
        runs_model = method.refit != "none" or method.allocation in ("plain", "searched", "low_rank")
        holds_out = method.allocation in ("plain", "searched") or method.refit in ("dense", "layerwise", "block")
        calibration, size = config.calibration, config.calibration.least_at_once
        if holds_out and calibration.samples <= 2 * size:
            raise UserError(
                f"calibration.samples: {calibration.samples} windows in passes of {size} are too few for a method "
                f"that fits some and holds out others; use {2 * size + 1} or more, or a lower micro_batch_size"
            )
        return cls(
            ratio=ratio,
            **method.model_dump(include={*cls.model_fields}),
            dtype=config.importance.dtype if runs_model else None,
            micro_batch_size=calibration.micro_batch_size if runs_model else None,
        )

    def forward_pass(self) -> tuple[Dtype, int]:
        """Compute dtype, and windows per forward pass of one rank (at least), of a cut for which a model runs."""
        assert self.dtype is not None and self.micro_batch_size is not None, "planned as one for which none runs"
        return self.dtype, 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    def need(self, planned: Planned) -> Need | None:
        if self.refit == "none" and self.allocation != "low_rank":
            return None
        calibration = planned.source("importance").calibration
        samples = calibration.samples * (1 + self.sees_copies)
        return self.passes_over(planned.dense, samples, calibration.sequence_length, self.forward_pass()[1])

    def passes_over(self, checkpoint: Checkpoint, samples: int, tokens: int, at_once: int) -> Need:
        """The memory of windows, so many in all and at once, layer by layer through the dense model, and for layerwise
        and block through the pruned one.
        """
        model, itemsize = Sizes.from_checkpoint(checkpoint), ITEMSIZE[self.forward_pass()[0]]
        rows, hidden = min(at_once, samples), model.hidden
        pursues, steps = self.refit in ("layerwise", "block"), self.refit == "block"
        temporary = 0.0
        if self.allocation == "low_rank":  # inputs of a layer; the eigenvectors of the largest matrix, with the factors
            largest = max(hidden, model.heads)
            temporary = FLOAT64 * (7 * largest**2 + 2 * hidden * model.attention + 2 * rows * tokens * model.neurons)
        elif self.refit != "bias":
            temporary = self._least_squares(model, pursues)
        if steps:
            temporary = max(temporary, self._gauss_newton(model, samples * tokens, itemsize))
        # Both models' states, those between blocks, and an MLP's inputs with its targets in float32; or all layers'.
        number = itemsize * (1 + pursues * (1 + (KV_GROUPS in self.structures)) + steps) + FLOAT32 * steps
        waiting = samples * tokens * number
        if self.refits_norms:
            waiting = max(waiting, (model.num_layers + 4) * min(samples * tokens, NORM_TOKENS) * itemsize)
        models, host = 1 + pursues, waiting * hidden
        need = layer_by_layer(model, rows, tokens, itemsize, models=models, temporary=temporary, host=host)
        if not self.refits_norms:
            return need
        # What a layer keeps for backward, with norms and their factors' terms in float32, and gradients; and the head.
        backward = rows * tokens * (itemsize * (model.attention + model.routed + 6 * model.neurons) + 32 * hidden)
        head = 2 * HEAD_BYTES + itemsize * model.vocabulary * hidden
        temporary = max(temporary, head)
        return replace(need, activations=max(need.activations, backward), temporary=temporary)

    def _kept(self, width: int) -> float:
        """Channels that stay: a share of the model, taken from MLPs alone, leaves no more of each; where layers
        compete, all may stay.
        """
        return width * (1 - self.ratio if self.allocation == "uniform" else 1.0)

    def _least_squares(self, model: Sizes, pursues: bool) -> float:
        """Gram matrices of windows that are fitted and of those that are held out, and a solve of the widest block."""
        widths = [*model.mlp_channels, *([model.heads] if KV_GROUPS in self.structures else [])]
        kept = self._kept(max(widths))
        read = kept + model.hidden if pursues else max(widths)  # and the dense model's hidden states
        squares = read**2 if pursues else sum(width**2 for width in widths)
        return FLOAT64 * (2 * squares + 4 * kept**2 + model.hidden * (2 * read + 6 * kept))

    def _gauss_newton(self, model: Sizes, tokens: int, itemsize: int) -> float:
        """Two Gram matrices of what stays, the iterations, and what a rank keeps of its micro-batches."""
        kept = self._kept(model.neurons)
        linearized = min(KEPT_BYTES, tokens * (3 * kept + model.hidden) * itemsize)
        return 28 * kept**2 + 180 * kept * model.hidden + linearized
