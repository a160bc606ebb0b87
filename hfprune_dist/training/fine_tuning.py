"""A fine-tuning task: what to train, on which rows, and for how many steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.schema import Sharding, Tracker
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.data.schedule import RowReader, Schedule
from hfprune_dist.errors import UserError
from hfprune_dist.structures.kept import Shape
from hfprune_dist.training.snapshots import Snapshot


@dataclass(frozen=True)
class FineTuning:
    """What to train, on which rows, and how far.

    Attributes:
        section: the part of the configuration that the settings come from, for progress and messages.
        rows: reads a row by its number.
        distills: whether rows come with a dense model's final hidden states, and the loss is the divergence from it.
        schedule: which rows each step sees.
        total_steps: optimizer steps of the whole training, including those before ``start``.
        warmup_steps: the first of these steps, in which the learning rate rises from 0.
        save_every_steps: optimizer steps between snapshots; the last step always leaves one.
        timeout_minutes: limit for a collective; one that takes longer ends the stage.
        run_folder: where trackers that write files put them; its name is that of the run.
        report_to: trackers that are told of each step.
        sharding: where frozen weights lie (``runtime.sharding``).
        masked_to: the units that are to be left at the end, in all layers (LoRAPrune); None for all.
        start: the snapshot to resume from; None to start anew.
    """

    checkpoint: Checkpoint
    section: str
    settings: LoraTraining
    seed: int
    rows: RowReader
    distills: bool
    schedule: Schedule
    total_steps: int
    warmup_steps: int
    save_every_steps: int
    timeout_minutes: int
    run_folder: Path
    report_to: Sequence[Tracker] = ()
    sharding: Sharding = "auto"
    masked_to: Shape | None = None
    start: Snapshot | None = None

    @property
    def first_step(self) -> int:
        return 0 if self.start is None else self.start.step


def learning_rate_share(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate in step ``step``, counted from 0: linear warm-up, then a cosine to zero."""
    if step < warmup_steps:
        return step / warmup_steps
    decay = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, decay)))


def finite_values(logs: Mapping[str, float], step: int, section: str) -> dict[str, float]:
    """Loss, learning rate and gradient norm of a step.

    Raises:
        UserError: if one of them is not finite.
    """
    values = {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs}
    for key, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{section}: {key} is {value} at step {step}; lower {section}.learning_rate, or raise "
                f"{section}.warmup_steps; at step 1, check the checkpoint's weights"
            )
    return values
