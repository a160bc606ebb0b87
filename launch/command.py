"""How every command begins and ends: an error that the user can fix is one message, and Ctrl-C shows no traceback.

This holds from the start, as this module imports next to nothing, and commands import what they need inside ``run``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from hfprune_dist.errors import UserError, explained


def run(body: Callable[[], int], when_interrupted: str = "interrupted") -> int:
    """Run a command; returns its exit code.

    Args:
        when_interrupted: what is said where the user interrupts it.
    """
    _require_streams()
    try:
        with explained():
            _require_current_folder()
            return body()
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        return 130


def _require_streams() -> None:
    """Give a command that was started without output (``>&-``) somewhere to write."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Open until the process ends.
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def folder(argument: str) -> Path:
    """The type of arguments that name a folder.

    Raises:
        UserError: for an empty one, as of a shell variable that isn't set: it would mean the current folder.
    """
    if not argument:
        raise UserError("an argument that names a folder is empty; give a folder (. for the current one)")
    return Path(argument)


def _require_current_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; change to another one") from None
