"""The store: one folder per finished result, written whole or not at all, verified before it is trusted.

<store>/<kind>/<fingerprint>/           an artifact; manifest.json is written last
<store>/<kind>/.draft-<fingerprint>-*/  an artifact being written, under the claim in its name
<store>/work/<kind>/<fingerprint>/      progress inside a stage, kept until its artifact is committed
<store>/quarantine/                     artifacts that failed verification, set aside
<store>/hashes/                         sha256 of files seen before
<store>/rows/                           packed training rows, shared by recoveries that need the same ones
<store>/layers/                         measurements that rank layers, shared by prunings that need the same ones; and
                                        checked-*.json: models whose layers, computed alone, were found right
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import fsync_path, listed, read_json, read_object, usual_mode, write_json
from hfprune_dist.store.claims import CLAIM_FILES, Claim
from hfprune_dist.store.hashing import FileHashes, for_each_file
from hfprune_dist.store.heartbeat import FAILURES, PROGRESS
from hfprune_dist.store.stage import Stage
from hfprune_dist.store.stage_handle import StageHandle

MANIFEST = "manifest.json"
Manifest = Mapping[str, Any]
# Marks the manifest of an artifact whose files were removed; the manifest stays, for the tables.
EMPTIED = "emptied"
STAGE_FILE = "stage.json"  # in a work folder: written by ``launch/stage/stage_file.py`` for the ranks
# After each failed attempt, a corrupt artifact found in the place of ours is set aside.
PUBLISHING_ATTEMPTS = 3
# Files of launchers in a work folder; everything else there is progress inside the stage.
OF_LAUNCHERS = (CLAIM_FILES, f".{CLAIM_FILES}", STAGE_FILE, PROGRESS, FAILURES)


@dataclass(frozen=True)
class Verdict:
    """Whether an artifact can be used, and if not, why."""

    state: Literal["done", "missing", "corrupt"]
    reason: str


# The verdict on an artifact of which ``Store.empty`` left only the manifest.
NOTHING_LEFT = Verdict("missing", "its files were removed to make room")


class Store:
    """Artifacts by stage id, on a local or shared file system.

    Outside this package, a stage in a store is accessed through its ``handle``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hashes = self.make_hashes()

    def make_hashes(self) -> FileHashes:
        """Hashes of files, recalled if any process has read the files before with this store."""
        return FileHashes(self.root / "hashes")

    def handle(self, stage_id: str) -> StageHandle:
        """The handle of a stage: its folders, its artifact, its claim and its failures."""
        return StageHandle(self, stage_id)

    def path(self, stage_id: str) -> Path:
        return self.root / stage_id

    def work(self, stage_id: str) -> Path:
        return self.root / "work" / stage_id

    def manifest(self, stage_id: str) -> dict[str, Any] | None:
        """The manifest of a committed artifact; None if there is none, or a damaged one. Does not verify the files."""
        found = read_object(self.path(stage_id) / MANIFEST)
        parts = [found.get("files"), found.get("metrics")] if found else [None]
        return found if all(isinstance(part, dict) for part in parts) else None

    def is_committed(self, stage_id: str) -> bool:
        """Whether there is an artifact, verified or not, whose files have not been removed to make room."""
        manifest = self.manifest(stage_id)
        return manifest is not None and not manifest.get(EMPTIED)

    def verify(self, stage_id: str, thorough: bool = False) -> Verdict:
        """Check an artifact against its manifest.

        Args:
            thorough: read every file; otherwise a file whose size and modification time are as committed is trusted.
        """
        folder = self.path(stage_id)
        if not folder.is_dir():
            return Verdict("missing", "not made yet")
        manifest = self.manifest(stage_id)
        if manifest is None or not manifest["files"]:
            return Verdict("corrupt", f"{MANIFEST} is missing or damaged")
        if manifest.get(EMPTIED):
            return NOTHING_LEFT
        listing = {folder / name: entry for name, entry in manifest["files"].items()}

        sizes = {file: entry["bytes"] for file, entry in listing.items()}
        problems = for_each_file(sizes, lambda file: self._check_file(file, listing[file], thorough))
        found = (f"{file.relative_to(folder)}: {problem}" for file, problem in problems.items() if problem)
        reason = next(found, "")
        return Verdict("corrupt", reason) if reason else Verdict("done", "verified")

    def _check_file(self, file: Path, entry: dict[str, Any], thorough: bool) -> str:
        try:
            stat = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return "missing"
        if stat.st_size != entry["bytes"]:
            return f"{stat.st_size:,} bytes, committed with {entry['bytes']:,}"
        if stat.st_mtime_ns == entry["mtime_ns"] and not thorough:
            return ""
        # Modification times in a copied store differ: hash each file once, after which the cache knows it.
        hashes = FileHashes(None) if thorough else self.hashes
        try:
            return "" if hashes.of_file(file) == entry["sha256"] else "content changed since it was committed"
        except UserError:
            if file.exists():
                raise
            return "missing"  # set aside by another process in the meantime

    def set_aside(self, stage_id: str) -> Path | None:
        """Move a corrupt artifact, or one without files, to the quarantine, so that another can take its place.

        Other processes may find the same damage at the same time and remake the artifact; a remade one is kept.

        Returns:
            its new path; None if there is no such artifact (any more).

        Raises:
            OSError, UserError: if part of it can't be read at present, which says nothing about it.
        """
        folder = self.path(stage_id)
        judged = _inode(folder)
        if judged is None:
            return None
        verdict = self.verify(stage_id, thorough=True)
        if verdict.state != "corrupt" and verdict != NOTHING_LEFT:
            return None
        with contextlib.suppress(ValueError, IsADirectoryError):
            read_json(folder / MANIFEST)  # which looks damaged to ``verify`` if the disk doesn't answer
        target = self.root / "quarantine" / f"{stage_id.replace('/', '-')}-{uuid.uuid4().hex[:6]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(target)
        except FileNotFoundError:
            return None
        if _inode(target) == judged:
            return target
        self._put_back(target, folder)
        return None

    def _put_back(self, taken: Path, folder: Path) -> None:
        """Put back an artifact that was made while its predecessor was verified; a third may be there by now."""
        try:
            taken.rename(folder)
        except OSError:
            shutil.rmtree(taken, ignore_errors=True)

    def open_draft(self, stage_id: str, claim: Claim | None = None) -> Path:
        """Create the folder in which an artifact is written; drafts left by dead attempts are removed.

        Args:
            claim: the claim under which the stage runs. Drafts written under earlier claims are removed; without a
                claim, only drafts written without one.

        Raises:
            ClaimLostError: if another process has claimed the stage since.
        """
        kind, fingerprint = stage_id.split("/")
        owner = "" if claim is None else f"{claim.token}-"
        # Listed before the claim is checked: a process that loses the claim can thus never list its successor's draft.
        found = listed(self.root / kind, f".draft-{fingerprint}-*")
        if claim is not None:
            claim.require_held()
        for draft in found:
            if claim is not None or _is_unclaimed(draft):
                _remove(draft)
        draft = self.root / kind / f".draft-{fingerprint}-{owner}{uuid.uuid4().hex[:8]}"
        draft.mkdir(parents=True)
        return draft

    def discard_drafts(self, stage_id: str, claim: Claim) -> None:
        """Remove the drafts of a stage that were written under a claim."""
        kind, fingerprint = stage_id.split("/")
        for draft in listed(self.root / kind, f".draft-{fingerprint}-{claim.token}-*"):
            _remove(draft)

    def commit(
        self,
        stage: Stage,
        draft: Path,
        record: dict[str, Any],
        *,
        claim: Claim | None = None,
    ) -> None:
        """Turn a draft into the stage's artifact: fsync, manifest last, one rename.

        If another attempt committed first, its artifact is verified and the draft is dropped; if that artifact is
        corrupt, it is set aside and the draft takes its place.

        Args:
            claim: the claim under which the stage ran.

        Raises:
            ClaimLostError: if another process has claimed the stage since.
        """
        try:
            self._seal(stage, draft, record)
            if claim is not None:
                claim.require_held()
            self._publish(draft, stage.id)
        except (OSError, UserError):
            if claim is not None:
                claim.require_held()  # a successor has removed the draft
            raise
        fsync_path(self.path(stage.id).parent)

    def _seal(self, stage: Stage, draft: Path, record: dict[str, Any]) -> None:
        """Flush all files of a draft and write its manifest."""
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        mode = usual_mode()
        sealed = for_each_file({file: file.stat().st_size for file in files}, partial(_sealed, mode))
        listing = {str(file.relative_to(draft)): entry for file, entry in sealed.items()}
        write_json(draft / MANIFEST, {"format": 1, "stage": stage.to_json(), "files": listing, **record})
        for folder in {file.parent for file in files} | {draft}:
            fsync_path(folder)

    def _publish(self, draft: Path, stage_id: str) -> None:
        """Give a finished draft its final name, unless a valid artifact has it already."""
        final = self.path(stage_id)
        for attempts_left in reversed(range(PUBLISHING_ATTEMPTS)):
            try:
                draft.rename(final)
                return
            except OSError:
                if not final.is_dir() or not attempts_left:
                    raise
            if self.verify(stage_id).state == "done":
                shutil.rmtree(draft, ignore_errors=True)
                return
            aside = self.set_aside(stage_id)
            if aside is not None and (read_object(aside / MANIFEST) or {}).get(EMPTIED):
                shutil.rmtree(aside, ignore_errors=True)

    def empty(self, stage_id: str) -> None:
        """Remove an artifact's files, except for its manifest; the artifact is made again when its files are needed.

        Files that can't be removed stay: another user's, or on NFS those that are open, under other names.
        """
        folder, manifest = self.path(stage_id), self.manifest(stage_id)
        if manifest is None:
            return
        write_json(folder / MANIFEST, {**manifest, EMPTIED: True})
        fsync_path(folder)
        for path in listed(folder, "*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MANIFEST:
                with contextlib.suppress(OSError):
                    path.unlink()

    def discard(self, stage_id: str) -> None:
        """Remove an artifact; a process that dies meanwhile leaves a draft behind."""
        kind, fingerprint = stage_id.split("/")
        doomed = self.root / kind / f".draft-{fingerprint}-{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(FileNotFoundError):
            self.path(stage_id).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def discard_work(self, stage_id: str) -> None:
        """Remove the work folder of a stage whose artifact is committed."""
        shutil.rmtree(self.work(stage_id), ignore_errors=True)

    def discard_progress(self, stage_id: str) -> None:
        """Make the next attempt at a stage start over; claims and files exchanged by launchers and ranks are kept."""
        for path in listed(self.work(stage_id), "*"):
            if any(path.match(pattern) for pattern in OF_LAUNCHERS):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _remove(draft: Path) -> None:
    """Rename a draft and remove it: a process about to commit it must not commit a partly removed one."""
    doomed = draft.with_name(f"{'-'.join(draft.name.split('-')[:2])}-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):
        draft.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_unclaimed(draft: Path) -> bool:
    """Whether a draft's name, ``.draft-<fingerprint>[-<token of a claim>]-<random>``, has no token of a claim."""
    return draft.name.count("-") == 2


def _sealed(mode: int, file: Path) -> dict[str, Any]:
    """Set a file's mode (safetensors makes files private), flush it, and return its manifest entry."""
    file.chmod(mode)
    fsync_path(file)
    stat = file.stat()
    sha256 = FileHashes(None).of_file(file)
    return {"bytes": stat.st_size, "sha256": sha256, "mtime_ns": stat.st_mtime_ns}


def _inode(folder: Path) -> int | None:
    """Inode number of a folder, which tells it from another that takes its name; None if there is no such folder."""
    try:
        return folder.stat().st_ino
    except FileNotFoundError:
        return None
