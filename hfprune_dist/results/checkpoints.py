"""The folder ``checkpoints/`` of a sweep: each row's checkpoint under its name, with a card, in a plain folder that can
be copied, sent or uploaded.

A folder is made beside its place and renamed, so what is there is whole. Files are copies of those in the store, which
share their bytes on file systems that can (Btrfs, XFS): a program that saves into such a folder, even in place, changes
nothing in the store. ``hfprune.json`` names the files that were written here. A folder in which the user has added or
changed a file stays as it is.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from hfprune_dist.planning.plan import NONE, OWN, Cell
from hfprune_dist.store.atomic_files import fsync_path, read_record, write_json, write_text
from hfprune_dist.store.claims import locked
from hfprune_dist.store.hashing import digest_of

CHECKPOINTS, MADE, LOCK = "checkpoints", "hfprune.json", ".lock"
# In front of the names of folders that aren't in their places yet, and no longer.
NEW, OLD = ".new-", ".old-"
# Files up to this size are compared by content, larger ones by size and time of change.
SMALL = 2**20
FICLONE = 0x40049409  # Linux's request to share a file's bytes with another file, until one of them changes
LONGEST_NAME = 96  # the hub's limit for names of repositories


def checkpoint_names(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Name -> its row. Dense models without recovery have no name, since they are the user's own checkpoints.

    A name, such as ``llama-0.2-hfprune-lora``, has the characters that file systems and the hub allow. Rows whose names
    would be the same, differ only in case, or are too long get 6 hex digits that depend only on the row.
    """
    named = [(cell, _plain_name(cell)) for cell in cells if cell.producers]
    taken = Counter(name.casefold() for _, name in named)
    names = {}
    for cell, name in named:
        if taken[name.casefold()] > 1 or len(name) > LONGEST_NAME:
            digits = digest_of([cell.model, cell.ratio, cell.method, cell.recovery])[:6]
            name = f"{name[: LONGEST_NAME - 7].rstrip('-.')}-{digits}"
        names[name] = cell
    return names


def _plain_name(cell: Cell) -> str:
    ratio = "dense" if cell.ratio is None else f"{cell.ratio:g}"
    recovery = None if cell.recovery in (NONE, OWN) else cell.recovery
    name = "-".join(part for part in (cell.model, ratio, cell.method, recovery) if part)
    name = re.sub(r"[^A-Za-z0-9._]+", "-", name)
    return re.sub(r"-*(?:\.{2,}-*)+|-{2,}", "-", name).strip("-.")


@dataclass(frozen=True)
class File:
    """A file as it was, or will be, written; ``mtime_ns`` is when an artifact's was made, as it may be made again."""

    bytes: int
    sha256: str
    mtime_ns: int = 0

    def is_at(self, path: Path) -> bool:
        """Whether the file is there and unchanged."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size != self.bytes:
            return False
        if self.bytes > SMALL and path.stat().st_mtime_ns == self.mtime_ns:
            return True
        with path.open("rb") as stream:
            return file_digest(stream, "sha256").hexdigest() == self.sha256


@dataclass(frozen=True)
class Contents:
    """What a row's folder should hold: files of the artifact of the stage ``checkpoint``, and texts, by name."""

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
    """Write the named folders in a sweep's folder with the contents that are wanted, and remove those of rows that are
    gone. A folder without contents stays as it is: its row has no checkpoint (yet).
    """
    root, remarks = out / CHECKPOINTS, list[str]()
    if not wanted and not root.is_dir():
        return Update({}, [])
    root.mkdir(exist_ok=True)
    with locked(root / LOCK):
        for left in (*root.glob(f"{NEW}*"), *root.glob(f"{OLD}*")):  # by an update that died
            shutil.rmtree(left)
        for name in sorted({folder.name for folder in root.iterdir()} - wanted.keys()):
            remarks += _remove(root / name)
        for name, contents in wanted.items():
            if contents is not None:
                remarks += _write(root / name, contents)
    made = [
        name for name, contents in wanted.items() if contents and made_checkpoint(root / name) == contents.checkpoint
    ]
    return Update({name: root / name for name in made}, remarks)


def _remove(folder: Path) -> list[str]:
    """Remove a folder that was written here; tell if that holds files of the user."""
    made = read_record(Made, folder / MADE)
    theirs = made and _file_of_the_user(folder, made)
    if theirs:
        return [f"{folder}: its row is gone, but it stays, since {theirs} in it is yours"]
    if made:
        shutil.rmtree(folder.rename(folder.with_name(OLD + folder.name)))
    return []


def _write(folder: Path, contents: Contents) -> list[str]:
    """Bring a folder up to date; tell if it is left as it is."""
    texts = {name: text.encode() for name, text in contents.texts.items()}
    written = {name: File(len(text), sha256(text).hexdigest()) for name, text in texts.items()}
    wanted = Made(contents.checkpoint, {**contents.files, **written})
    made = read_record(Made, folder / MADE)
    if made == wanted and all((folder / name).exists() for name in wanted.files):
        return []
    if theirs := _file_of_the_user(folder, made or Made("", {})):
        return [f"{folder}: left as it is, since {theirs} in it is yours; its row's checkpoint is {contents.artifact}"]
    _replace(folder, contents, wanted)
    return []


def _file_of_the_user(folder: Path, made: Made) -> str | None:
    """A file in a folder that wasn't written here, or was changed since; the folder itself if it is none."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return folder.name
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    kept = (name for name in files if name in made.files and made.files[name].is_at(folder / name))
    return next(iter(sorted({*files} - {MADE, *kept})), None)


def _replace(folder: Path, contents: Contents, made: Made) -> None:
    new, old = folder.with_name(NEW + folder.name), folder.with_name(OLD + folder.name)
    for name in made.files:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        if name in contents.texts:
            write_text(new / name, contents.texts[name])
        else:
            _copy((contents.artifact / name).resolve(), new / name)
    write_json(new / MADE, asdict(made))
    for path in (*new.rglob("*"), new):
        fsync_path(path)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a file and its time of change, without its bytes where the file system lets files share them."""
    with source.open("rb") as stream, target.open("wb") as copy:
        try:
            fcntl.ioctl(copy, FICLONE, stream.fileno())
        except OSError:
            shutil.copyfileobj(stream, copy)
    stat = source.stat()
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
