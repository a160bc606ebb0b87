"""Text much like a given one, with some tokens redrawn, so that refits see more than the calibration windows.

Each redrawn token comes from the dense model's distribution of the next token, given the original tokens before it. So
one forward of the original is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.core.head import Outputs
from hfprune_dist.core.losses import numbered_generator
from hfprune_dist.core.portions import row_blocks

# Share of the tokens that a copy redraws, on average.
REDRAWN = 0.5
# What drawing a token takes for each word of the vocabulary: a probability, and its sum in two dtypes of 8 bytes.
SCRATCH_BYTES = 20
# Unit in which probabilities are added up as integers: few float32 numbers need a finer one, and sums stay below 2^63.
QUANTUM = 2.0**-60
# Of all random numbers: copies are the same in all sweeps that have the same windows.
SEED = 0


@torch.no_grad()
def redrawn_copy(ids_T: Tensor, dense: Outputs, *, window: int) -> Tensor:
    """A copy of a window in which some tokens are redrawn, int64 [tokens] on the CPU; its first token stays. The dense
    model's outputs for it, and its number ``window``, determine what is drawn.
    """
    # For each token, a number that says whether it is redrawn, and one that says which its successor is.
    generator = numbered_generator(SEED, window, "copy 0")
    chosen_T, uniform_T = torch.rand(2, len(ids_T), generator=generator, dtype=torch.float64)
    uniform_T, drawn_T = uniform_T.to(dense.hidden_NC.device), ids_T.clone()
    for rows, logits_NV in dense.logits():
        for block in row_blocks(logits_NV, SCRATCH_BYTES):
            some = slice(rows.start + block.start, rows.start + block.stop)
            drawn_T[some] = sample_labels(logits_NV[block], uniform_T[some]).cpu()
    redrawn_T = chosen_T < REDRAWN
    redrawn_T[0] = False
    return drawn_T.roll(1).where(redrawn_T, ids_T)


def sample_labels(logits_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Draw labels y ~ p = softmax(z), int64 [tokens], by inverting p's cumulative distribution at ``uniform_N``."""
    p_NV = logits_NV.softmax(dim=-1)
    if p_NV.device.type == "cpu":
        cumulative_NV = p_NV.cumsum_(dim=-1)
    else:  # GPUs add in a varying order, which changes no bits of sums of integers
        cumulative_NV = p_NV.double().div_(QUANTUM).long().cumsum_(dim=-1).to(p_NV.dtype)
    # The last entry is 1 up to rounding. A number that is rounded up to 1 selects the last word that is possible.
    total_N1 = cumulative_NV[:, -1:]
    threshold_N1 = (uniform_N[:, None].to(total_N1.dtype) * total_N1).minimum(total_N1.nextafter(0 * total_N1))
    return torch.searchsorted(cumulative_NV, threshold_N1, right=True).squeeze(1)
