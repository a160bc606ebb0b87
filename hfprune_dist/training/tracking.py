"""Trackers that show training as it runs (TensorBoard, trackio, Weights & Biases), by the Trainer's own callbacks.

They see what ``loss.jsonl`` records, and don't affect the training. A stage is one run: an attempt that resumes from a
snapshot continues that run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfprune_dist.config.schema import Tracker
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError

if TYPE_CHECKING:  # takes seconds to import, and is imported here only by stages that train
    from transformers import TrainerCallback

_LONGEST = 96


@dataclass(frozen=True)
class TrackedRun:
    """A training as trackers know it.

    Attributes:
        project: the project under which trackers file it, if they have projects.
        title: the row and the kind of stage.
        digits: hexadecimal, unique to this training and shared by all its attempts.
        attempt: number of this attempt, from 1.
        folder: where the files of a sweep's runs go.
    """

    report_to: Sequence[Tracker]
    project: str
    title: str
    digits: str
    attempt: int
    folder: Path

    @property
    def name(self) -> str:
        """``llama-0.2-hfprune-recover-0f1e2d3c``: only characters that file systems and trackers allow."""
        return f"{re.sub('[^A-Za-z0-9._]+', '-', self.title)[:_LONGEST]}-{self.digits[:8]}"


@contextmanager
def open_trackers(run: TrackedRun, first_step: int, world: World) -> Iterator[list[TrainerCallback]]:
    """Yield the callbacks for this rank's Trainer: none except on the first, which reports for all.

    Args:
        first_step: where this attempt resumes. TensorBoard hides what earlier attempts logged of later steps; in
            trackio and W&B such steps appear twice.

    Raises:
        UserError: if a tracker can't be reached.
    """
    openers = {"tensorboard": _open_tensorboard, "trackio": _open_trackio, "wandb": _open_wandb}
    with ExitStack() as closing:
        yield [openers[tracker](run, first_step, closing) for tracker in run.report_to if world.is_first]


def _open_tensorboard(run: TrackedRun, first_step: int, closing: ExitStack) -> TrainerCallback:
    """Each attempt has an event file of its own, in the same folder."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    folder = run.folder / "tensorboard" / run.name
    writer = SummaryWriter(str(folder), purge_step=first_step + 1, filename_suffix=f".attempt-{run.attempt}")
    closing.callback(writer.close)
    return TensorBoardCallback(writer)


def _open_trackio(run: TrackedRun, first_step: int, closing: ExitStack) -> TrainerCallback:
    """The callback resumes a run by its name. Runs lie where ``trackio show`` looks for them."""
    import trackio
    from transformers.integrations import TrackioCallback

    def finish() -> None:
        if trackio.context_vars.current_run.get() is not None:  # if the Trainer hasn't finished it itself
            trackio.finish()

    closing.callback(finish)
    return TrackioCallback()


def _open_wandb(run: TrackedRun, first_step: int, closing: ExitStack) -> TrainerCallback:
    import wandb
    from transformers.integrations import WandbCallback

    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        wandb.init(project=run.project, name=run.name, id=run.digits, resume="allow", dir=run.folder)
    except Exception as error:  # its own, of the network or of its service: all mean that nothing can be tracked
        raise UserError(
            f"runtime.report_to: wandb: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    closing.callback(wandb.finish)
    return WandbCallback()
