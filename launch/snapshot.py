"""The code of a sweep, copied once, so that jobs that wait in the queue run what was submitted."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune_dist.files import write_json, write_text
from hfprune_dist.identity import FileHashes, digest_of

PACKAGES = ("hfprune_dist", "launch")


def take_snapshot(project: Path, folder: Path, code: Mapping[str, Any]) -> Path:
    """Copy the project's packages to ``<folder>/<digest of their content>``; a snapshot that is there is used again.

    Args:
        code: provenance (commit, digest of what differs from it), kept with the copy.
    """
    draft = folder / f".draft-{uuid.uuid4().hex[:8]}"
    try:
        _copy_packages(project, draft)
        # The copy is what is digested: the originals may be edited at this moment.
        snapshot = folder / _digest(draft)
        if not snapshot.is_dir():
            write_json(draft / "provenance.json", dict(code))
            write_text(draft / "uncommitted.diff", _uncommitted(project))
            _publish(draft, snapshot)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return snapshot


def _copy_packages(project: Path, target: Path) -> None:
    for package in PACKAGES:
        for source in sorted((project / package).rglob("*.py")):
            copy = target / source.relative_to(project)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def _publish(draft: Path, snapshot: Path) -> None:
    try:
        draft.rename(snapshot)
    except OSError:
        if not snapshot.is_dir():  # else another sweep was faster
            raise


def _digest(folder: Path) -> str:
    hashes = FileHashes(None)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return digest_of({str(file.relative_to(folder)): hashes.of_file(file) for file in files})[:16]


def _uncommitted(project: Path) -> str:
    """What differs from the commit, as a patch; empty outside a git repository."""
    try:
        result = subprocess.run(
            ["git", "-C", str(project), "diff", "HEAD"], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError:
        return ""
    return result.stdout
