"""Refit of all norms at once: factors on their outputs that bring the pruned model's distribution to the dense one's.

Layers that are fitted one by one each make up for what is lost so far, and none of them for what the logits lose in the
end. Factors on norms' outputs are few, a checkpoint holds them in weights that it has anyway, and together they reach
every block. The divergence is lowered by L-BFGS (``core.quasi_newton``) on some of the windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import load_usable, save_tensors
from hfprune_dist.core.quasi_newton import QuasiNewton
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.refit.norm_gradients import NormGradients

# Factors are few: more tokens than these would only take time.
TOKENS = 2**15
# Micro-batches have at most so many tokens, or one window, whatever calibration has: this refit sees few tokens, which
# would make few larger ones, and ranks without any would wait for the others.
AT_ONCE = 2**10
# A channel that hardly any token uses has hardly any curvature; each gets this share of its norm's mean.
RIDGE = 0.1


def micro_batches_of_norms(windows_ST: Tensor, micro_batch_size: int) -> dict[int, Tensor]:
    """Micro-batches of up to ``TOKENS`` tokens in all, at even distances: number -> ids [windows, tokens]."""
    batches = windows_ST.split(max(1, min(micro_batch_size, AT_ONCE // windows_ST.shape[1])))
    every = -(-len(batches) // max(1, TOKENS // batches[0].numel()))
    return {index: batches[index] for index in range(0, len(batches), every)}


@dataclass(frozen=True)
class NormsFit:
    """Factors on the outputs of norms.

    Attributes:
        factors_RC: float64 [norms, hidden_size], on the CPU, on every rank.
        kl: divergence from the dense model in each pass, the first before the fit, nats per token.
    """

    factors_RC: Tensor
    kl: list[float]


class NormsRefit:
    """Finds factors.

    Rank 0 searches, and tells the others where to look.

    Args:
        saved: file with the state of the search, from which a later attempt goes on.
    """

    def __init__(self, gradients: NormGradients, saved: Path, world: World) -> None:
        self._gradients = gradients
        self._saved = saved
        self._world = world

    def fit(self) -> NormsFit:
        """The closest factors that were reached; collective.

        Raises:
            UserError: if the divergence of the model as it is, or its gradient, is NaN or infinite.
        """
        search = self._restored()
        passes = self._world.broadcast(0 if search is None else len(search.values))
        self._gradients.count_from(passes)
        if passes == 0:
            search = self._first_pass()
        while not self._world.broadcast(search is None or search.is_over):
            factors_RC = self._agreed(None if search is None else search.candidate_P)
            there = self._gradients.at(factors_RC)
            if search is not None:
                search.tell(there.kl, there.gradient_RC.flatten())
            self._save(search)
        kls = self._world.broadcast([] if search is None else search.values)
        return NormsFit(self._agreed(None if search is None else search.best_P), kls)

    def _first_pass(self) -> QuasiNewton | None:
        """A search that knows the model as it is; only on rank 0."""
        ones_RC = torch.ones(self._gradients.shape, dtype=torch.float64)
        there = self._gradients.at(ones_RC)
        if not (math.isfinite(there.kl) and there.gradient_RC.isfinite().all()):
            raise UserError(
                "the norms can't be refitted: outputs of the pruned model or of the dense model, or gradients, are NaN "
                "or infinite; set importance.dtype=float32 if it isn't yet, else check the checkpoint's weights"
            )
        search = None
        if self._world.is_first:
            search = QuasiNewton(ones_RC.flatten(), curvature_of(there.squares_RC).flatten())
            search.tell(there.kl, there.gradient_RC.flatten())
        self._save(search)
        return search

    def _agreed(self, place_P: Tensor | None) -> Tensor:
        """Rank 0's place, as factors, on every rank."""
        shape = self._gradients.shape
        factors_RC = torch.empty(shape, dtype=torch.float64) if place_P is None else place_P.view(shape).clone()
        self._world.broadcast_tensor(factors_RC, 0)
        return factors_RC

    def _save(self, search: QuasiNewton | None) -> None:
        """Save rank 0's search; collective."""

        def save() -> None:
            assert search is not None, "rank 0 has it"
            save_tensors(search.state(), self._saved)

        self._world.on_rank0(save)

    def _restored(self) -> QuasiNewton | None:
        """The search that an earlier attempt has saved, only on rank 0; collective."""
        state: dict[str, Tensor] = {}
        self._world.on_rank0(lambda: state.update(load_usable(self._saved) or {}))
        return QuasiNewton.restored(state) if state else None


def curvature_of(squares_RC: Tensor) -> Tensor:
    """A guess at the divergence's second derivatives along each factor alone, up to one factor for all.

    The square of a token's gradient stands in for its curvature, as in the Fisher matrix. What no token depends on
    stays where it is: its curvature is infinite.

    Args:
        squares_RC: means over tokens of squared gradients, float64 [norms, hidden_size].
    """
    ridged_RC = squares_RC + RIDGE * squares_RC.mean(dim=1, keepdim=True)
    return ridged_RC.where(ridged_RC > 0, torch.inf)
