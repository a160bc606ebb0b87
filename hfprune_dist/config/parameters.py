"""The kinds of stages, and what is recorded of their settings.

Each kind describes itself in ``hfprune_dist/kinds``: its settings, from what a plan makes them, and the memory that it
needs; ``hfprune_dist/stages/<kind>.py`` is what it does. The store keeps settings in records
(``stage.json``, manifests, ``sweep.json``), so this table, and the class that they have in common, are defined below
both.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

from hfprune_dist.config.section import DATA_SET_KEYS, Section, TextSource
from hfprune_dist.config.texts import CalibrationConfig


@dataclass(frozen=True)
class StageKind:
    """A kind of stage, as far as it must be known without its settings.

    Attributes:
        settings: module and name of the class of its settings, in ``hfprune_dist/kinds``.
        version: raise it when a change to the code changes results: artifacts of the old version are not reused.
        reproducible: whether a stage has the same bits each time, also on GPUs.
        on_one_rank: whether stages run on a single rank, however many ranks others have.
        cuts: whether the artifact is a model with parts of the input model removed.
        trains: whether it trains.
        libraries: packages besides ``LIBRARIES`` whose releases results depend on.
    """

    settings: str
    version: int
    reproducible: bool = False
    on_one_rank: bool = False
    cuts: bool = False
    trains: bool = False
    libraries: tuple[str, ...] = ()


# Packages whose releases the results of every kind depend on.
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "deepspeed")
KINDS = {
    "importance": StageKind("importance.ImportanceParameters", 15, reproducible=True),
    "reference": StageKind("reference.ReferenceParameters", 4, reproducible=True),
    "answers": StageKind("answers.AnswersParameters", 4),
    "prune": StageKind("prune.PruneParameters", 12, reproducible=True, cuts=True),
    "recover": StageKind("training.RecoverParameters", 10, trains=True, libraries=("peft",)),
    "evaluate": StageKind("evaluate.EvaluateParameters", 7, libraries=("lm-eval",)),
    "efficiency": StageKind("efficiency.EfficiencyParameters", 3, on_one_rank=True),
    "check": StageKind("check.CheckParameters", 3, on_one_rank=True),
    "loraprune": StageKind("training.LoraPruneParameters", 7, cuts=True, trains=True, libraries=("peft",)),
}


class Parameters(Section):
    """The settings that a stage's result depends on, besides its inputs and the version of its code."""

    def to_json(self) -> dict[str, Any]:
        """The content of records, from which fingerprints are computed: all settings, but not where files are, nor what
        was ``ADDED`` to a section and left as it was before.
        """
        return _settings_of(self)


class UnreadParameters(Parameters):
    """Settings that another version of the code recorded."""

    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.settings


def parameters_of(kind: str) -> type[Parameters]:
    """The class of a kind's settings; a KeyError if there is no such kind."""
    module, name = KINDS[kind].settings.split(".")
    return cast("type[Parameters]", getattr(importlib.import_module(f"hfprune_dist.kinds.{module}"), name))


def _recorded(value: object, file: str = "(file)") -> Any:
    """A setting as JSON. A text's file is an input of the stage, known by its content: ``file`` stands for its path."""
    if isinstance(value, list):
        return [_recorded(part, f"(file {number})") for number, part in enumerate(value, 1)]
    if not isinstance(value, Section):
        return value
    record = _settings_of(value)
    if isinstance(value, CalibrationConfig) and value.mixture is not None:  # whose texts have these settings
        return {name: value for name, value in record.items() if name not in TextSource.model_fields}
    if isinstance(value, TextSource) and value.path is not None:
        of_hub = ("dataset", *DATA_SET_KEYS)
        return {name: value for name, value in record.items() if name not in of_hub} | {"path": file}
    return record


def _settings_of(section: Section) -> dict[str, Any]:
    values = {name: getattr(section, name) for name in type(section).model_fields}
    as_before = {name for name, value in section.ADDED.items() if values[name] == value}
    return {name: _recorded(value) for name, value in values.items() if name not in as_before}
