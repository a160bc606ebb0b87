"""The plan: the stages that a sweep's table needs, each identified by what its result depends on.

Pure and instant: no torch, no clock, nothing written. Two sweeps that want the same result plan the same stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.store.stage import Stage

# Values of a row's recovery: there is none, or the method's own training takes its place.
NONE, OWN = "none", "own"


@dataclass(frozen=True)
class Cell:
    """One row of the result table: a checkpoint and its evaluation.

    ``label`` is its name within the sweep. ``ratio`` and ``method`` are None for the dense model; ``producers`` are the
    stages that make the checkpoint, in order; ``efficiency`` is None if speed and memory are not measured.
    ``recovery`` is the configuration's method, ``none``, or ``own`` if the row's method prunes while it trains.
    """

    label: str
    model: str
    ratio: float | None
    method: str | None
    criterion: str | None
    recovery: str
    producers: tuple[str, ...]
    evaluate: str
    efficiency: str | None = None

    @property
    def results(self) -> tuple[str, ...]:
        """Ids of the stages whose artifacts make up the row: its checkpoint (except for the dense model) and its
        measurements.
        """
        return *self.producers[-1:], *self._measured

    @property
    def _measured(self) -> tuple[str, ...]:
        return (self.evaluate,) if self.efficiency is None else (self.efficiency, self.evaluate)


@dataclass(frozen=True)
class Plan:
    """All stages in an order in which they can run, and the cells they serve.

    Attributes:
        asked: ids of stages that are wanted for their own sake: passes with further criteria to compare.
    """

    stages: Mapping[str, Stage]
    cells: tuple[Cell, ...]
    asked: tuple[str, ...] = ()
    _opened: dict[Path, Checkpoint] = field(default_factory=dict, init=False, repr=False, compare=False)

    def lacking(self, is_done: Callable[[str], bool]) -> list[str]:
        """Ids of the stages that must run, in order. Stages that only serve existing results may lack their artifacts.

        Args:
            is_done: whether the stage with this id has its artifact.
        """
        results = (stage_id for cell in self.cells for stage_id in cell.results)
        return self.lacking_for([*self.asked, *results], is_done)

    def lacking_for(self, stage_ids: Iterable[str], is_done: Callable[[str], bool]) -> list[str]:
        """Ids of the stages that must run for the artifacts of some stages, in order.

        Args:
            is_done: whether the stage with this id has its artifact.
        """
        wanted, missing = list(stage_ids), set()
        while wanted:
            stage_id = wanted.pop()
            if stage_id not in missing and not is_done(stage_id):
                missing.add(stage_id)
                wanted += self.stages[stage_id].needs
        return [stage_id for stage_id in self.stages if stage_id in missing]

    def upstream(self, cell: Cell) -> list[str]:
        """Ids of all stages whose cost a row carries, in order; the evaluation is the last."""
        evaluate = self.stages[cell.evaluate]
        return [*dict.fromkeys([*cell.producers, *evaluate.needs, *cell.results])]

    def dense_folder(self, stage: Stage) -> Path:
        """The folder of the user's checkpoint that a stage's model is, or was made from."""
        source = stage.inputs["model"]
        return self.dense_folder(self.stages[source.location]) if source.is_stage else Path(source.location)

    def dense_checkpoint(self, stage: Stage) -> Checkpoint:
        """The checkpoint in that folder, opened once for all stages.

        Raises:
            UserError: as ``open_checkpoint`` does.
        """
        folder = self.dense_folder(stage)
        if folder not in self._opened:
            self._opened[folder] = open_checkpoint(folder)
        return self._opened[folder]

    def to_json(self) -> dict[str, Any]:
        stages = [stage.to_json() for stage in self.stages.values()]
        return {"stages": stages, "cells": [asdict(cell) for cell in self.cells], "asked": list(self.asked)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Plan:
        stages = [Stage.from_json(stage) for stage in record["stages"]]
        cells = [Cell(**{**cell, "producers": tuple(cell["producers"])}) for cell in record["cells"]]
        return cls({stage.id: stage for stage in stages}, tuple(cells), tuple(record["asked"]))


def label_of(model: str, ratio: float | None, method: str | None, recovery: str) -> str:
    """The label of a row, with the method if it is given."""
    pruned = f"{model} dense" if ratio is None else f"{model} {ratio:g}" + (f" {method}" if method else "")
    return pruned if recovery in (NONE, OWN) else f"{pruned} + {recovery}"
