"""Measurements of shapes in a prune stage: many with a cheap refit, then finalists that are fitted layer by layer.

No shape is measured on windows that its refit was fitted to, and finalists are compared on windows that nothing else in
the stage sees. Fitting layer by layer makes up for more where layers are gone, which cheap refits can't show. So the
closest shape is tried with fewer layers as well, as long as that helps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.width_search import drop_order
from hfprune_dist.refit.candidates import CheapFits, FinishedLayers, Scored, candidates_of
from hfprune_dist.refit.measurement import Candidate, Measurement, held_out_batches, one_by_one
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.stages.prune_refit import (
    Context,
    outputs_of_dense,
    pruned_kinds,
    refit_layers,
    stream_of,
)
from hfprune_dist.store.atomic_files import read_object, write_json
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.stage import STAGE_VERSIONS
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Kept

# Windows for comparing candidates and for ordering layers, from those that refits hold out to choose their ridge.
# Ordering needs fewer, since layers differ a lot, and takes the most candidates.
WINDOWS, WINDOWS_OF_ORDER = 8, 2
# Candidates with several structures are many, so they are compared on every second token; widths on every token.
EVERY = 2
# One micro-batch of windows in this many is kept apart from everything else in the stage, to compare finalists.
JUDGED_EVERY = 16
# How many of the shapes that cheap refits leave closest are finalists.
FINALISTS = 2
# Shapes that cheap refits leave with more than this many times the least divergence aren't finalists. Better refits
# reversed the order of a small model's shapes where that factor was 1.06 or 1.14, not where it was 1.30, 1.42 or 1.51.
WORST_FINALIST = 1.25


def may_be_closest(kls: Mapping[str, float]) -> list[str]:
    """The shapes, at least one, that may turn out to be the closest; the closest after a cheap refit first."""
    closest = min(kls.values())
    farthest = max(closest, WORST_FINALIST * closest)  # rounding can make a divergence of zero negative
    return [shape for shape in sorted(kls, key=kls.__getitem__) if kls[shape] <= farthest]


class ShapeSearch:
    """Measures a stage's candidates, and fits and compares the best of them.

    Args:
        kinds: the units that may go with their scores, in the order of a choice's numbers.
        has_finals: whether finalists may be compared; otherwise no windows are kept apart.

    Attributes:
        finalists_kl: each finalist's divergence from the dense model, nats per token.
    """

    def __init__(self, context: Context, checkpoint: Checkpoint, kinds: Sequence[Scored], *, has_finals: bool) -> None:
        self.context = context
        self.checkpoint = checkpoint
        self.kinds = kinds
        self.finalists_kl: dict[str, float] = {}
        self._finalists: dict[str, tuple[Kept, RefittedLayers]] = {}
        self._of_widths_alone = context.params.structures == [NEURONS]
        windows_ST = context.calibration_windows()
        batches = windows_ST.split(context.params.forward_pass()[1])
        apart = max(1, len(batches) // JUDGED_EVERY)
        if has_finals and len(batches) > 1:
            self._seen_ST, judged_ST = torch.cat(batches[:-apart]), torch.cat(batches[-apart:])
        else:  # a single micro-batch is both seen and judged
            self._seen_ST = judged_ST = windows_ST
        # The dense model's outputs; one pass through its layers, which is collective, serves all measurements.
        self._outputs = cache(partial(outputs_of_dense, context, checkpoint, self._compared(WINDOWS)))
        self._comparison = Measurement(
            checkpoint,
            lambda: FinishedLayers(list(self._finalists.values())),
            one_by_one(judged_ST),
            reference=cache(partial(outputs_of_dense, context, checkpoint, one_by_one(judged_ST))),
            dtype=getattr(torch, context.params.forward_pass()[0]),
            world=context.world,
            after_each=context.reporting("comparison", checkpoint.num_layers),
        )

    # With a cheap refit, or none.

    def measurement(self, phase: str, *, refit: bool, measurements: int, windows: int = WINDOWS) -> Measurement:
        """Return a measurement of candidates.

        Args:
            phase: its name in progress reports.
            measurements: how many times it will be called.
            windows: the most windows that candidates are compared on.
        """
        context, checkpoint = self.context, self.checkpoint

        def variants() -> CheapFits:
            stream = stream_of(context, checkpoint, self._seen_ST) if refit else None
            return CheapFits(self.kinds, stream, context.world)

        return Measurement(
            checkpoint,
            variants,
            self._compared(windows),
            reference=self._outputs,
            dtype=getattr(torch, context.params.forward_pass()[0]),
            world=context.world,
            every=self._every,
            after_each=context.reporting(phase, measurements * checkpoint.num_layers),
        )

    def layers_in_order(self, droppable: Sequence[int], count: int) -> list[int]:
        """Return the ``count`` droppable layers that the model misses least, in the order in which they go.

        The store keeps what was measured for stages with other ratios and methods, as far as they measure the same.
        """
        if not count:
            return []
        world, file = self.context.world, self.context.store.root / "layers" / self._key_of_order()
        measurement = self.measurement("layers", refit=False, measurements=count, windows=WINDOWS_OF_ORDER)
        known: dict[str, float] = world.on_rank0(lambda: read_object(file) or {})

        def save() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)

        def measure(sets: Sequence[tuple[int, ...]]) -> list[float]:
            names = {" ".join(map(str, gone)): gone for gone in sets}
            if unknown := [name for name in names if name not in known]:
                kls = measurement.kl([self._whole_without(names[name]) for name in unknown])
                known.update(zip(unknown, kls, strict=True))
                world.on_rank0(save)
            return [known[name] for name in names]

        return drop_order(droppable, count, measure)

    def _key_of_order(self) -> str:
        """File name of the results that order layers, made from everything that they depend on."""
        content = {
            "version": STAGE_VERSIONS["prune"],
            "model": self.context.stage.inputs["model"].identity,
            "windows": [ids_ST.tolist() for ids_ST in self._compared(WINDOWS_OF_ORDER).values()],
            "forward_pass": self.context.params.forward_pass(),
            "every": self._every,
            "kinds": [it.units.kind for it in self.kinds],
        }
        return f"{digest_of(content)[:20]}.json"

    @property
    def _every(self) -> int:
        return 1 if self._of_widths_alone else EVERY

    def _compared(self, windows: int) -> dict[int, Tensor]:
        """Micro-batches on which candidates are compared; of one window each if candidates are many."""
        batches = held_out_batches(self._seen_ST, self.context.params.forward_pass()[1], windows)
        if self._of_widths_alone:
            return batches
        return one_by_one(torch.cat([*batches.values()])[:windows])

    def _whole_without(self, gone: Sequence[int]) -> Candidate:
        return tuple(
            None if layer in gone else tuple(len(it.scores[layer]) for it in self.kinds)
            for layer in range(self.checkpoint.num_layers)
        )

    # Fitted layer by layer.

    def closest(
        self, first: Sequence[str], kept: Callable[[str], Kept], with_fewer_layers: Callable[[str], str | None]
    ) -> str:
        """The shape that is closest once its layers have been fitted one by one.

        Args:
            first: the shapes to compare first; among equally close ones, the first wins.
            kept: returns what the shape with a name keeps; collective.
            with_fewer_layers: returns what else to try if the given shape is the closest; None for nothing.
        """
        best, *rivals = first
        ahead = first if rivals or with_fewer_layers(best) else []
        while ahead:
            for shape in ahead:
                keeps = kept(shape)
                self._finalists[shape] = keeps, self._fitted(shape, keeps)
            candidates = candidates_of([keeps for keeps, _ in self._finalists.values()], self.checkpoint.num_layers)
            self.finalists_kl = dict(zip(self._finalists, self._comparison.kl(candidates), strict=True))
            best = min(self.finalists_kl, key=self.finalists_kl.__getitem__)
            fewer = with_fewer_layers(best)
            ahead = [] if fewer is None or fewer in self.finalists_kl else [fewer]
        return best

    def _fitted(self, shape: str, kept: Kept) -> RefittedLayers:
        """Refit a shape by least squares only: further steps take several times as long, and don't change the order."""
        context, checkpoint = self.context, self.checkpoint
        folder = context.work / f"final-{re.sub('[^a-zA-Z0-9]+', '-', shape)}"
        fitted = RefittedLayers(checkpoint, pruned_kinds(context, checkpoint), whole_mlp=False, folder=folder)
        refit_layers(context, checkpoint, kept, self._seen_ST, fitted, phase="finalists")
        return fitted
