"""The data behind a report: rows, manifests and attempts at stages, all read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.rows import Row
from hfprune_dist.store.artifacts import Manifest, Store
from hfprune_dist.store.past_attempt import AttemptsOf, PastAttempt


@dataclass(frozen=True)
class Evidence:
    """The state of a sweep at one moment.

    Attributes:
        out: the sweep's folder, which also holds the report.
        written: unix time of the report.
        rows: one per cell of the plan.
        manifests: stage id -> manifest of its artifact; None if there is none.
        attempts: stage id -> attempts, first to last.
        config: the configuration of the last run, as YAML; empty if it is gone.
    """

    out: Path
    written: float
    plan: Plan
    rows: Sequence[Row]
    manifests: Mapping[str, Manifest | None]
    attempts: Mapping[str, Sequence[PastAttempt]]
    config: str

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of the rows."""
        return list(dict.fromkeys(row["model"] for row in self.rows))

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of the rows."""
        return list(dict.fromkeys(row["method"] for row in self.rows if row["method"]))

    def finished(self, *kinds: str) -> list[tuple[Cell, str, Path]]:
        """(a cell, kind, artifact) of each stage of these kinds that has an artifact and that a cell depends on."""
        store, found = Store(self.out / "store"), dict[str, tuple[Cell, str, Path]]()
        for cell in self.plan.cells:
            for stage_id in cell.producers:
                kind = self.plan.stages[stage_id].kind
                if kind in kinds and self.manifests[stage_id]:
                    found.setdefault(stage_id, (cell, kind, store.handle(stage_id).artifact))
        return list(found.values())


def collect(out: Path, plan: Plan, rows: Sequence[Row], attempts_of: AttemptsOf, written: float) -> Evidence:
    """Read the data behind a report.

    Args:
        attempts_of: returns the attempts at a stage, as launchers recorded them.
    """
    store = Store(out / "store")
    try:
        config = (out / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        config = ""
    manifests = {stage_id: store.handle(stage_id).manifest() for stage_id in plan.stages}
    attempts = {stage.id: attempts_of(stage) for stage in plan.stages.values()}
    return Evidence(out, written, plan, rows, manifests, attempts, config)
