"""What rows are made with, apart from the seed: rows are seeds of one another only if all of it is the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hfprune_dist.config.section import as_written
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.store.stage import Input, Stage

SEED = "seed"
# What a pass computes besides the scores that a row's method reads is of other rows; which it reads, the method says.
_OF_OTHER_ROWS = {"criteria", "structures", "curvature"}
# Chosen to suit the GPUs, and without effect on a result beyond rounding.
_OF_THE_MACHINE = {"recovery.micro_batch_size", "distillation.micro_batch_size"}


@dataclass(frozen=True)
class Setting:
    """One thing that a row depends on.

    Attributes:
        value: equal if it makes no difference.
        shown: the value for people: for a file, its path.
    """

    value: object
    shown: str


UNSET = Setting(None, "not set")


@dataclass(frozen=True)
class Recipe:
    """Everything that a row depends on.

    Attributes:
        settings: stage and name of each setting and user's file, in the order in which stages run -> what it is.
        seeds: the seed of each stage that has one.
    """

    settings: Mapping[tuple[str, str], Setting]
    seeds: tuple[object, ...]

    @classmethod
    def of(cls, plan: Plan, cell: Cell) -> Recipe:
        """The recipe of a row: of its checkpoint and of its evaluation. Its speed is measured where a sweep happens to
        run, and isn't part of it.
        """
        stages = _stages(plan, cell)
        settings = {(name, key): it for name, stage in stages.items() for key, it in _settings(stage)}
        records = [stage.params.to_json() for stage in stages.values()]
        return cls(settings, tuple(it[SEED] for it in records if SEED in it))


@dataclass(frozen=True)
class Difference:
    """The first thing in which two recipes differ; ``stage`` and ``name`` say what it is."""

    stage: str
    name: str
    one: str
    other: str


def first_difference(one: Recipe, other: Recipe) -> Difference | None:
    """The first setting or file of the user's that differs between two rows; None if they are seeds of one another."""
    for key in [*one.settings, *(it for it in other.settings if it not in one.settings)]:
        here, there = (it.settings.get(key, UNSET) for it in (one, other))
        if here.value != there.value or (here is UNSET) != (there is UNSET):
            return Difference(*key, here.shown, there.shown)
    return None


def _stages(plan: Plan, cell: Cell) -> dict[str, Stage]:
    """A name for each stage behind a row, unique within the row -> the stage, in the order in which they run."""
    evaluate = plan.stages[cell.evaluate]
    found: dict[str, Stage] = {}
    for stage in (plan.stages[stage_id] for stage_id in cell.producers):
        number = sum(it.kind == stage.kind for it in found.values())
        found[stage.kind if not number else f"{stage.kind} {number + 1}"] = stage
    references = {role: it.location for role, it in evaluate.inputs.items() if it.is_stage and role != "model"}
    found |= {f"held-out {role}": plan.stages[stage_id] for role, stage_id in references.items()}
    return {**found, evaluate.kind: evaluate}


def _settings(stage: Stage) -> Iterator[tuple[str, Setting]]:
    """The settings of a stage and the user's files that it reads, except for what may differ between seeds."""
    record = stage.to_json()
    yield "version of the stage's code", Setting(record["version"], str(record["version"]))
    for role, source in stage.inputs.items():
        if not source.is_stage:  # stages that a row rests on are in its recipe, without their seeds
            yield f"input {role!r}", _of_file(source)
    ignored = {SEED, *_OF_THE_MACHINE, *_of_other_rows(record)}
    for name, value in _flat(record["params"]):
        if name not in ignored:
            yield name, Setting(value, as_written(value))


def _of_other_rows(record: Mapping[str, Any]) -> set[str]:
    kind, params = record["kind"], record["params"]
    if kind == "reference" and "text" not in params:
        return {"micro_batch_size"}  # on calibration windows; that of distillation
    # All criteria of a pass that may end early decide where.
    may_end_early = kind == "importance" and params.get("calibration", {}).get("settled") is not None
    return _OF_OTHER_ROWS if kind == "importance" and not may_end_early else set()


def _of_file(source: Input) -> Setting:
    return Setting(source.identity, f"{source.location} (content {source.identity[:8]})")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Each setting under its name, with those of its section in front."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
