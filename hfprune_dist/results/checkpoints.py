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
from dataclasses import asdict, dataclass
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


def checkpoint_names(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Name -> its row. Dense models without recovery have no name, since they are the user's own checkpoints.

    A name, such as ``llama-0.2-hfprune-lora``, has the characters that file systems and the hub allow. Rows whose names
    would be the same, differ only in case, or are too long get 6 hex digits that depend only on the row.
    """
    named = [cell for cell in cells if cell.producers]
    plain = [_plain_name(cell) for cell in named]
    taken = Counter(name.casefold() for name in plain)
    unique = (
        name if taken[name.casefold()] == 1 and len(name) <= LONGEST_NAME else _with_digits(name, cell)
        for name, cell in zip(plain, named, strict=True)
    )
    return dict(zip(unique, named, strict=True))


def _plain_name(cell: Cell) -> str:
    ratio = "dense" if cell.ratio is None else f"{cell.ratio:g}"
    recovery = None if cell.recovery in (NONE, OWN) else cell.recovery
    name = "-".join(part for part in (cell.model, ratio, cell.method, recovery) if part)
    name = re.sub(r"[^A-Za-z0-9._]+", "-", name)
    return re.sub(r"-*(?:\.{2,}-*)+|-{2,}", "-", name).strip("-.")


def _with_digits(name: str, cell: Cell) -> str:
    digits = digest_of([cell.model, cell.ratio, cell.method, cell.recovery])[:6]
    return f"{name[: LONGEST_NAME - 7].rstrip('-.')}-{digits}"


@dataclass(frozen=True)
class File:
    """A file as it was, or will be, written.

    Attributes:
        mtime_ns: time at which an artifact's file was made: one that was damaged and made again is another one.
    """

    bytes: int
    sha256: str
    mtime_ns: int = 0

    def is_at(self, path: Path) -> bool:
        """Whether the file is there and unchanged."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size != self.bytes:
            return False
        if self.bytes > SMALL:
            return True
        with path.open("rb") as stream:
            return file_digest(stream, "sha256").hexdigest() == self.sha256


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


def written_folders(out: Path) -> dict[str, Folder]:
    """The named folders in a sweep's folder, as they were last written."""
    found = read_record(_Written, out / CHECKPOINTS / WRITTEN)
    return {} if found is None else found.folders


def update_checkpoints(out: Path, wanted: Mapping[str, Contents | None]) -> Update:
    """Write the named folders in a sweep's folder, and remove those of rows that are gone.

    A reader finds each folder whole, or without its config.json.

    Args:
        wanted: name of each row's folder -> its contents; None: as it is, since the row has no checkpoint (yet).

    Raises:
        OSError: if something can't be read or written.
    """
    root, remarks = out / CHECKPOINTS, list[str]()
    if not wanted and not root.is_dir():
        return Update({}, [])
    root.mkdir(exist_ok=True)
    with locked(root / LOCK):
        written = written_folders(out)
        for name in [it for it in written if it not in wanted]:
            remarks += _remove(root / name, written)
        for name, contents in wanted.items():
            if contents is not None:
                remarks += _write(root / name, contents, written)
    made = {name: contents.checkpoint for name, contents in wanted.items() if contents}
    return Update({name: root / name for name, it in written.items() if made.get(name) == it.checkpoint}, remarks)


def _remove(folder: Path, written: dict[str, Folder]) -> list[str]:
    """Remove what was written to a folder; tell what else is in it."""
    _unlink(folder, [file for file, it in written[folder.name].files.items() if it.is_at(folder / file)])
    for path in sorted([folder, *folder.rglob("*")], reverse=True):
        with suppress(OSError):  # a file, or a folder that holds the user's files
            path.rmdir()
    _note(folder.parent, written, folder.name, None)
    theirs = sorted(str(it.relative_to(folder)) for it in folder.rglob("*") if not it.is_dir())
    return [f"{folder}: its row is gone, but it stays, since it holds files of yours ({theirs[0]})"] if theirs else []


def _write(folder: Path, contents: Contents, written: dict[str, Folder]) -> list[str]:
    """Bring a folder up to date; tell which files are left as they are."""
    old, new = written.get(folder.name, Folder("", {})), contents.folder
    if folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()):
        return [f"{folder} is in the way of its row's checkpoint, {contents.artifact}"]
    for draft in folder.rglob(f"{DRAFT}*"):
        draft.unlink()
    ours = {file for file, it in old.files.items() if it.is_at(folder / file)}
    theirs = [file for file in new.files if file not in ours and os.path.lexists(folder / file)]
    if old.checkpoint != new.checkpoint and (in_the_way := [file for file in theirs if file in contents.files]):
        return [f"{folder} holds files of yours ({in_the_way[0]}) in the way of its row's checkpoint"]
    current = {file for file in ours if old.files[file] == new.files.get(file)}
    todo = new.files.keys() - current - {*theirs}
    if todo - contents.texts.keys():
        todo |= {CONFIG} & current  # which comes last
    _unlink(folder, (ours - new.files.keys()) | (ours & todo))
    _note(folder.parent, written, folder.name, Folder(new.checkpoint, {it: new.files[it] for it in {*todo, *current}}))
    for file in sorted(todo, key=lambda file: file == CONFIG):
        _put(folder / file, contents.texts.get(file, contents.artifact / file))
    return [f"{folder / file}: left as it is, since it was edited" for file in theirs]


def _unlink(folder: Path, files: Sequence[str] | set[str]) -> None:
    for file in sorted(files, key=lambda file: file != CONFIG):
        (folder / file).unlink()


def _note(root: Path, written: dict[str, Folder], name: str, folder: Folder | None) -> None:
    """Record what a folder holds, before that is written; None: nothing of ours any more."""
    before = dict(written)
    written.pop(name, None)
    written |= {} if folder is None else {name: folder}
    if written != before:
        write_json(root / WRITTEN, {"folders": {name: asdict(it) for name, it in written.items()}})


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
