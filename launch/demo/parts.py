"""Parts of a folder that are whole or absent even if a build is killed: draft, rename, then list in the manifest."""

from __future__ import annotations

import fcntl
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfprune_dist.store.atomic_files import fsync_path, read_object, write_json

MANIFEST = "assets.json"
DRAFT_PREFIX = ".draft-"


class Parts:
    """A folder of named parts (folders or files) and its manifest; a part that the manifest doesn't list isn't there.

    Args:
        root: the folder; made if missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let only one build at a time work here, and remove the drafts that a killed one left."""
        with (self.root / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for draft in self.root.glob(f"{DRAFT_PREFIX}*"):
                _remove(draft)
            yield

    def is_whole(self, name: str, made_from: Mapping[str, str]) -> bool:
        """Return whether a part was made from these sources and its files still have their original sizes."""
        entry = self._entries().get(name)
        if not isinstance(entry, dict):
            return False
        return entry.get("made_from") == made_from and entry.get("files") == _sizes(self.root / name)

    def draft(self, name: str) -> Path:
        """Return the path at which to make a part."""
        return self.root / f"{DRAFT_PREFIX}{name}"

    def commit(self, name: str, made_from: Mapping[str, str], details: Mapping[str, Any]) -> None:
        """Put a part's draft in place of an older version and list it."""
        draft, target = self.draft(name), self.root / name
        for path in [*draft.rglob("*"), draft]:
            fsync_path(path)
        entries = self._entries()
        if entries.pop(name, None) is not None:
            self._write(entries)
        _remove(target)
        draft.rename(target)
        fsync_path(self.root)
        entry = {"made_from": dict(made_from), "files": _sizes(target), **details}
        self._write({**entries, name: entry})

    def _entries(self) -> dict[str, Any]:
        """The manifest's entries by name; none if it is damaged."""
        parts = (read_object(self.root / MANIFEST) or {}).get("parts")
        return dict(parts) if isinstance(parts, dict) else {}

    def _write(self, entries: Mapping[str, Any]) -> None:
        write_json(self.root / MANIFEST, {"parts": entries})


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package; ``python`` is the interpreter."""
    return {name: platform.python_version() if name == "python" else _installed(name) for name in packages}


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _sizes(part: Path) -> dict[str, int]:
    """Return the bytes of each file of a part, without compiled Python, which lm-eval leaves behind."""
    files = [part] if part.is_file() else sorted(file for file in part.rglob("*") if file.is_file())
    return {str(file.relative_to(part.parent)): file.stat().st_size for file in files if file.suffix != ".pyc"}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
