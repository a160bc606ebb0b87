"""What a thing is, whatever it is called and wherever it lies: sha256 of files, folders and values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.files import read_json, write_json


def digest_of(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class FileHashes:
    """sha256 of files, remembered by path, size, modification time and inode, so that a re-run reads none of them.

    Args:
        cache: folder with one small JSON file per file hashed before; None recalls nothing. Nothing is written to it
            before ``save``.
    """

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        self._fresh: dict[str, dict[str, Any]] = {}

    def of_file(self, file: Path) -> str:
        """sha256 of a file's content.

        Raises:
            UserError: where the file can't be read.
        """
        try:
            stat = file.stat()
            key = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
            return self._recall(key) or self._compute(file, key)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None

    def of_files(self, folder: Path, names: Iterable[str]) -> str:
        """One digest for the named files of a folder, names included."""
        return digest_of({name: self.of_file(folder / name) for name in names})

    def of_folder(self, folder: Path) -> str:
        """One digest for all files below a folder, hidden and compiled ones left out."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
        visible = [str(name) for name in names if not any(part[0] in "._" for part in name.parts)]
        return self.of_files(folder, visible)

    def save(self) -> None:
        """Write what was hashed since the last call to the cache folder."""
        if self._cache is not None and self._fresh:
            self._cache.mkdir(parents=True, exist_ok=True)
            for name, entry in self._fresh.items():
                write_json(self._cache / name, entry)
            self._fresh.clear()

    def _compute(self, file: Path, key: list[Any]) -> str:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        self._fresh[self._entry_name(key)] = {"key": key, "sha256": sha256}
        return sha256

    def _recall(self, key: list[Any]) -> str | None:
        name = self._entry_name(key)
        entry = self._fresh.get(name)
        if entry is None and self._cache is not None:
            try:
                entry = read_json(self._cache / name)
            except (ValueError, OSError):
                entry = None
        return str(entry["sha256"]) if entry and entry["key"] == key else None

    def _entry_name(self, key: list[Any]) -> str:
        return f"{digest_of(key[0])[:32]}.json"
