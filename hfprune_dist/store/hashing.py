"""Hashes that identify content, whatever its name and place: sha256 of files, folders and values."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import read_object, write_json

# Read at once. ``after_each`` is called in between: a slow disk must not keep other ranks waiting for minutes.
CHUNK_BYTES = 16 * 1024 * 1024
# A file that changed less than this before it was read may change again without looking any different.
STABLE_NS = 2_000_000_000

AfterEach = Callable[[], None]
"""Called after each piece of work, so that others know that it goes on."""


def digest_of(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def nothing() -> None:
    """The ``AfterEach`` of work that nobody waits for."""


class FileHashes:
    """sha256 of files, remembered by path, size, times of change and inode, so that a re-run reads none of them.

    Args:
        cache: folder with one small JSON file per file hashed before; None recalls nothing. Nothing is written to it
            before ``save``.
    """

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        self._fresh: dict[str, dict[str, Any]] = {}
        self._stable: set[str] = set()

    def of_file(self, file: Path, after_each: AfterEach = nothing) -> str:
        """sha256 of a file's content.

        Args:
            after_each: called after each piece of the file that is read.

        Raises:
            UserError: where the file can't be read.
        """
        try:
            key = _key_of(file)
            return self._recall(key) or self._compute(file, key, after_each)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None

    def of_files(self, folder: Path, names: Iterable[str], after_each: AfterEach = nothing) -> str:
        """One digest for the named files of a folder, names included."""
        return digest_of({name: self.of_file(folder / name, after_each) for name in names})

    def of_folder(self, folder: Path, after_each: AfterEach = nothing) -> str:
        """One digest for all files below a folder, as ``files_below`` lists them."""
        return self.of_files(folder, files_below(folder), after_each)

    def save(self) -> None:
        """Write what was hashed since the last call to the cache folder, but for files that had only just changed."""
        if self._cache is not None and self._stable:
            self._cache.mkdir(parents=True, exist_ok=True)
            for name in self._stable:
                write_json(self._cache / name, self._fresh.pop(name))
            self._stable.clear()

    def _compute(self, file: Path, key: list[Any], after_each: AfterEach) -> str:
        read_at_ns = time.time_ns()
        sha256 = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                sha256.update(chunk)
                after_each()
        name, digest = _entry_name(key), sha256.hexdigest()
        self._fresh[name] = {"key": key, "sha256": digest}
        changed_at_ns = key[-1]
        (self._stable.add if changed_at_ns < read_at_ns - STABLE_NS else self._stable.discard)(name)
        return digest

    def _recall(self, key: list[Any]) -> str | None:
        name = _entry_name(key)
        entry = self._fresh.get(name)
        if entry is None and self._cache is not None:
            entry = read_object(self._cache / name)
        return str(entry["sha256"]) if entry and entry.get("key") == key and "sha256" in entry else None


def files_below(folder: Path) -> list[str]:
    """Names of the files below a folder, relative to it; hidden ones and Python's ``__pycache__`` are left out.

    Links to files and folders are followed.

    Raises:
        UserError: where there is no such folder, or part of it can't be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    try:
        return sorted(str(file.relative_to(folder)) for file in _walk(folder) if file.is_file())
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None


def _walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """What lies in a folder and, in turn, in its folders; ``above`` are those that it lies in, links resolved."""
    here = folder.resolve()
    if here in above:  # a link back to where it lies
        return
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _walk(path, above | {here})
        else:
            yield path


def _key_of(file: Path) -> list[Any]:
    """What a file looks like from outside; the time of its last change (of content or attributes) comes last."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]


def _entry_name(key: list[Any]) -> str:
    return f"{digest_of(key[0])[:32]}.json"
