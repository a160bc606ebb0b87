"""What a store needs of its file system, checked before any work starts."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from hfprune_dist.errors import UserError

FULL_DISK_BYTES = 64 * 1024


def require_usable(root: Path) -> None:
    """Create a folder and check that it can be written to and has hard links, with which stages are claimed.

    Raises:
        UserError: if not; the message names the folder and the reason.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=root) as probe:
            (Path(probe) / "file").touch()
            try:
                os.link(Path(probe) / "file", Path(probe) / "link")
            except OSError as error:
                raise UserError(
                    f"{root}: no hard links on this file system ({error.strerror or error}), so stages can't be "
                    "claimed there; choose another --out"
                ) from None
    except OSError as error:
        raise UserError(f"{root}: can't be written to ({error.strerror or error}); choose another --out") from None


def unwritable(root: Path) -> str:
    """Say that the disk of a folder is full, or can only be read; empty if neither."""
    if os.statvfs(root).f_flag & os.ST_RDONLY:
        return f"{root}: Read-only file system; have it mounted for writing and run the sweep again"
    if (free := shutil.disk_usage(root).free) <= FULL_DISK_BYTES:
        return f"{root}: No space left on device ({free:,} bytes); make room and run the sweep again"
    return ""


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
