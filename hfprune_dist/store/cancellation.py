"""Cancellation of all runs on a store, by a token that launchers watch before they start anything and while it runs."""

from __future__ import annotations

import uuid
from pathlib import Path

from hfprune_dist.store.atomic_files import unless_stale, write_text

CANCELLED = "cancelled"


class Cancellation:
    """Tells whether the runs on a store were cancelled since this object was made.

    A launcher makes it when it starts, so that an earlier cancellation doesn't concern it.
    """

    def __init__(self, root: Path) -> None:
        self._file = root / CANCELLED
        self._earlier = self._token()

    def is_requested(self) -> bool:
        """Whether a cancellation has been requested since.

        Raises:
            OSError: if the store can't be read.
        """
        return self._token() != self._earlier

    def _token(self) -> str:
        try:
            return unless_stale(lambda: self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return ""


def request_cancellation(root: Path) -> None:
    """Ask all launchers that work on a store at present to end what they run, and to start nothing more.

    Raises:
        OSError: if the store can't be written to.
    """
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / CANCELLED, f"{uuid.uuid4().hex}\n")
