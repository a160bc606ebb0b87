"""Measurements of shapes in a prune stage: with a cheap refit or none, on calibration windows that no refit sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.drop_order import drop_order
from hfprune_dist.refit.candidates import CheapFits, Scored
from hfprune_dist.refit.measurement import Candidate, Hidden, Measurement, held_out_batches, one_by_one
from hfprune_dist.stages.prune_refit import Context, after_each_layer, outputs_of_dense, stream_of
from hfprune_dist.store.atomic_files import read_object, write_json
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.stage import STAGE_VERSIONS
from hfprune_dist.structures import NEURONS

# Windows for comparing candidates and for ordering layers, from those that refits hold out to choose their ridge.
# Ordering needs fewer, since layers differ a lot, and takes the most candidates.
WINDOWS, WINDOWS_OF_ORDER = 8, 2
# Candidates with several structures are many, so they are compared on every second token; widths on every token.
EVERY = 2


@dataclass(frozen=True)
class CheapMeasurements:
    """The measurements of a prune stage's candidates, and all that these have in common.

    Attributes:
        kinds: the units that may go with their scores, in the order of a choice's numbers.
        windows_ST: the windows of all ranks that refits and measurements see.
    """

    context: Context
    checkpoint: Checkpoint
    kinds: Sequence[Scored]
    windows_ST: Tensor
    _outputs_once: list[Hidden] = field(default_factory=list, init=False)

    def measurement(self, phase: str, *, refit: bool, measurements: int, windows: int = WINDOWS) -> Measurement:
        """Return a measurement of candidates.

        Args:
            phase: its name in progress reports.
            measurements: how many times it will be called.
            windows: the most windows that candidates are compared on.
        """
        context, checkpoint = self.context, self.checkpoint

        def variants() -> CheapFits:
            stream = stream_of(context, checkpoint, self.windows_ST) if refit else None
            return CheapFits(self.kinds, stream, context.world)

        return Measurement(
            checkpoint,
            variants,
            self._compared(windows),
            reference=self._outputs,
            dtype=getattr(torch, context.params.forward_pass()[0]),
            world=context.world,
            every=self._every,
            after_each=after_each_layer(context, phase, measurements * checkpoint.num_layers),
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
        context, windows = self.context, self._compared(WINDOWS_OF_ORDER)
        content = {
            "version": STAGE_VERSIONS["prune"],
            "model": context.stage.inputs["model"].identity,
            "windows": [ids_ST.tolist() for ids_ST in windows.values()],
            "forward_pass": context.params.forward_pass(),
            "every": self._every,
            "kinds": [it.units.kind for it in self.kinds],
        }
        return f"{digest_of(content)[:20]}.json"

    @property
    def _of_widths_alone(self) -> bool:
        return self.context.params.structures == [NEURONS]

    @property
    def _every(self) -> int:
        return 1 if self._of_widths_alone else EVERY

    def _compared(self, windows: int) -> dict[int, Tensor]:
        """Micro-batches on which candidates are compared; of one window each if candidates are many."""
        batches = held_out_batches(self.windows_ST, self.context.params.forward_pass()[1], windows)
        if self._of_widths_alone:
            return batches
        return one_by_one(torch.cat([*batches.values()])[:windows])

    def _outputs(self) -> Hidden:
        """The dense model's outputs; one pass through its layers, which is collective, serves all measurements."""
        if not self._outputs_once:
            self._outputs_once.append(outputs_of_dense(self.context, self.checkpoint, self._compared(WINDOWS)))
        return self._outputs_once[0]

    def _whole_without(self, gone: Sequence[int]) -> Candidate:
        return tuple(
            None if layer in gone else tuple(len(it.scores[layer]) for it in self.kinds)
            for layer in range(self.checkpoint.num_layers)
        )
