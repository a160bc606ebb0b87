"""Leftovers in a store that could be removed to make room: their sizes, why nothing needs them, and their removal."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import MANIFEST, StageHandle, Store
from hfprune_dist.store.atomic_files import listed
from hfprune_dist.store.stage import STAGE_VERSIONS

# Folders of files that stages share; a stage makes such a file anew if it is missing.
SHARED = {
    "rows": "packed training rows, which a recovery packs again",
    "layers": "checks of layers and measurements that put them in order, which stages make again",
}
_FINGERPRINT = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True)
class Leftover:
    """Something that can be removed.

    Attributes:
        reason: why nothing needs it.
        size_bytes: how much space its removal frees.
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
    for kind in STAGE_VERSIONS:
        begun = tuple(f".draft-{it.partition('/')[2]}-" for it in about_to_run)
        for draft in (it for it in listed(store.root / kind, ".draft-*") if not it.name.startswith(begun)):
            yield _folder(draft, "a draft of a stage that ended early")
        for handle in (it for it in _handles(store, store.root / kind) if it.id not in kept):
            yield Leftover(
                handle.artifact, "an artifact of no row of the tables", size_of(handle.artifact), handle.discard
            )
        for handle in (it for it in _handles(store, store.root / "work" / kind) if it.id not in kept):
            yield _folder(handle.work, "progress of a stage of no row of the tables")
    for folder in listed(store.root / "quarantine", "*"):
        yield _folder(folder, "an artifact that failed verification")
    for name, what in {} if about_to_run else SHARED.items():
        if (folder := store.root / name).is_dir():
            yield _folder(folder, what)


def files_of(handle: StageHandle, reason: str) -> Leftover:
    """The files of an artifact, except its manifest, as a leftover."""
    return Leftover(handle.artifact, reason, _bytes_beside_manifest(handle), partial(_empty, handle))


def _handles(store: Store, folder: Path) -> list[StageHandle]:
    """The stages of one kind that have a subfolder in a folder; anything else in it is not ours."""
    names = [path.name for path in listed(folder, "*") if path.is_dir() and _FINGERPRINT.fullmatch(path.name)]
    return [store.handle(f"{folder.name}/{name}") for name in names]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; those that vanish meanwhile count as nothing."""
    below = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)  # as far as it can be listed
    return sum(map(_bytes_of, [path] if path.is_file() else below))


def _bytes_of(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def _folder(folder: Path, reason: str) -> Leftover:
    return Leftover(folder, reason, size_of(folder), partial(_remove, folder))


def _remove(folder: Path) -> None:
    """Remove a folder, which another process may be removing as well.

    Raises:
        UserError: if part of it stays.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise _stays(folder)


def _empty(handle: StageHandle) -> None:
    """Remove the files of an artifact, except its manifest.

    Raises:
        UserError: if some stay.
    """
    handle.empty()
    if _bytes_beside_manifest(handle):
        raise _stays(handle.artifact)


def _bytes_beside_manifest(handle: StageHandle) -> int:
    return size_of(handle.artifact) - size_of(handle.artifact / MANIFEST)


def _stays(folder: Path) -> UserError:
    return UserError(f"{folder}: part of it can't be removed; is it another user's, or in use?")
