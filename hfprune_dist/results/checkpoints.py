"""The folder ``checkpoints/`` of a sweep: each row's checkpoint under its name, with a card, in a plain folder that can
be copied, sent or uploaded.

Large files are hard links to those in the store, else copies; small ones, which people edit, are always copies. Only
files that were written here are ever changed or removed: ``.written`` names them.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from hfprune_dist.planning.plan import NONE, OWN, Cell
from hfprune_dist.store.atomic_files import locked, publish, read_record, write_json
from hfprune_dist.store.hashing import digest_of

CHECKPOINTS = "checkpoints"
LOCK, WRITTEN, DRAFT = ".lock", ".written", ".hfprune-draft-"
# Without it nothing loads a folder: it is removed before the other files are changed, and written after them.
CONFIG = "config.json"
# Files up to this size are copied and compared by content, larger ones linked and compared by size.
SMALL = 2**20

LONGEST_NAME = 96  # the hub's limit for names of repositories
_DIGITS = 6
_KNOWN = re.compile(r"[A-Za-z0-9]")


def checkpoint_names(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Name -> its row. Dense models without recovery have no name, since they are the user's own checkpoints.

    A name resembles the row's label, e.g. ``llama-0.2-lora``, in characters that file systems and the hub allow. It
    includes the method if rows have several. Rows whose names would be the same, or differ only in case, get 6 hex
    digits that depend only on the row; so do those with names that are too long or keep nothing of the model's name.
    """
    named = [cell for cell in cells if cell.producers]
    several = len({cell.method for cell in named} - {None}) > 1
    names = [_plain_name(cell, several) for cell in named]
    taken = Counter(name.casefold() for name in names)
    unique = (
        name
        if taken[name.casefold()] == 1 and len(name) <= LONGEST_NAME and _KNOWN.search(cell.model)
        else _with_digits(name, cell)
        for name, cell in zip(names, named, strict=True)
    )
    return dict(zip(unique, named, strict=True))


def _plain_name(cell: Cell, with_method: bool) -> str:
    ratio = "dense" if cell.ratio is None else f"{cell.ratio:g}"
    method = cell.method if with_method else None
    recovery = None if cell.recovery in (NONE, OWN) else cell.recovery
    model = cell.model if _KNOWN.search(cell.model) else "model"
    name = "-".join(part for part in (model, ratio, method, recovery) if part)
    name = re.sub(r"[^A-Za-z0-9._]+", "-", name)
    return re.sub(r"-*(?:\.{2,}-*)+|-{2,}", "-", name).strip("-.")


def _with_digits(name: str, cell: Cell) -> str:
    digits = digest_of([cell.model, cell.ratio, cell.method, cell.recovery])[:_DIGITS]
    return f"{name[: LONGEST_NAME - _DIGITS - 1].rstrip('-.')}-{digits}"


@dataclass(frozen=True)
class File:
    """A file as it was, or will be, written.

    Attributes:
        mtime_ns: time at which an artifact's file was made: one that was damaged and made again is another one.
    """

    bytes: int
    sha256: str
    mtime_ns: int = 0


@dataclass(frozen=True)
class Folder:
    """A folder as it was, or will be, written.

    Attributes:
        checkpoint: id of the stage whose artifact is the checkpoint.
        files: name of a file, relative to the folder -> the file.
    """

    checkpoint: str
    files: dict[str, File]


@dataclass(frozen=True)
class _Written:
    """Content of ``.written``: name of a folder -> the folder."""

    folders: dict[str, Folder]


@dataclass(frozen=True)
class Contents:
    """What a row's folder should hold.

    Attributes:
        checkpoint: as in ``Folder``.
        artifact: its folder in the store.
        files: name of a file in it -> the file.
        texts: name of a further file -> its text.
    """

    checkpoint: str
    artifact: Path
    files: Mapping[str, File]
    texts: Mapping[str, str]

    @property
    def folder(self) -> Folder:
        texts = {name: text.encode() for name, text in self.texts.items()}
        written = {name: File(len(text), sha256(text).hexdigest()) for name, text in texts.items()}
        return Folder(self.checkpoint, {**self.files, **written})


@dataclass(frozen=True)
class Update:
    """Result of an update: name -> path of each folder that has its row's checkpoint, and sentences for the user."""

    folders: Mapping[str, Path]
    remarks: Sequence[str]


def written_folders(out: Path) -> Mapping[str, Folder]:
    """The named folders in a sweep's folder, as they were last written."""
    found = read_record(_Written, out / CHECKPOINTS / WRITTEN)
    return {} if found is None else found.folders


def update_checkpoints(out: Path, wanted: Mapping[str, Contents | None]) -> Update:
    """Write the named folders in a sweep's folder, and remove those of rows that are gone.

    A folder whose row has another name now is renamed. A reader finds each folder whole, or without its config.json.

    Args:
        wanted: name of each row's folder -> its contents; None: as it is, since the row has no checkpoint (yet).

    Raises:
        OSError: if something can't be read or written.
    """
    root = out / CHECKPOINTS
    if not wanted and not root.is_dir():
        return Update({}, [])
    root.mkdir(exist_ok=True)
    with locked(root / LOCK):
        update = _Updating(root, dict(written_folders(out)))
        update.run(wanted)
    folders = {name: root / name for name, it in wanted.items() if it and update.has(name, it)}
    return Update(folders, update.remarks)


