"""LoRAPrune: scores of units from the gradients of LoRA's factors alone, and how many units are gone at each step.

Zhang et al. 2024, arXiv 2305.18403. Where the paper and the authors' code differ, this is what the code computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES

# What stays of a moving average in a step.
DECAY = 0.9
# Of all steps, so many times the share: none is masked in the first tenth, none is left to be masked in the last.
FLAT = 10
# Units are masked every so many steps; of a shorter training, in each tenth of it.
MASK_EVERY, TENTHS = 10, 10
TINY = 1e-8
# Numbers of a weight whose terms are made at a time.
PORTION = ACCELERATOR_BYTES // 4


@dataclass(frozen=True)
class Factors:
    """LoRA's factors of a weight [out_features, in_features], and a loss's gradients there; all of one float dtype.

    Attributes:
        a_RI, grad_a_RI: [r, in_features].
        b_OR, grad_b_OR: [out_features, r].
        scale: alpha / r.
    """

    a_RI: Tensor
    b_OR: Tensor
    grad_a_RI: Tensor
    grad_b_OR: Tensor
    scale: float

    def rows(self, part: slice) -> Factors:
        """Those of some rows of the weight."""
        return replace(self, b_OR=self.b_OR[part], grad_b_OR=self.grad_b_OR[part])

    def gradient(self) -> Tensor:
        """What stands for the weight's own gradient [out_features, in_features] (the paper's equation 8): how B A would
        change in a step of gradient descent at a learning rate of 1.
        """
        # g_B A + B g_A - g_B g_A, in two products instead of three.
        return torch.addmm(self.grad_b_OR @ (self.a_RI - self.grad_a_RI), self.b_OR, self.grad_a_RI)

    def added_to(self, weight_OI: Tensor) -> Tensor:
        """The weight with what LoRA adds to it."""
        return torch.addmm(weight_OI.to(self.a_RI.dtype), self.b_OR, self.a_RI, alpha=self.scale)


def unit_scores(weight_OI: Tensor, factors: Factors, axis: int, per_unit: int, parts: int = 1) -> Tensor:
    """Sums of |gradient * (W + scale B A)| over the weights that each unit owns of a tensor, as a vector of norm 1.

    The paper squares the terms; the code takes them as they are. Memory: for three portions of ``PORTION`` numbers.

    Args:
        axis: along which units follow one another.
        per_unit: consecutive entries of one unit.
        parts: matrices that lie one behind the other along that axis, each of which counts as a tensor of its own.

    Returns:
        float64 [units].
    """
    sums = []
    height = max(1, PORTION // weight_OI.shape[1])
    for first in range(0, len(weight_OI), height):
        part = slice(first, first + height)
        of_rows = factors.rows(part)
        terms_OI = of_rows.added_to(weight_OI[part]).mul_(of_rows.gradient()).abs_()
        sums.append(terms_OI.sum(1 - axis, dtype=torch.float64))
    entries = torch.cat(sums) if axis == 0 else torch.stack(sums).sum(0)
    sums_PU = entries.view(parts, -1, per_unit).sum(2)
    vector_U: Tensor = (sums_PU / (sums_PU.norm(dim=1, keepdim=True) + TINY)).sum(0)
    return vector_U


def averaged(average_U: Tensor, scores_U: Tensor) -> Tensor:
    """The moving average after one more step; before the first it is 0."""
    return DECAY * average_U + (1 - DECAY) * scores_U


def masks_after(step: int, total_steps: int) -> bool:
    """Whether units are masked after this optimizer step, counted from 1."""
    return step == total_steps or step % max(1, min(MASK_EVERY, total_steps // TENTHS)) == 0


def gone_after(step: int, total_steps: int, gone: int) -> int:
    """Units that are gone after this optimizer step, counted from 1, where ``gone`` are at the end.

    Their number rises from 0 along a cubic, flat in the first and in the last tenth of the steps; after the last step
    it is ``gone``, however few steps there are. It is rounded to the nearest, where the code rounds down: a layer that
    is to lose one of a few KV groups would lose it when hardly a step is left.
    """
    if FLAT * step <= total_steps:
        return 0
    if FLAT * step > (FLAT - 1) * total_steps:
        return gone
    left = 1 - (FLAT * step - total_steps) / ((FLAT - 2) * total_steps)
    return int(gone * (1 - left**3) + 0.5)
