"""The logs of ranks, which may be of any length, and which their owner may remove at any moment."""

from __future__ import annotations

import os
from pathlib import Path

from hfprune_dist.store.atomic_files import unless_stale


def end_of_log(log: Path, most: int) -> str:
    """Return the end of a log, without what comes before its last ``most`` bytes; empty if there is no log (any more).

    Its first line may be cut off.
    """
    try:
        return unless_stale(lambda: _last_bytes(log, most)).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _last_bytes(file: Path, most: int) -> bytes:
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - most))
        return stream.read()
