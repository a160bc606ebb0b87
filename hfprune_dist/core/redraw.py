"""Text much like a given one, on which a pruned model can be compared with the dense one: some tokens are redrawn.

Each redrawn token comes from the dense model's distribution of the next token, given the original tokens before it. So
one forward of the original is enough for any number of copies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hfprune_dist.core.blocks import row_blocks
from hfprune_dist.core.fidelity import Outputs
from hfprune_dist.core.losses import sample_labels, window_generator

# Share of the tokens that a copy redraws, on average.
REDRAWN = 0.5
# What drawing a token takes for each word of the vocabulary: a probability, and its sum in two dtypes of 8 bytes.
SCRATCH_BYTES = 20
# Of all random numbers: copies are the same in all sweeps that have the same windows.
SEED = 0


@torch.no_grad()
def redrawn_copy(ids_T: Tensor, dense: Outputs, *, window: int, copy: int) -> Tensor:
    """A copy of a window in which some tokens are redrawn, int64 on the CPU; its first token stays.

    Args:
        ids_T: the original, int64 on the CPU.
        dense: the dense model's outputs for it.
        window: number of the window; it and ``copy`` determine what is drawn.
    """
    generator = window_generator(SEED, window, f"copy {copy}")
    chosen_T, uniform_T = torch.rand(2, len(ids_T), generator=generator, dtype=torch.float64)
    before_N = (chosen_T[1:] < REDRAWN).nonzero().squeeze(1)
    copied_T = ids_T.clone()
    if len(before_N):
        device = dense.hidden_NC.device
        uniform_N = uniform_T[before_N].to(device)
        predicting = replace(dense, hidden_NC=dense.hidden_NC[before_N.to(device)])
        drawn = [
            sample_labels(logits_NV[block], uniform_N[rows][block])
            for rows, logits_NV in predicting.logits()
            for block in row_blocks(logits_NV, SCRATCH_BYTES)
        ]
        copied_T[1 + before_N] = torch.cat(drawn).cpu()
    return copied_T
