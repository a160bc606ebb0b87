"""Values of which some may not be known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def all_or_none(values: Iterable[T | None]) -> list[T] | None:
    """The values if all of them are known; None if one is missing."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return known if len(known) == len(listed) else None


def sum_or_none(values: Iterable[float | None]) -> float | None:
    """The sum of the values; None if one is missing."""
    known = all_or_none(values)
    return None if known is None else sum(known)
