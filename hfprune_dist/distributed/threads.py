"""The number of CPU threads that a rank may use."""

from __future__ import annotations

import re
from collections.abc import Mapping


def threads_allowed(environment: Mapping[str, str]) -> int | None:
    """Return the first number in ``OMP_NUM_THREADS``; None if there is none, or if it is 0."""
    found = re.match(r"\s*(\d+)", environment.get("OMP_NUM_THREADS", ""))
    return (int(found[1]) or None) if found else None
