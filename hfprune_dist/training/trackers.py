"""Experiment trackers, to which a training reports its losses."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

PROJECT = "hfprune"  # under which trackers file the runs


class Trackers:
    """One run in each of some trackers.

    Args:
        names: of trackers: ``tensorboard``, ``trackio``, ``wandb``.
        folder: for trackers that write files; its name, which is the run's, ends in an id of its own.
    """

    def __init__(self, names: Iterable[str], folder: Path) -> None:
        self._writers: list[Any] = []
        self._runs: list[Any] = []
        for name in names:
            folder.mkdir(parents=True, exist_ok=True)
            if name == "tensorboard":
                self._writers.append(import_module("torch.utils.tensorboard").SummaryWriter(str(folder)))
            else:
                # Without an id, wandb would begin another run after a death.
                os.environ |= {"WANDB_DIR": str(folder), "WANDB_RUN_ID": folder.name.rpartition("-")[2]}
                project = os.environ.get("WANDB_PROJECT", PROJECT)
                self._runs.append(import_module(name).init(project=project, name=folder.name, resume="allow"))

    def report(self, values: Mapping[str, float], step: int) -> None:
        """Tell the values of an optimizer step, counted from 1 over all attempts."""
        told = {f"train/{key}": value for key, value in values.items()}
        for writer in self._writers:
            for key, value in told.items():
                writer.add_scalar(key, value, step)
            writer.flush()  # a rank may be killed at any time
        for run in self._runs:
            run.log(told, step=step)

    def close(self) -> None:
        """End all runs."""
        for writer in self._writers:
            writer.close()
        for run in self._runs:
            run.finish()
