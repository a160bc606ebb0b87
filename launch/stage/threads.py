"""How many CPU threads a rank may use."""

from __future__ import annotations

import os
import re


def threads_allowed() -> int | None:
    """``OMP_NUM_THREADS``, of which the first number counts here; None where it says nothing."""
    found = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))
    return (int(found[1]) or None) if found else None
