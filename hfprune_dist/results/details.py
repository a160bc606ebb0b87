"""An evaluation's own results, next to its manifest, as far as rows rely on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hfprune_dist.store.atomic_files import as_record, read_object


@dataclass(frozen=True)
class _Counts:
    effective: Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True)
class _OfTask:
    samples: Annotated[dict[str, _Counts], Field(alias="n-samples", default_factory=dict)]


@dataclass(frozen=True)
class _Details:
    tasks: dict[str, _OfTask] = field(default_factory=dict)


def read_details(artifact: Path) -> Mapping[str, Any]:
    """The content of ``results.json``; empty if it is missing or damaged, since scores stand without it."""
    found = read_object(artifact / "results.json")
    return {} if found is None or as_record(_Details, found) is None else found
