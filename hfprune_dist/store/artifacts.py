"""The store: one folder per finished result, written whole or not at all, verified before it is trusted.

README.md shows the store's folders. An artifact that is being written lies beside its place, in a folder
``.draft-<fingerprint>-<token of the claim>``.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import fsync_path, listed, read_object, read_record, usual_mode, write_json
from hfprune_dist.store.claims import CLAIM_FILES, Claim, Holder, holder_of, try_claim
from hfprune_dist.store.hashing import FileHashes, for_each_file
from hfprune_dist.store.heartbeat import PROGRESS, Heartbeat
from hfprune_dist.store.stage import Stage

MANIFEST = "manifest.json"
Manifest = Mapping[str, Any]
# Marks the manifest of an artifact whose files were removed; the manifest stays, for the tables.
EMPTIED = "emptied"
STAGE_FILE = "stage.json"  # in a work folder: written by ``launch/stage/run.py`` for the ranks
# Files of launchers in a work folder; everything else there is progress inside the stage.
OF_LAUNCHERS = (CLAIM_FILES, f".{CLAIM_FILES}", STAGE_FILE, PROGRESS)


@dataclass(frozen=True)
class Verdict:
    """Whether an artifact can be used, and if not, why."""

    state: Literal["done", "missing", "corrupt"]
    reason: str


class Store:
    """Artifacts and progress of stages, on a local or shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hashes = FileHashes(root / "hashes")  # recalled if any process has read the files before

    def handle(self, stage_id: str) -> StageHandle:
        """The handle of a stage, by which it is asked about and run."""
        return StageHandle(self, stage_id)


