"""Settings that were added later: where they do what was done before them, no fingerprint and no record knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class LeftOutAt:
    """Marks a setting that is younger than results which it concerns: ``Annotated[type, LeftOutAt(value)] = value``.

    Attributes:
        value: with it a stage does what it did before there was the setting. It is the setting's default too, so that
            records from before are read as what they were.
    """

    value: Any


def left_out(section: BaseModel) -> set[str]:
    """Names of the settings of a section that are at the values at which they are left out."""
    return {
        name
        for name, field in type(section).model_fields.items()
        for mark in field.metadata
        if isinstance(mark, LeftOutAt) and getattr(section, name) == mark.value
    }
