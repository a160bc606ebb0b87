"""The subject of a model card: a row's checkpoint, how it was made and how it was measured, from plan and manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hfprune_dist.config.texts import FIRST, OTHER_TEXTS, reference_role
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.base_model import BaseModel
from hfprune_dist.results.markdown import code, escaped
from hfprune_dist.results.measured_as import measured_as
from hfprune_dist.results.rows import DenseModel
from hfprune_dist.store.artifacts import Manifest, Store
from hfprune_dist.store.stage import CUTTING, RECOVERING, Input, Stage


@dataclass(frozen=True)
class Subject:
    """A row's checkpoint.

    Attributes:
        name: name of its folder.
        manifest: manifest of the artifact that is the checkpoint.
        manifests: stage id -> manifest, for all finished stages behind the row, including its evaluation.
        dense_scores: metrics of the dense model's evaluation, if it was measured in the same way; empty otherwise.
    """

    name: str
    cell: Cell
    plan: Plan
    dense: DenseModel
    manifest: Manifest
    manifests: Mapping[str, Manifest]
    dense_scores: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, cell: Cell, plan: Plan, store: Store, dense: DenseModel) -> Subject | None:
        """The checkpoint of a row; None if there is none (yet)."""
        found = {stage_id: store.handle(stage_id).manifest() for stage_id in plan.upstream(cell)}
        manifests = {stage_id: manifest for stage_id, manifest in found.items() if manifest is not None}
        checkpoint = cell.producers[-1]
        if checkpoint not in manifests or not store.handle(checkpoint).is_committed():
            return None
        return cls(name, cell, plan, dense, manifests[checkpoint], manifests, _dense_scores(cell, plan, store))

    @property
    def stages(self) -> list[Stage]:
        """All stages behind the row, in order."""
        return [self.plan.stages[stage_id] for stage_id in self.plan.upstream(self.cell)]

    @property
    def evaluation(self) -> Stage:
        return self.plan.stages[self.cell.evaluate]

    @cached_property
    def base(self) -> BaseModel:
        """The dense model that the checkpoint comes from."""
        return BaseModel.of(self.cell.model, self.evaluation.inputs["dense"])

    @property
    def scores(self) -> Mapping[str, Any]:
        """Metrics of its evaluation; empty if it has not been evaluated (yet)."""
        found = self.manifests.get(self.cell.evaluate)
        return {} if found is None else found["metrics"]

    @property
    def files(self) -> list[str]:
        """Names of its files, relative to its folder."""
        return sorted(self.manifest["files"])

    @property
    def shape(self) -> Mapping[str, Any]:
        """Metrics of the last cut: ratio reached, parameters and sizes; empty if its manifest is gone."""
        cuts = [self.manifests[it.id] for it in self.stages if it.kind in CUTTING and it.id in self.manifests]
        return cuts[-1]["metrics"] if cuts else {}

    @property
    def trained_on(self) -> Stage | None:
        """The stage of the row's recovery; None without recovery."""
        last = self.plan.stages[self.cell.producers[-1]]
        return last if last.kind in RECOVERING else None

    def held_out_texts(self) -> Iterator[tuple[str, Stage, Mapping[str, Any]]]:
        """(name, reference stage, metrics of the comparison) of each text on which it is compared; one has no name."""
        compared = {FIRST: self.scores.get("fidelity", {}), **self.scores.get(OTHER_TEXTS, {})}
        for name, metrics in compared.items():
            source = self.evaluation.inputs.get(reference_role(name))
            if source is not None and metrics:
                yield name, self.plan.stages[source.location], metrics


def _dense_scores(cell: Cell, plan: Plan, store: Store) -> Mapping[str, Any]:
    scale = measured_as(plan.stages[cell.evaluate])
    for other in plan.cells:
        if other.model == cell.model and not other.producers and measured_as(plan.stages[other.evaluate]) == scale:
            found = store.handle(other.evaluate).manifest()
            return {} if found is None else dict(found["metrics"])
    return {}


def text_of(settings: Mapping[str, Any], source: Input | None) -> str:
    """Describe a text for people, in Markdown: a data set on the hub, or the name of a file.

    Args:
        settings: settings of the text, as a stage records them.
        source: the stage's input, if the text is a file.
    """
    if source is not None:
        return f"the file {code(Path(source.location).name)} (sha256 `{source.identity[:12]}`)"
    parts = [settings.get("dataset"), settings.get("name"), settings.get("split")]
    revision = f" at {escaped(settings['revision'])}" if settings.get("revision") else ""
    return code("/".join(str(part) for part in parts if part)) + revision
