"""How the settings of stages are recorded: as JSON, without the places of texts and what has the value left out.

Fingerprints are computed from ``Parameters.to_json``. Two rules keep those of existing results unchanged: names and
values of settings stay; a new setting is marked with ``LeftOutAt`` the value with which a stage does what it did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator

from hfprune_dist.config.left_out import left_out
from hfprune_dist.config.section import Dtype, Section, TextSource
from hfprune_dist.config.texts import CalibrationConfig

# Fields of a text source that describe a data set on the hub.
OF_A_DATA_SET = {"dataset", "name", "split", "revision"}
# Stands for the path of a text in settings read from a record, since records have no paths.
AN_INPUT = "(an input of the stage)"


class Parameters(Section):
    """The settings that a stage's result depends on, besides its inputs and the version of its code.

    Two are equal if their records are: the path of a text makes no difference.

    ``on_one_rank``: whether such stages always run on a single rank, however many ranks others have.
    """

    on_one_rank: ClassVar[bool] = False

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._text() == other._text()

    def __hash__(self) -> int:
        return hash(self._text())

    def _text(self) -> str:
        return canonical_text(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The content of records, from which fingerprints are computed."""
        return _record_of(self)

    @property
    def compute_dtype(self) -> Dtype | None:
        """The dtype in which a model computes; None if no model runs."""
        return None


class OtherParameters(Parameters):
    """The settings of a stage planned by another version of the code, as recorded. No stage runs with them.

    ``record``: the settings by name.
    """

    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dict(self.record)


def _as_input(settings: object) -> object:
    """Add a placeholder path to recorded settings of a text that name no data set: the text is a user's file."""
    if isinstance(settings, Mapping) and isinstance(settings.get("mixture"), list):
        return {**settings, "mixture": [_placed(text, f"{AN_INPUT} {n}") for n, text in enumerate(settings["mixture"])]}
    return _placed(settings, AN_INPUT)


def _placed(settings: object, place: str) -> object:
    if isinstance(settings, Mapping) and "dataset" not in settings:
        return {**settings, "path": place}
    return settings


# Marks settings of a text. A file's path and name don't matter: it is an input of the stage, identified by its content.
Text = BeforeValidator(_as_input)


def canonical_text(record: Mapping[str, Any]) -> str:
    """A record as text, which differs wherever fingerprints do: they tell 1 from 1.0, and an absent setting from one at
    its default.
    """
    return json.dumps(record, sort_keys=True, default=dict)


def _record_of(section: BaseModel) -> dict[str, Any]:
    without = left_out(section) | (_without_place(section) if isinstance(section, TextSource) else set())
    values = {name: getattr(section, name) for name in type(section).model_fields if name not in without}
    return {name: _recorded(value) for name, value in values.items()}


def _recorded(value: object) -> object:
    if isinstance(value, list):
        return [_recorded(part) for part in value]
    return _record_of(value) if isinstance(value, BaseModel) else value


def _without_place(source: TextSource) -> set[str]:
    """Fields that records leave out: a path, for a file what describes a data set, for a mixture those of one text."""
    if isinstance(source, CalibrationConfig) and source.mixture is not None:
        return set(TextSource.model_fields)
    return {"path"} if source.path is None else {"path", *OF_A_DATA_SET}
