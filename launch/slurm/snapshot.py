"""A copy of the code of a sweep, so that jobs that wait in the queue run the code with which they were submitted."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from hfprune_launch.project import Project

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import publish
from hfprune_dist.store.hashing import FileHashes, digest_of


def take_snapshot(project: Project, folder: Path) -> Path:
    """Copy the project's packages to ``<folder>/<digest of their content>-<random>``, or reuse an intact copy.

    A copy whose content no longer matches its name (cut off by a full disk, purged by a cleaner) is left to its jobs.
    """
    draft = folder / f".draft-{uuid.uuid4().hex[:8]}"
    try:
        for package, original in project.packages.items():
            for file in _modules(original):
                copy = draft / package / file.relative_to(original)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        digest = _digest(draft)  # of the copy, since the originals may be edited at this moment
        for existing in sorted(folder.glob(f"{digest}-*")):
            if _is_intact(existing, digest):
                return existing
        snapshot = folder / f"{digest}{draft.name.removeprefix('.draft')}"
        publish(draft, snapshot)
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


def _is_intact(snapshot: Path, digest: str) -> bool:
    try:
        return _digest(snapshot) == digest
    except UserError:  # a file that can't be read
        return False
