"""Leftovers in a store that could be removed to make room: their sizes, why nothing needs them, and their removal."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import MANIFEST, StageHandle, Store
from hfprune_dist.store.atomic_files import listed
from hfprune_dist.store.stage import STAGE_VERSIONS

# Folders of files that stages share; a stage makes such a file anew if it is missing.
SHARED = {
    "rows": "packed training rows, which a recovery packs again",
    "layers": "checks of layers, which stages make again",
}
_FINGERPRINT = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True)
class Leftover:
    """Something that can be removed.

    Attributes:
        reason: why nothing needs it.
        size_bytes: how much space its removal frees.
        remove: removes it, or raises ``UserError`` if part of it stays.
    """

    path: Path
    reason: str
    size_bytes: int
    remove: Callable[[], None]


def running(store: Store) -> list[str]:
    """Ids of the stages claimed by a process that is alive."""
    handles = (handle for kind in STAGE_VERSIONS for handle in _handles(store, store.root / "work" / kind))
    claims = ((handle.id, handle.open_claim()) for handle in handles)
    return [stage_id for stage_id, claim in claims if claim is not None and claim.lives]


def unused(store: Store, kept: Collection[str], about_to_run: Collection[str] = ()) -> Iterator[Leftover]:
    """Everything that the stages with these ids don't need: other artifacts and their progress, drafts, artifacts that
    failed verification, and shared files.

    To be called only while no stage runs: the drafts of running stages would be included.

    Args:
        about_to_run: ids of stages that may begin at any moment. Their drafts and all shared files are left out.
    """
    begun = tuple(f".draft-{stage_id.partition('/')[2]}-" for stage_id in about_to_run)
    for kind in STAGE_VERSIONS:
        for draft in listed(store.root / kind, ".draft-*"):
            if not draft.name.startswith(begun):
                yield _leftover(draft, "a draft of a stage that ended early")
        for handle in _handles(store, store.root / kind):
            if handle.id not in kept:
                yield _leftover(handle.artifact, "an artifact of no row of the tables", handle.discard)
        for handle in _handles(store, store.root / "work" / kind):
            if handle.id not in kept:
                yield _leftover(handle.work, "progress of a stage of no row of the tables")
    for folder in listed(store.root / "quarantine", "*"):
        yield _leftover(folder, "an artifact that failed verification")
    for name, what in {} if about_to_run else SHARED.items():
        if (folder := store.root / name).is_dir():
            yield _leftover(folder, what)


def files_of(handle: StageHandle, reason: str) -> Leftover:
    """The files of an artifact, except its manifest, as a leftover."""
    return _leftover(handle.artifact, reason, handle.empty, keeps=MANIFEST)


def _handles(store: Store, folder: Path) -> list[StageHandle]:
    """The stages of one kind that have a subfolder in a folder; anything else in it is not ours."""
    names = [path.name for path in listed(folder, "*") if path.is_dir() and _FINGERPRINT.fullmatch(path.name)]
    return [store.handle(f"{folder.name}/{name}") for name in names]


def _leftover(folder: Path, reason: str, remove: Callable[[], None] | None = None, keeps: str = "") -> Leftover:
    """A folder as a leftover, except for a file that it keeps."""

    def removing() -> None:
        remove() if remove is not None else shutil.rmtree(folder, ignore_errors=True)
        if _size_of(folder, keeps) if keeps else folder.exists():
            raise UserError(f"{folder}: part of it can't be removed; is it another user's, or in use?")

    return Leftover(folder, reason, _size_of(folder, keeps), removing)


def _size_of(folder: Path, without: str) -> int:
    """Bytes of all files below a folder but one; those that vanish meanwhile count as nothing."""
    below = (Path(where, name) for where, _, names in os.walk(folder) for name in names)  # as far as it can be listed
    return sum(_bytes_of(file) for file in below if file != folder / without)


def _bytes_of(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:
        return 0
