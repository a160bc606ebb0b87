"""The user's files that a stage reads: they must stay as they were when the sweep was planned."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.data.formats import files_of, identity_of
from hfprune_dist.errors import UserError
from hfprune_dist.planning.task_files import outside_files
from hfprune_dist.store.hashing import FileHashes, digest_of, files_below
from hfprune_dist.store.stage import Input

# Size, modification time and inode: they reveal, without reading a file, that it was written or replaced.
Traits = tuple[int, int, int]


class ChangedInputError(UserError):
    """A file is not the one that the sweep was planned with, so results may come from either version."""


def content_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the files that identify a local checkpoint."""
    return checkpoint.weight_files + checkpoint.companion_files


def own_tasks(include_path: str | None, hashes: FileHashes) -> dict[str, Input]:
    """The user's lm-eval tasks as inputs of an evaluation: their folder and, if there are any, the files elsewhere.

    Raises:
        UserError: if there is no such folder, or a file can't be read.
    """
    if include_path is None:
        return {}
    folder = Path(include_path)
    inputs = {"tasks": Input(hashes.of_folder(folder), str(folder), content="folder")}
    elsewhere = outside_files(folder)
    if elsewhere:
        inputs["files of tasks"] = Input(_identity_of(elsewhere, hashes), str(folder), content="files of tasks")
    return inputs


def _identity_of(files: Iterable[Path], hashes: FileHashes) -> str:
    """The identity of files wherever they are; the order of their paths tells files of one name apart."""
    return digest_of([[file.name, hashes.of_file(file)] for file in files])


class UserFiles:
    """The files of the user's that a stage reads, from its start to its commit.

    Args:
        inputs: of the stage; artifacts among them are ignored.
        make_hashes: makes the cache of hashes of files that any process of the store has read before.
    """

    def __init__(self, inputs: Iterable[Input], make_hashes: Callable[[], FileHashes]) -> None:
        self._inputs = [source for source in inputs if source.content]
        self._make_hashes = make_hashes
        self._at_start: dict[Path, Traits] | None = None

    def require_planned(self) -> None:
        """Check that all files have the content that was planned; for a commit of the hub, that the files are there.


        Raises:
            ChangedInputError: naming what has changed.
            UserError: naming what is gone or can't be read.
        """
        self._at_start = self._traits()
        self._require_content("since the sweep was planned")

    def require_untouched(self) -> None:
        """Check that nobody has written or replaced a file since ``require_planned``, if that was called.

        Files are read only if a change could have left size, modification time and inode as they were.

        Raises:
            ChangedInputError: naming what has changed.
            UserError: naming what is gone or can't be read.
        """
        if self._at_start is None:
            return
        now = self._traits()
        touched = sorted(file for file in self._at_start | now if self._at_start.get(file) != now.get(file))
        if touched:
            raise ChangedInputError(f"{touched[0]}: written or replaced while a stage read it; run the sweep again")
        self._require_content("while a stage read it")

    def _require_content(self, when: str) -> None:
        hashes = self._make_hashes()
        for source in self._inputs:
            if _identity_now(source, hashes) != source.identity:
                raise ChangedInputError(f"{_changed_part(source)}: changed {when}; run the sweep again")
        with contextlib.suppress(OSError):  # then files are read again the next time
            hashes.save()

    def _traits(self) -> dict[Path, Traits]:
        return {file: _traits_of(file) for source in self._inputs for file in _files(source)}


def _identity_now(source: Input, hashes: FileHashes) -> str:
    location = Path(source.location)
    if source.content == "commit":
        open_checkpoint(location)
        return source.identity
    if source.content == "text":
        return identity_of(location, hashes)
    if source.content == "files of tasks":
        return _identity_of(outside_files(location), hashes)
    return hashes.of_files(location, _names(source))


def _names(source: Input) -> list[str]:
    """Names of the files in a folder that matter, relative to it."""
    location = Path(source.location)
    return files_below(location) if source.content == "folder" else content_files(open_checkpoint(location))


def _files(source: Input) -> list[Path]:
    """All files that could change."""
    location = Path(source.location)
    if source.content == "text":
        return files_of(location)
    if source.content == "files of tasks":
        return outside_files(location)
    return [] if source.content == "commit" else [location / name for name in _names(source)]


def _changed_part(source: Input) -> str:
    """How to name an input that has changed; of several files, the one that changed last is the best guess."""
    newest = max(_files(source), key=_changed_at, default=Path(source.location))
    if newest == Path(source.location) or source.content == "files of tasks":
        return str(newest)
    return f"{source.location} (most recently {newest.name})"


def _changed_at(file: Path) -> int:
    """Unix time in ns of a file's last change; now, if it was removed after it had been listed."""
    try:
        return file.stat().st_ctime_ns
    except FileNotFoundError:
        return time.time_ns()


def _traits_of(file: Path) -> Traits:
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
