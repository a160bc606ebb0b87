"""What a thing is, whatever it is called and wherever it lies: sha256 of files, folders and values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.files import write_json


def digest_of(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class FileHashes:
    """sha256 of files, remembered by path, size, modification time and inode, so that a re-run reads none of them.

    Args:
        cache: folder that keeps one small JSON file per hashed file; None remembers nothing.
    """

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache

    def of_file(self, file: Path) -> str:
        """sha256 of a file's content.

        Raises:
            UserError: where the file can't be read.
        """
        try:
            stat = file.stat()
            key = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
            known = self._recall(key)
            if known is None:
                with file.open("rb") as stream:
                    known = hashlib.file_digest(stream, "sha256").hexdigest()
                self._remember(key, known)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None
        return known

    def of_files(self, folder: Path, names: Iterable[str]) -> str:
        """One digest for the named files of a folder, names included."""
        return digest_of({name: self.of_file(folder / name) for name in names})

    def of_folder(self, folder: Path) -> str:
        """One digest for all files below a folder, hidden and compiled ones left out."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        return self.of_files(folder, sorted(name for name in names if "__pycache__" not in name and name[0] != "."))

    def _entry(self, key: list[Any]) -> Path | None:
        return self._cache / f"{digest_of(key[0])[:32]}.json" if self._cache else None

    def _recall(self, key: list[Any]) -> str | None:
        entry = self._entry(key)
        if entry is None or not entry.is_file():
            return None
        try:
            remembered = json.loads(entry.read_text(encoding="utf-8"))
            return str(remembered["sha256"]) if remembered["key"] == key else None
        except (ValueError, KeyError):
            return None

    def _remember(self, key: list[Any], sha256: str) -> None:
        entry = self._entry(key)
        if entry is not None:
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_json(entry, {"key": key, "sha256": sha256})
