"""LoRAPrune: units are scored by LoRA's own gradients while it trains, and masked little by little (Zhang et al. 2023,
arXiv 2305.18403).

Here are the scores and the schedule; ``training.loraprune`` applies them. Where the paper and the authors' code differ,
this follows the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Weight of the previous value in a step of the moving average.
DECAY = 0.9
# All steps are cut into so many equal parts. No unit is masked in the first one; the final number is reached before the
# last one.
PARTS = 10
# Number of steps between two maskings, and the fewest maskings of a training too short for this.
MASK_EVERY, MASKINGS = 10, 10
TINY = 1e-8


@dataclass(frozen=True)
class Factors:
    """LoRA's factors for a weight [out, in], and a loss's gradients at them; ``scale`` is alpha / r."""

    a_RI: Tensor
    b_OR: Tensor
    grad_a_RI: Tensor
    grad_b_OR: Tensor
    scale: float

    def gradient(self) -> Tensor:
        """Return the estimate of the weight's own gradient [out_features, in_features] (the paper's equation 8): the
        change of B A in one step of gradient descent at a learning rate of 1.
        """
        # g_B A + B g_A - g_B g_A, in two products instead of three.
        return torch.addmm(self.grad_b_OR @ (self.a_RI - self.grad_a_RI), self.b_OR, self.grad_a_RI)

    def added_to(self, weight_OI: Tensor) -> Tensor:
        """Return the weight plus LoRA's update of it."""
        return torch.addmm(weight_OI.to(self.a_RI.dtype), self.b_OR, self.a_RI, alpha=self.scale)


def unit_scores(weight_OI: Tensor, factors: Factors, axis: int, per_unit: int, parts: int = 1) -> Tensor:
    """Return sums of |gradient * (W + scale B A)| over each unit's entries of a tensor, float64 [units], of norm 1.

    The paper squares the terms; the code doesn't.

    Args:
        axis, per_unit: dimension along which units follow one another, with so many entries each.
        parts: number of matrices concatenated along that axis; each gives such a vector, and these are added up.
    """
    terms_OI = factors.added_to(weight_OI).mul_(factors.gradient()).abs_()
    entries = terms_OI.sum(1 - axis, dtype=torch.float64)
    sums_PU = entries.view(parts, -1, per_unit).sum(2)
    vector_U: Tensor = (sums_PU / (sums_PU.norm(dim=1, keepdim=True) + TINY)).sum(0)
    return vector_U


def masks_after(step: int, total_steps: int) -> bool:
    """Return whether units are masked after this optimizer step, counted from 1."""
    return step == total_steps or step % max(1, min(MASK_EVERY, total_steps // MASKINGS)) == 0


def gone_after(step: int, total_steps: int, gone: int) -> int:
    """Return the number of units removed after this optimizer step, counted from 1; ``gone`` is the final number.

    It rises from 0 along a cubic, flat in the first and in the last tenth of the steps; after the last step it is
    ``gone``, however few steps there are. It is rounded to the nearest integer, whereas the authors' code rounds down:
    a layer that is to lose one of a few KV groups would then lose it with hardly a step left.
    """
    if PARTS * step <= total_steps:
        return 0
    if PARTS * step > (PARTS - 1) * total_steps:
        return gone
    left = 1 - (PARTS * step - total_steps) / ((PARTS - 2) * total_steps)
    return int(gone * (1 - left**3) + 0.5)
