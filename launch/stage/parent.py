"""Processes that end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when the process that started it dies, for whatever reason."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
