"""The folder ``checkpoints/`` of a sweep: each row's checkpoint under its name, with a card, in a plain folder that can
be copied, sent or uploaded.

A folder is made beside its place and renamed, so it is whole at any moment. Large files are hard links to those in the
store, else copies; small ones, which people edit, are always copies. ``hfprune.json`` names the files that were written
here: all others are the user's, and stay.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from hfprune_dist.planning.plan import NONE, OWN, Cell
from hfprune_dist.store.atomic_files import fsync_path, locked, read_record, write_json, write_text
from hfprune_dist.store.hashing import digest_of

CHECKPOINTS, MADE, LOCK = "checkpoints", "hfprune.json", ".lock"
# In front of the names of folders that aren't in their places yet, and no longer.
NEW, OLD = ".new-", ".old-"
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
class Contents:
    """What a row's folder should hold.

    Attributes:
        checkpoint: id of the stage whose artifact is the checkpoint.
        artifact: its folder in the store.
        files: name of a file in it -> the file.
        texts: name of a further file -> its text.
    """

    checkpoint: str
    artifact: Path
    files: Mapping[str, File]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Made:
    """The file ``hfprune.json``: the stage whose artifact a folder holds, and name -> file of all that was written."""

    checkpoint: str
    files: dict[str, File]


@dataclass(frozen=True)
class Update:
    """Result of an update: name -> path of each folder that has its row's checkpoint, and sentences for the user."""

    folders: Mapping[str, Path]
    remarks: Sequence[str]


def made_checkpoint(folder: Path) -> str | None:
    """Id of the stage whose artifact a named folder holds; None if nothing was written there."""
    made = read_record(Made, folder / MADE)
    return None if made is None else made.checkpoint


def update_checkpoints(out: Path, wanted: Mapping[str, Contents | None]) -> Update:
    """Write the named folders in a sweep's folder, and remove those of rows that are gone.

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
        _finish(root)
        for folder in sorted(root.iterdir()):
            if folder.name not in wanted:
                remarks += _remove(folder)
        for name, contents in wanted.items():
            if contents is not None:
                remarks += _write(root / name, contents)
    known = {name: it.checkpoint for name, it in wanted.items() if it}
    return Update({name: root / name for name, it in known.items() if made_checkpoint(root / name) == it}, remarks)


def _finish(root: Path) -> None:
    """Undo or finish what an update has left that died."""
    for old in root.glob(f"{OLD}*"):
        if (root / old.name.removeprefix(OLD)).exists():
            shutil.rmtree(old)
        else:
            old.rename(root / old.name.removeprefix(OLD))
    for new in root.glob(f"{NEW}*"):
        shutil.rmtree(new)


def _remove(folder: Path) -> list[str]:
    """Remove what was written to a folder; tell what else is in it."""
    made = read_record(Made, folder / MADE)
    if made is None:
        return []
    theirs = _files_of_the_user(folder, made)
    if theirs:
        for name in [*made.files, MADE]:
            if name not in theirs:
                (folder / name).unlink(missing_ok=True)
        return [f"{folder}: its row is gone, but it stays, since it holds files of yours ({theirs[0]})"]
    shutil.rmtree(folder.rename(folder.with_name(NEW + folder.name)))
    return []


def _write(folder: Path, contents: Contents) -> list[str]:
    """Bring a folder up to date; tell which files are left as they are."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return [f"{folder} is in the way of its row's checkpoint, {contents.artifact}"]
    made = read_record(Made, folder / MADE) or Made("", {})
    theirs = _files_of_the_user(folder, made)
    if in_the_way := [name for name in theirs if name in contents.files]:
        return [f"{folder} holds files of yours ({in_the_way[0]}) in the way of its row's checkpoint"]
    texts = {name: text.encode() for name, text in contents.texts.items() if name not in theirs}
    written = {name: File(len(text), sha256(text).hexdigest()) for name, text in texts.items()}
    wanted = Made(contents.checkpoint, {**contents.files, **written})
    if made != wanted or not all((folder / name).exists() for name in wanted.files):
        _replace(folder, contents, wanted, theirs)
    return [f"{folder / name}: left as it is, since it was edited" for name in theirs if name in contents.texts]


def _files_of_the_user(folder: Path, made: Made) -> list[str]:
    """Files in a folder that weren't written here, or were changed since."""
    files = sorted(str(it.relative_to(folder)) for it in folder.rglob("*") if it.is_symlink() or not it.is_dir())
    return [it for it in files if it != MADE and not (it in made.files and made.files[it].is_at(folder / it))]


def _replace(folder: Path, contents: Contents, made: Made, theirs: Iterable[str]) -> None:
    """Put a new folder in a folder's place, with the user's files."""
    new, old = folder.with_name(NEW + folder.name), folder.with_name(OLD + folder.name)
    for name in (*made.files, *theirs):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        if name in theirs:
            _link(folder / name, new / name)
        elif name in contents.texts:
            write_text(new / name, contents.texts[name])
        else:
            _link((contents.artifact / name).resolve(), new / name)
    write_json(new / MADE, asdict(made))
    for path in (*new.rglob("*"), new):
        if not path.is_symlink():
            fsync_path(path)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Link a large file, or copy a file."""
    if not source.is_symlink() and source.stat().st_size > SMALL:
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copyfile(source, target, follow_symlinks=False)