class _Updating:
    """One update of all named folders below ``root``."""

    def __init__(self, root: Path, written: dict[str, Folder]) -> None:
        self._root = root
        self._written = written
        self.remarks: list[str] = []

    def run(self, wanted: Mapping[str, Contents | None]) -> None:
        for name, contents in wanted.items():
            if contents is not None and not os.path.lexists(self._root / name):
                self._rename(name, contents, wanted)
        for name in [it for it in self._written if it not in wanted]:
            self._remove(name)
        for name, contents in wanted.items():
            if contents is not None:
                self._write(name, contents)

    def has(self, name: str, contents: Contents) -> bool:
        return name in self._written and self._written[name].checkpoint == contents.checkpoint

    def _rename(self, name: str, contents: Contents, wanted: Mapping[str, Contents | None]) -> None:
        """Rename a row's folder, with the user's files in it, as when rows of a second method change names."""
        for earlier in [it for it in self._written if it not in wanted and self.has(it, contents)]:
            if (self._root / earlier).is_dir():
                self._note({**self._written, name: self._written[earlier]})  # first, so that its files stay known
                (self._root / earlier).rename(self._root / name)
                self._note({other: it for other, it in self._written.items() if other != earlier})
                self.remarks.append(f"{self._root / earlier} is called {name} now")
                return

    def _remove(self, name: str) -> None:
        folder = self._root / name
        ours = [file for file, it in self._written[name].files.items() if _is_as_written(folder / file, it)]
        for file in sorted(ours, key=lambda file: file != CONFIG):
            (folder / file).unlink()
        for path in sorted(folder.rglob("*"), reverse=True):
            with suppress(OSError):  # one that holds the user's files
                path.rmdir()
        with suppress(OSError):
            folder.rmdir()
        if theirs := sorted(str(it.relative_to(folder)) for it in folder.rglob("*") if not it.is_dir()):
            self.remarks.append(f"{folder}: its row is gone, but it stays, since it holds files of yours ({theirs[0]})")
        self._note({other: it for other, it in self._written.items() if other != name})

    def _write(self, name: str, contents: Contents) -> None:
        folder, new = self._root / name, contents.folder
        if folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()):
            self.remarks.append(f"{folder} is in the way of its row's checkpoint, {contents.artifact}")
            return
        for draft in folder.rglob(f"{DRAFT}*"):
            draft.unlink()
        old = self._written.get(name, Folder("", {}))
        current = {
            file
            for file, it in new.files.items()
            if old.files.get(file, it) == it and _is_as_written(folder / file, it, thorough=file not in old.files)
        }
        ours = {file for file, it in old.files.items() if _is_as_written(folder / file, it)} | current
        theirs = [file for file in new.files if file not in ours and os.path.lexists(folder / file)]
        if in_the_way := [file for file in theirs if file in contents.files and not self.has(name, contents)]:
            what = f"holds files of yours ({in_the_way[0]}) in the way of its row's checkpoint"
            self.remarks.append(f"{folder} {what}, {contents.artifact}")
            return
        self.remarks += [f"{folder / file}: left as it is, since it was edited" for file in theirs]
        todo = {file for file in new.files if file not in current and file not in theirs}
        if todo - contents.texts.keys() and CONFIG in current:
            todo.add(CONFIG)
        gone = ours - new.files.keys()
        for file in sorted(todo | gone, key=lambda file: file != CONFIG):
            (folder / file).unlink(missing_ok=True)
        written = Folder(contents.checkpoint, {file: it for file, it in new.files.items() if file not in theirs})
        if written != old:
            self._note({**self._written, name: written})
        for file in sorted(todo, key=lambda file: file == CONFIG):
            _put(folder / file, contents.texts.get(file, contents.artifact / file))

    def _note(self, written: dict[str, Folder]) -> None:
        self._written = written
        folders = {
            name: {"checkpoint": it.checkpoint, "files": {file: vars(found) for file, found in it.files.items()}}
            for name, it in written.items()
        }
        write_json(self._root / WRITTEN, {"folders": folders})


def _is_as_written(path: Path, file: File, *, thorough: bool = False) -> bool:
    """Whether a file is there and unchanged; a large one is only read if that is to be ``thorough``."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file.bytes:
            return False
        if file.bytes > SMALL and not thorough:
            return True
        with path.open("rb") as stream:
            return file_digest(stream, "sha256").hexdigest() == file.sha256
    except FileNotFoundError:  # its user removes it at this moment
        return False


def _put(target: Path, source: Path | str) -> None:
    """Write a text, or link or copy a file, so that nobody finds a part of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{DRAFT}{uuid.uuid4().hex[:8]}")
    if isinstance(source, str):
        draft.write_text(source, encoding="utf-8")
    else:
        if source.stat().st_size > SMALL:
            with suppress(OSError):  # another file system, or one without links
                os.link(source.resolve(), target)
                return
        shutil.copyfile(source, draft)
    publish(draft, target)
