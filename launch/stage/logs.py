"""The logs of ranks, which may be of any length, and which their owner may remove at any moment."""

from __future__ import annotations

import os
from pathlib import Path

from hfprune_dist.store.atomic_files import unless_stale


def end_of_log(log: Path, most: int) -> str:
    """Return the last ``most`` bytes of a log, whose first line may be cut off; empty if there is no log (any more)."""

    def read() -> bytes:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - most))
            return stream.read()

    try:
        return unless_stale(read).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
