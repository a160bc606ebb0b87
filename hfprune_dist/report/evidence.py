"""The data behind a report: rows, manifests and attempts at stages, all read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.rows import Row
from hfprune_dist.store.artifacts import Manifest, Store
from hfprune_dist.store.attempt import Attempt, AttemptsOf
from hfprune_dist.store.stage import Stage


@dataclass(frozen=True)
class Evidence:
    """The state of a sweep at one moment.

    Attributes:
        out: the sweep's folder, which also holds the report.
        written: unix time of the report.
        manifests: stage id -> manifest of its artifact; None if there is none.
        attempts: stage id -> attempts, first to last.
        config: the configuration of the last run, as YAML; empty if it is gone.
    """

    out: Path
    written: float
    plan: Plan
    store: Store
    rows: Sequence[Row]
    manifests: Mapping[str, Manifest | None]
    attempts: Mapping[str, Sequence[Attempt]]
    config: str

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of the rows."""
        return list(dict.fromkeys(row["model"] for row in self.rows))

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of the rows."""
        return list(dict.fromkeys(row["method"] for row in self.rows if row["method"]))

    @property
    def ratios(self) -> list[float]:
        """Requested ratios of the pruned rows, ascending."""
        return sorted({row["ratio"] for row in self.rows if row["method"]})

    @cached_property
    def _cells(self) -> Mapping[str, list[Cell]]:
        behind: dict[str, list[Cell]] = {}
        for cell in self.plan.cells:
            for stage_id in self.plan.upstream(cell):
                behind.setdefault(stage_id, []).append(cell)
        return behind

    def cells_of(self, stage_id: str) -> list[Cell]:
        """The cells that depend on a stage."""
        return self._cells.get(stage_id, [])

    def finished(self, *kinds: str) -> list[Stage]:
        """Stages of these kinds that have an artifact and that a cell depends on, in plan order."""
        stages = [stage for stage in self.plan.stages.values() if stage.kind in kinds]
        return [stage for stage in stages if self.manifests[stage.id] and self.cells_of(stage.id)]


def collect(out: Path, plan: Plan, rows: Sequence[Row], attempts_of: AttemptsOf, written: float) -> Evidence:
    """Read the data behind a report.

    Args:
        out: folder of the sweep, with its store.
        rows: one per cell of the plan.
        attempts_of: returns the attempts at a stage, as launchers recorded them.
        written: unix time of the report.
    """
    store = Store(out / "store")
    try:
        config = (out / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        config = ""
    manifests = {stage_id: store.handle(stage_id).manifest() for stage_id in plan.stages}
    attempts = {stage.id: attempts_of(stage) for stage in plan.stages.values()}
    return Evidence(out, written, plan, store, rows, manifests, attempts, config)
