"""Finals between shapes that cheap refits leave close to each other: fitted layer by layer, compared on other windows.

Fitting layer by layer makes up for more where layers are gone, which cheap refits can't show. So the closest shape is
tried with fewer layers as well, as long as that helps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.refit.candidates import FinishedLayers, candidates_of
from hfprune_dist.refit.measurement import Measurement, one_by_one
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.stages.prune_refit import (
    Context,
    after_each_layer,
    outputs_of_dense,
    pruned_kinds,
    refit_layers,
)
from hfprune_dist.structures.kept import Kept

# One micro-batch of windows in this many is kept apart from everything else in the stage, to compare finalists.
JUDGED_EVERY = 16
# How many of the shapes that cheap refits leave closest are finalists.
FINALISTS = 2
# Shapes that cheap refits leave with more than this many times the least divergence aren't finalists. Better refits
# reversed the order of a small model's shapes where that factor was 1.06 or 1.14, not where it was 1.30, 1.42 or 1.51.
HOPELESS = 1.25


@dataclass(frozen=True)
class SplitWindows:
    """Calibration windows, split for the finals.

    Attributes:
        seen_ST: those that refits, and measurements before the finals, see.
        judged: the others, as micro-batches of one window.
    """

    seen_ST: Tensor
    judged: Mapping[int, Tensor]

    @classmethod
    def apart(cls, windows_ST: Tensor, micro_batch_size: int) -> SplitWindows:
        """Keep the last windows apart; if there is only one micro-batch, it is both seen and judged."""
        batches = windows_ST.split(micro_batch_size)
        judged = max(1, len(batches) // JUDGED_EVERY)
        if len(batches) == 1:
            return cls(windows_ST, one_by_one(windows_ST))
        return cls(torch.cat(batches[:-judged]), one_by_one(torch.cat(batches[-judged:])))


def hopeful(kls: Mapping[str, float]) -> list[str]:
    """The shapes, at least one, that may turn out to be the closest; the closest after a cheap refit first."""
    closest = min(kls.values())
    farthest = max(closest, HOPELESS * closest)  # rounding can make a divergence of zero negative
    return [shape for shape in sorted(kls, key=kls.__getitem__) if kls[shape] <= farthest]


class Finals:
    """Shapes that are fitted layer by layer, and compared on windows that were kept apart.

    Args:
        kept: returns what the shape with a name keeps; collective.

    Attributes:
        kl: each shape's divergence from the dense model, nats per token.
    """

    def __init__(
        self,
        context: Context,
        checkpoint: Checkpoint,
        windows: SplitWindows,
        kept: Callable[[str], Kept],
    ) -> None:
        self._context = context
        self._checkpoint = checkpoint
        self._windows = windows
        self._kept = kept
        # The dense model's outputs; one pass through its layers, which is collective, serves all comparisons.
        self._outputs = cache(partial(outputs_of_dense, context, checkpoint, windows.judged))
        self._finalists: dict[str, tuple[Kept, RefittedLayers]] = {}
        self._measurement = self._of_finalists()
        self.kl: dict[str, float] = {}

    def closest(self, first: Sequence[str], with_fewer_layers: Callable[[str], str | None]) -> str:
        """The shape that is closest once its layers have been fitted one by one.

        Args:
            first: the shapes to compare first; among equally close ones, the first wins.
            with_fewer_layers: returns what else to try if the given shape is the closest; None for nothing.
        """
        best, *rivals = first
        ahead = first if rivals or with_fewer_layers(best) else []
        while ahead:
            self._hold(ahead)
            best = min(self.kl, key=self.kl.__getitem__)
            fewer = with_fewer_layers(best)
            ahead = [] if fewer is None or fewer in self.kl else [fewer]
        return best

    def _hold(self, shapes: Sequence[str]) -> None:
        """Refit some more shapes, and compare all shapes so far."""
        for shape in shapes:
            kept = self._kept(shape)
            self._finalists[shape] = kept, self._fitted(shape, kept)
        candidates = candidates_of([kept for kept, _ in self._finalists.values()], self._checkpoint.num_layers)
        self.kl = dict(zip(self._finalists, self._measurement.kl(candidates), strict=True))

    def _fitted(self, shape: str, kept: Kept) -> RefittedLayers:
        """Refit a shape by least squares only: further steps take several times as long, and don't change the order."""
        context, checkpoint = self._context, self._checkpoint
        folder = context.work / f"final-{re.sub('[^a-zA-Z0-9]+', '-', shape)}"
        fitted = RefittedLayers(checkpoint, pruned_kinds(context, checkpoint), whole_mlp=False, folder=folder)
        refit_layers(context, self._checkpoint, kept, self._windows.seen_ST, fitted, phase="finalists")
        return fitted

    def _of_finalists(self) -> Measurement:
        context, checkpoint = self._context, self._checkpoint
        return Measurement(
            checkpoint,
            lambda: FinishedLayers(list(self._finalists.values())),
            self._windows.judged,
            reference=self._outputs,
            dtype=getattr(torch, context.params.forward_pass()[0]),
            world=context.world,
            after_each=after_each_layer(context, "comparison", checkpoint.num_layers),
        )
