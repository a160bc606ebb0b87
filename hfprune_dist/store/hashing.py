"""Hashes that identify content regardless of its name and place: sha256 of files, folders and values."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import read_object, unless_stale, write_json
from hfprune_dist.store.machine import usable_cores

# A file changed less than this long before it was read could change again without its times showing it.
STABLE_NS = 2_000_000_000

# Files of at least this size are hashed in parallel: file systems of clusters read faster than one thread hashes.
LARGE_BYTES = 64 * 1024 * 1024

T = TypeVar("T")


def digest_of(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class FileHashes:
    """sha256 of files, remembered by path, size, times of change and inode, so that a re-run doesn't read them again:
    in the folder ``cache``, one small JSON file for each, written by ``save``; None recalls nothing of earlier runs.
    """

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        self._fresh: dict[str, dict[str, Any]] = {}  # by name of the entry, those that are not in the cache

    def of_file(self, file: Path) -> str:
        """sha256 of a file's content; UserError if it can't be read."""
        try:
            return unless_stale(lambda: self._digest(file))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None

    def of_files(self, folder: Path, names: Iterable[str]) -> str:
        """One digest for the named files of a folder, names included."""
        digests = for_each_file((folder / name for name in names), self.of_file)
        return digest_of({str(file.relative_to(folder)): digest for file, digest in digests.items()})

    def of_folder(self, folder: Path) -> str:
        """One digest for all files below a folder, as ``files_below`` lists them."""
        return self.of_files(folder, files_below(folder))

    def save(self) -> None:
        """Write the hashes computed since the last call to the cache, except those of files that had just changed."""
        stable = [name for name, entry in self._fresh.items() if entry["stable"]]
        if self._cache is not None and stable:
            self._cache.mkdir(parents=True, exist_ok=True)
            for name in stable:
                write_json(self._cache / name, self._fresh.pop(name))

    def _digest(self, file: Path) -> str:
        stat = file.stat()
        key = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]
        name = f"{digest_of(key[0])[:32]}.json"
        entry = self._fresh.get(name)
        if entry is None and self._cache is not None:
            entry = read_object(self._cache / name)
        if entry is None or entry.get("key") != key or "sha256" not in entry:
            stable = stat.st_ctime_ns < time.time_ns() - STABLE_NS
            entry = self._fresh[name] = {"key": key, "sha256": _sha256_of(file), "stable": stable}
        return str(entry["sha256"])


def _sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def for_each_file(files: Iterable[Path], work: Callable[[Path], T]) -> dict[Path, T]:
    """Return the result of ``work`` for each file, or raise its error; large files are processed in parallel."""
    files, pool = list(files), ThreadPoolExecutor(usable_cores())
    try:
        large = {file: pool.submit(work, file) for file in files if _is_large(file)}
        return {file: large[file].result() if file in large else work(file) for file in files}
    finally:
        pool.shutdown(cancel_futures=True)


def _is_large(file: Path) -> bool:
    try:
        return file.stat().st_size >= LARGE_BYTES
    except OSError:  # told by the work on it
        return False


def files_below(folder: Path) -> list[str]:
    """Names of the files below a folder, relative to it, without hidden ones and ``__pycache__``; links are followed.
    Raises UserError if there is no such folder, or part of it can't be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    try:
        return unless_stale(lambda: sorted(str(file.relative_to(folder)) for file in _walk(folder) if file.is_file()))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None


def _walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield all files below a folder; ``above`` are the folders that contain it, with links resolved."""
    here = folder.resolve()
    if here in above:  # a link back to a folder above it
        return
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _walk(path, above | {here})
        else:
            yield path
