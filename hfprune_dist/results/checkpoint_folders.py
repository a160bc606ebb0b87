"""The folder ``checkpoints/`` of a sweep: each row's checkpoint under its name, as links into the store and a card.

Users add files and edit cards, so only files written by this module are ever changed or removed. They are recognized
by their sha256, which is noted in ``.written`` before the file is written.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from hfprune_dist.errors import naming
from hfprune_dist.store.atomic_files import listed, locked, publish, read_record, unless_stale, write_json, write_text

LOCK, WRITTEN = ".lock", ".written"
# Prefix of folders and files that are being written or removed.
DRAFT = ".hfprune-draft-"
# No file written here comes near this size, so larger files are the user's without being read.
MOST_BYTES = 2**20


@dataclass(frozen=True)
class Contents:
    """Contents of a named folder.

    Attributes:
        second_name: name to use instead if files of the user's are in the way.
        links: name of a file, relative to the folder -> target of the link.
        texts: name of a file -> its content.
    """

    second_name: str
    links: Mapping[str, Path]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Update:
    """Result of updating the folders.

    Attributes:
        folders: name -> path of the folder, which may have its second name.
        remarks: messages for the user, in sentences.
    """

    folders: Mapping[str, Path]
    remarks: Sequence[str]


@dataclass(frozen=True)
class _Written:
    """Content of ``.written``."""

    sha256: list[str]


class CheckpointFolders:
    """The named folders of a sweep.

    Args:
        root: the folder ``checkpoints/``.
        store: folder of the store, into which links lead.
    """

    def __init__(self, root: Path, store: Path) -> None:
        self._root = root
        self._store = _absolute(store)
        self._written: set[str] = set()

    def update(self, wanted: Mapping[str, Contents]) -> Update:
        """Write the wanted folders and remove all others of ours. A reader finds each one whole, or not at all.

        Args:
            wanted: name -> contents of the folder.
        """
        if not wanted and not self._root.is_dir():
            return Update({}, [])
        if self._root.is_symlink():  # relative links below it would lead elsewhere
            why = "is a link, from where links into the store would lead elsewhere"
            return Update({}, [f"{self._root} {why}; named checkpoints are written once it is gone"])
        self._root.mkdir(parents=True, exist_ok=True)
        with locked(self._root / LOCK):
            self._remove_drafts()
            self._note(text for contents in wanted.values() for text in contents.texts.values())
            places = {self._place_of(name, contents): contents for name, contents in wanted.items()}
            remarks = [
                f"{self._root / name} holds files of yours; the checkpoint of its row is {folder}"
                for name, folder in zip(wanted, places, strict=True)
                if folder.name != name
            ]
            remarks += [remark for folder, contents in places.items() for remark in self._write(folder, contents)]
            gone = [it for it in self._folders() if it not in places and it.name not in wanted]
            remarks += [remark for folder in gone for remark in self._remove(folder, self._successor(folder, places))]
            return Update(dict(zip(wanted, places, strict=True)), remarks)

    def linked(self) -> set[Path]:
        """Files and folders of the store, relative to it, that any link here points to, including the user's links."""
        targets = map(self._target, _files_in(self._root))
        return {target.relative_to(self._store) for target in targets if target is not None}

    def _place_of(self, name: str, contents: Contents) -> Path:
        """Path for a folder: under its name if that is free, has these links or only files of ours; else its second."""
        folder = self._root / name
        free = not os.path.lexists(folder) or self._has(folder, contents) or not self._others(folder)
        return folder if free else self._root / contents.second_name

    def _write(self, folder: Path, contents: Contents) -> list[str]:
        if self._has(folder, contents):
            return [remark for name, text in contents.texts.items() for remark in self._write_text(folder / name, text)]
        if others := self._others(folder):
            return [f"{folder}: left as it is, since it holds files of yours ({others[0]})"]
        draft = self._draft(contents)
        outgoing = self._outgoing(folder) if folder.is_dir() else None
        draft.rename(folder)
        if outgoing is not None:
            _remove(outgoing)
        return []

    def _write_text(self, file: Path, text: str) -> list[str]:
        if file.is_file() and not self._is_ours(file):
            return [f"{file}: left as it is, since it was edited"]
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(exist_ok=True)
            draft = self._new_draft()
            with naming(file):
                draft.write_text(text, encoding="utf-8")
            publish(draft, file)
        return []

    def _draft(self, contents: Contents) -> Path:
        """Create a folder with these contents, at the same depth as the named one, so that relative links hold."""
        draft = self._new_draft()
        for name, target in contents.links.items():
            link = draft / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent))
        for name, text in contents.texts.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(draft / name, text)
        return draft

    def _outgoing(self, folder: Path) -> Path:
        """Rename a folder that will be removed, so that nobody finds half of it."""
        return folder.rename(self._new_draft())

    def _new_draft(self) -> Path:
        return self._root / f"{DRAFT}{uuid.uuid4().hex[:8]}"

    def _remove_drafts(self) -> None:
        """Remove drafts that a dead process left behind, or of which a part stayed."""
        for draft in listed(self._root, f"{DRAFT}*"):
            _remove(draft)

    def _remove(self, folder: Path, successor: Path | None) -> list[str]:
        """Remove a folder whose row is gone or has another name now, unless it holds files of the user's."""
        if not self._links(folder):
            return []  # was never one of ours
        if others := self._others(folder):
            why = "its row is gone" if successor is None else f"its checkpoint is called {successor.name} now"
            return [f"{folder}: {why}, but it stays, since it holds files of yours ({others[0]})"]
        _remove(self._outgoing(folder))
        return [] if successor is None else [f"{folder} is called {successor.name} now"]

    def _successor(self, folder: Path, places: Mapping[Path, Contents]) -> Path | None:
        """The folder that has the checkpoint of another one, as when rows of a second method change names."""
        return next((place for place, contents in places.items() if self._has(folder, contents)), None)

    # What is on disk.

    def _folders(self) -> list[Path]:
        found = sorted(self._root.iterdir()) if self._root.is_dir() else []
        return [path for path in found if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")]

    def _has(self, folder: Path, contents: Contents) -> bool:
        """Whether the folder's links into the store are exactly these."""
        return self._links(folder) == {name: _absolute(target) for name, target in contents.links.items()}

    def _links(self, folder: Path) -> dict[str, Path]:
        """The folder's links into the store: name -> target."""
        targets = {str(path.relative_to(folder)): self._target(path) for path in _files_in(folder)}
        return {name: target for name, target in targets.items() if target is not None}

    def _target(self, path: Path) -> Path | None:
        """Target of a link into the store, whether it exists or not; None for anything else."""
        target = _absolute(path.parent / path.readlink()) if path.is_symlink() else None
        return target if target is not None and target.is_relative_to(self._store) else None

    def _others(self, folder: Path) -> list[str]:
        """Names of files in a folder that were not written here; its own name if it isn't a folder."""
        if folder.is_symlink() or not folder.is_dir():
            return [folder.name] if os.path.lexists(folder) else []
        return [str(path.relative_to(folder)) for path in _files_in(folder) if not self._is_ours(path)]

    def _is_ours(self, path: Path) -> bool:
        return self._target(path) is not None or _digest(path) in self._written

    def _note(self, texts: Iterable[str]) -> None:
        """Record the hashes of what is about to be written, and of earlier files of ours that still exist."""
        noted = (read_record(_Written, self._root / WRITTEN) or _Written([])).sha256
        there = {_digest(path) for folder in self._folders() for path in _files_in(folder)}
        self._written = {sha256(text.encode()).hexdigest() for text in texts} | {it for it in noted if it in there}
        if self._written != set(noted):
            write_json(self._root / WRITTEN, {"sha256": sorted(self._written)})


def _remove(draft: Path) -> None:
    """Remove a draft as far as possible: on NFS, files that somebody has open stay as long as they are."""
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        with suppress(OSError):
            draft.unlink()


def _absolute(path: Path) -> Path:
    """Make a path absolute without resolving links, since the store may be reached through some."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _files_in(folder: Path) -> list[Path]:
    """All files and links below a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]


def _digest(path: Path) -> str | None:
    """sha256 of a small file; None for anything else, and for what its user removes at this moment."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_BYTES:
            return None
        return sha256(unless_stale(path.read_bytes)).hexdigest()
    except FileNotFoundError:
        return None
