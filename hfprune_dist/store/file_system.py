"""What a store needs of its file system, checked before any work starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import uuid
from pathlib import Path

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import listed

PROBE = ".probe-"
# A probe exists for moments only; one that is older than this was left by a process that died.
LEFT_BEHIND_S = 3600
FULL_DISK_BYTES = 64 * 1024


def require_usable(root: Path) -> None:
    """Create a folder and check that it can be written to and has hard links, with which stages are claimed.

    Raises:
        UserError: if not; the message names the folder and the reason.
    """
    probe = root / f"{PROBE}{uuid.uuid4().hex[:8]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        try:
            _require_hard_links(probe)
            _remove_older(probe)
        finally:
            probe.unlink()
    except OSError as error:
        raise UserError(f"{root}: can't be written to ({error.strerror or error}); choose another --out") from None


def full_disk(root: Path) -> str:
    """Say that the disk of a folder is full; empty if it is not."""
    free = shutil.disk_usage(root).free
    if free > FULL_DISK_BYTES:
        return ""
    return f"{root}: No space left on device ({free:,} bytes); make room and run the sweep again"


def require_own(*folders: Path) -> None:
    """Check that not everybody can write to folders whose content decides what jobs run.

    Raises:
        UserError: if everybody can.
    """
    for folder in folders:
        if folder.is_dir() and folder.stat().st_mode & stat.S_IWOTH:
            raise UserError(
                f"{folder}: everybody can write to it, and so decide what your jobs run; chmod o-w {folder}, and give "
                "those who share it a group (umask 002, chmod g+s)"
            )


def _require_hard_links(probe: Path) -> None:
    twin = probe.with_name(f"{probe.name}-twin")
    try:
        os.link(probe, twin)
    except OSError as error:
        raise UserError(
            f"{probe.parent}: no hard links on this file system ({error.strerror or error}), so stages can't be "
            "claimed there; choose another --out"
        ) from None
    twin.unlink()


def _remove_older(probe: Path) -> None:
    """Remove probes that dead processes left behind, by the clock of the file system."""
    now = probe.stat().st_mtime
    for other in listed(probe.parent, f"{PROBE}*"):
        with contextlib.suppress(OSError):  # another process is removing it, or another user left it
            if now - other.stat().st_mtime > LEFT_BEHIND_S:
                other.unlink()
