"""Trackers that show a training while it runs: TensorBoard, trackio, Weights & Biases, by the Trainer's own callbacks.

They see what ``loss.jsonl`` records; nothing of what is trained depends on them. A stage is one run: an attempt that
goes on from a snapshot goes on in that run.
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
        project: what trackers that have projects file it under.
        title: what it is called: row and kind of stage.
        digits: hexadecimal, of this training alone; all its attempts have them.
        attempt: 1 for the first.
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
        """``llama-0.2-hfprune-recover-0f1e2d3c``: of characters that file systems and trackers allow."""
        return f"{re.sub('[^A-Za-z0-9._]+', '-', self.title)[:_LONGEST]}-{self.digits[:8]}"


@contextmanager
def open_trackers(run: TrackedRun, first_step: int, world: World) -> Iterator[list[TrainerCallback]]:
    """Callbacks for the Trainer of this rank: none but on the first, which reports for all.

    Args:
        first_step: where this attempt goes on; what earlier ones have told of later steps is void.

    Raises:
        UserError: where a tracker can't be reached.
    """
    openers = {"tensorboard": _open_tensorboard, "trackio": _open_trackio, "wandb": _open_wandb}
    with ExitStack() as closing:
        yield [openers[tracker](run, first_step, closing) for tracker in run.report_to if world.is_first]


def _open_tensorboard(run: TrackedRun, first_step: int, closing: ExitStack) -> TrainerCallback:
    """The attempt has an event file of its own, in one folder with the others'."""
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
        if trackio.context_vars.current_run.get() is not None:  # not ended by the Trainer's own end
            trackio.finish()

    closing.callback(finish)
    return TrackioCallback()


def _open_wandb(run: TrackedRun, first_step: int, closing: ExitStack) -> TrainerCallback:
    import wandb
    from transformers.integrations import WandbCallback

    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        wandb.init(project=run.project, name=run.name, id=run.digits, resume="allow", dir=run.folder)
    except Exception as error:
        raise UserError(
            f"runtime.report_to: wandb: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    closing.callback(wandb.finish)
    return WandbCallback()