class StageHandle:
    """One stage in a store, by its id ``<kind>/<fingerprint>``: its artifact, its work folder, and the right to run it.
    It keeps no state: each answer reflects the file system at that moment.

    Attributes:
        artifact: the folder of its artifact.
        work: the folder of its progress, which survives a crash and is removed once the artifact is committed.
        attempts: the folder of the attempts at it, by their numbers.
    """

    def __init__(self, store: Store, id: str) -> None:
        self.store = store
        self.id = id
        self.artifact = store.root / id
        self.work = store.root / "work" / id
        self.attempts = store.root / "attempts" / id

    # Its artifact.

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of its artifact; None if there is none, or a damaged one. Does not verify the files."""
        found = read_object(self.artifact / MANIFEST)
        parts = [found.get("files"), found.get("metrics")] if found else [None]
        return found if all(isinstance(part, dict) for part in parts) else None

    def is_committed(self) -> bool:
        """Whether it has an artifact, verified or not, whose files have not been removed to make room; cheap."""
        manifest = self.manifest()
        return manifest is not None and not manifest.get(EMPTIED)

    def is_done(self) -> bool:
        """Whether it has an artifact that passes verification, which is the only definition of success."""
        return self.verify().state == "done"

    def verify(self, thorough: bool = False) -> Verdict:
        """Check its artifact against the manifest; unless ``thorough``, trust files of the committed size and time."""
        if not self.artifact.is_dir():
            return Verdict("missing", "not made yet")
        manifest = self.manifest()
        if manifest is None or not manifest["files"]:
            return Verdict("corrupt", f"{MANIFEST} is missing or damaged")
        if manifest.get(EMPTIED):
            return Verdict("missing", "its files were removed to make room")
        listing = {self.artifact / name: entry for name, entry in manifest["files"].items()}
        problems = for_each_file(listing, lambda file: self._check_file(file, listing[file], thorough))
        found = (f"{file.relative_to(self.artifact)}: {problem}" for file, problem in problems.items() if problem)
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
        hashes = FileHashes(None) if thorough else self.store.hashes
        try:
            return "" if hashes.of_file(file) == entry["sha256"] else "content changed since it was committed"
        except UserError:
            if file.exists():
                raise
            return "missing"  # set aside by another process in the meantime

    def set_aside(self, claim: Claim) -> Path | None:
        """Move its corrupt artifact to the quarantine, so that another can take its place, and return its new path;
        None if it isn't corrupt (any more). Raises OSError or UserError if part of it can't be read at present, which
        says nothing about it, and ClaimLostError.
        """
        if self.verify(thorough=True).state != "corrupt":
            return None
        target = self.store.root / "quarantine" / f"{self.id.replace('/', '-')}-{uuid.uuid4().hex[:6]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        claim.require_held()
        self.artifact.rename(target)
        return target

    def open_draft(self, claim: Claim) -> Path:
        """Create the folder in which its artifact is written, and remove drafts of earlier holders of the claim; raises
        ClaimLostError if another process holds it by now.
        """
        # Listed before the claim is checked: a process that loses the claim can thus never list its successor's draft.
        found = listed(self.artifact.parent, f".draft-{self.artifact.name}-*")
        claim.require_held()
        for draft in found:
            self._remove(draft)
        draft = self._draft(claim.token)
        draft.mkdir(parents=True)
        return draft

    def _draft(self, owner: str) -> Path:
        return self.artifact.with_name(f".draft-{self.artifact.name}-{owner}")

    def discard_draft(self, claim: Claim) -> None:
        """Remove the draft of its artifact that was written under a claim, if there is one and it can be removed."""
        self._remove(self._draft(claim.token))

    def _remove(self, folder: Path) -> Path:
        """Rename a folder, remove it and return its new path, where files that can't be removed stay: a process about
        to commit it, or to read it, must not find a part of it.
        """
        doomed = self._draft(uuid.uuid4().hex[:8])
        try:
            folder.rename(doomed)
        except OSError:  # it is gone, or another user's, in whose folder nothing can be renamed
            return folder
        shutil.rmtree(doomed, ignore_errors=True)
        return doomed

    def commit(self, stage: Stage, draft: Path, record: dict[str, Any], claim: Claim) -> None:
        """Turn a draft into its artifact: fsync, manifest last, one rename; raises ClaimLostError without the claim.

        If another attempt committed first, its artifact is verified and the draft is dropped; if that artifact is
        corrupt, it is set aside and the draft takes its place.
        """
        try:
            _seal(stage, draft, record)
            claim.require_held()
            if self.artifact.exists() and not self.is_done():
                aside = self.set_aside(claim)
                if aside is None and not self.is_committed():  # its files had been removed to make room
                    self.discard()
            try:
                draft.rename(self.artifact)
            except OSError:
                if not self.is_done():
                    raise
                shutil.rmtree(draft, ignore_errors=True)
        except (OSError, UserError):
            claim.require_held()  # a successor has removed the draft
            raise
        fsync_path(self.artifact.parent)

    def empty(self) -> None:
        """Remove the files of its artifact, except for the manifest; they are made again when they are needed.

        Files that can't be removed stay: another user's, or on NFS those that are open, under other names.
        """
        manifest = self.manifest()
        if manifest is None:
            return
        write_json(self.artifact / MANIFEST, {**manifest, EMPTIED: True})
        fsync_path(self.artifact)
        for path in listed(self.artifact, "*"):
            if path.name != MANIFEST:
                _remove_path(path)

    def discard(self) -> Path:
        """Remove its artifact; return the draft that it becomes first, where files stay that can't be removed."""
        return self._remove(self.artifact)

    # Its work folder, in which it runs.

    def claim(self, job: str | None = None) -> Claim | Holder:
        """Claim the right to run it, or return the holder; creates the work folder. See ``try_claim``."""
        return try_claim(self.work, job)

    @contextlib.contextmanager
    def claimed_briefly(self, job: str | None = None) -> Iterator[Claim | None]:
        """Hold the right to run it for a moment; None if another process has it; ``job`` is one that is over."""
        claim = self.claim(job)
        try:
            yield claim if isinstance(claim, Claim) else None
        finally:
            if isinstance(claim, Claim):
                claim.release()

    def holder(self) -> Holder | None:
        """The process that runs it, or died doing so; None if nobody has claimed it, or its claim was released."""
        return holder_of(self.work)

    def heartbeat(self) -> Heartbeat | None:
        """The latest report of its progress; None if none can be read."""
        with contextlib.suppress(OSError):  # it is read all the time, and nothing depends on it
            return read_record(Heartbeat, self.work / PROGRESS)
        return None

    def discard_progress(self) -> None:
        """Make the next attempt start over; claims and files exchanged by launchers and ranks are kept."""
        for path in listed(self.work, "*"):
            if not any(path.match(pattern) for pattern in OF_LAUNCHERS):
                _remove_path(path)

    def discard_work(self) -> None:
        """Remove its work folder, once its artifact is committed."""
        shutil.rmtree(self.work, ignore_errors=True)

    def discard_leftovers(self) -> None:
        """Remove the work folder left by a process that died just after committing, if the stage is done."""
        if self.work.is_dir():
            with self.claimed_briefly() as claim:  # a process that has just committed is about to do the same
                if claim is not None and self.is_done():
                    self.discard_work()


def _seal(stage: Stage, draft: Path, record: dict[str, Any]) -> None:
    """Flush all files of a draft and write its manifest."""
    files = sorted(file for file in draft.rglob("*") if file.is_file())
    sealed = for_each_file(files, partial(_sealed, usual_mode()))
    listing = {str(file.relative_to(draft)): entry for file, entry in sealed.items()}
    write_json(draft / MANIFEST, {"format": 1, "stage": stage.to_json(), "files": listing, **record})
    for folder in {file.parent for file in files} | {draft}:
        fsync_path(folder)


def _sealed(mode: int, file: Path) -> dict[str, Any]:
    """Set a file's mode (safetensors makes files private), flush it, and return its manifest entry."""
    file.chmod(mode)
    fsync_path(file)
    stat = file.stat()
    return {"bytes": stat.st_size, "sha256": FileHashes(None).of_file(file), "mtime_ns": stat.st_mtime_ns}


def _remove_path(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
