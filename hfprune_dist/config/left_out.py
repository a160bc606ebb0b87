"""Settings added later: fingerprints and records leave them out at the value that keeps the earlier behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class LeftOutAt:
    """Marks a setting that is newer than some results it applies to: ``Annotated[type, LeftOutAt(value)] = value``.

    Attributes:
        value: the value with which a stage does what it did before the setting existed. It is also the setting's
            default, so that older records keep their meaning.
    """

    value: Any


def left_out(section: BaseModel) -> set[str]:
    """Names of a section's settings that currently have the value at which they are left out."""
    return {
        name
        for name, field in type(section).model_fields.items()
        for mark in field.metadata
        if isinstance(mark, LeftOutAt) and getattr(section, name) == mark.value
    }
