"""A copy of the code of a sweep, so that jobs that wait in the queue run the code with which they were submitted."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfprune_launch.project import Project

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import fsync_path, write_json
from hfprune_dist.store.hashing import FileHashes, digest_of

_SOMETHING_IS_THERE = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def take_snapshot(
    project: Project, folder: Path, code: Mapping[str, Any], tell: Callable[[str], object] = lambda _: None
) -> Path:
    """Copy the project's packages to ``<folder>/<digest of their content>``, or reuse an intact copy that is there.

    A copy whose content no longer matches its name (emptied by a full disk, purged by a cleaner of old files) is set
    aside, since every job that runs it would fail, which is told.

    Args:
        code: provenance (commit, digest of the uncommitted changes), kept with the copy.
    """
    draft = folder / f".draft-{uuid.uuid4().hex[:8]}"
    try:
        for package, original in project.packages.items():
            for file in _modules(original):
                copy = draft / package / file.relative_to(original)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        # The copy is digested, since the originals may be edited at this moment.
        snapshot = folder / _digest(draft)
        while not _is_intact(snapshot):
            aside = snapshot.with_name(f"damaged-{snapshot.name}-{uuid.uuid4().hex[:8]}")
            with suppress(FileNotFoundError):  # jobs that run in it keep using it
                snapshot.rename(aside)
                tell(f"the code in {snapshot} was damaged: set aside as {aside}, copied again")
            _publish(draft, snapshot, code)
        return snapshot
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _modules(folder: Path) -> list[Path]:
    """Return the Python files below a folder, without the hidden files of editors."""
    return sorted(file for file in folder.rglob("*.py") if file.is_file() and not file.name.startswith("."))


def _digest(folder: Path) -> str:
    """Return a digest of the importable files of a copy, without what running jobs leave there (caches, core dumps)."""
    hashes = FileHashes(None)
    return digest_of({str(file.relative_to(folder)): hashes.of_file(file) for file in _modules(folder)})[:16]


def _is_intact(snapshot: Path) -> bool:
    try:
        return snapshot.is_dir() and _digest(snapshot) == snapshot.name
    except UserError:  # a file that can't be read
        return False


def _publish(draft: Path, snapshot: Path, code: Mapping[str, Any]) -> None:
    """Give a complete copy its name once all of it is on disk, unless another sweep was faster."""
    write_json(draft / "provenance.json", dict(code))
    for path in [*draft.rglob("*"), draft]:
        fsync_path(path)
    try:
        draft.rename(snapshot)
    except OSError as error:
        if error.errno not in _SOMETHING_IS_THERE:
            raise
    fsync_path(snapshot.parent)
