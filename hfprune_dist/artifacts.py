"""The store: one folder per finished result, written whole or not at all, verified before it is trusted.

<store>/<kind>/<fingerprint>/           an artifact; manifest.json is written last
<store>/<kind>/.draft-<fingerprint>-*/  one being written
<store>/work/<kind>/<fingerprint>/      progress inside a stage, kept until its artifact is committed
<store>/quarantine/                     artifacts that failed verification, set aside
<store>/hashes/                         sha256 of files seen before
<store>/rows/                           packed training rows, for every recovery that needs the same
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hfprune_dist.errors import UserError
from hfprune_dist.files import fsync_path, read_json, write_json
from hfprune_dist.identity import FileHashes
from hfprune_dist.plan import Stage

MANIFEST = "manifest.json"
READABLE = 0o666  # but for what the umask keeps back


@dataclass(frozen=True)
class Verdict:
    """Whether an artifact can be used, and why not."""

    state: Literal["done", "missing", "corrupt"]
    reason: str


class Store:
    """Artifacts by stage id, on a local or shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hashes = FileHashes(root / "hashes")

    def path(self, stage_id: str) -> Path:
        return self.root / stage_id

    def work(self, stage_id: str) -> Path:
        return self.root / "work" / stage_id

    def manifest(self, stage_id: str) -> dict[str, Any] | None:
        """The manifest of a committed artifact; None where there is none. Does not verify the files."""
        try:
            manifest = read_json(self.path(stage_id) / MANIFEST)
        except ValueError:
            return None
        return manifest if isinstance(manifest, dict) else None

    def verify(self, stage_id: str, thorough: bool = False, after_each: Callable[[], None] = lambda: None) -> Verdict:
        """Check an artifact against its manifest.

        Args:
            thorough: read every file; otherwise a file whose size and modification time are as committed is trusted.
            after_each: called after every file.
        """
        folder = self.path(stage_id)
        if not folder.is_dir():
            return Verdict("missing", "not made yet")
        manifest = self.manifest(stage_id)
        if manifest is None or not _is_listing(manifest.get("files")) or not isinstance(manifest.get("metrics"), dict):
            return Verdict("corrupt", f"{MANIFEST} is missing or damaged")
        for name, entry in manifest["files"].items():
            problem = self._check_file(folder / name, entry, thorough)
            after_each()
            if problem:
                return Verdict("corrupt", f"{name}: {problem}")
        return Verdict("done", "verified")

    def _check_file(self, file: Path, entry: dict[str, Any], thorough: bool) -> str:
        try:
            stat = file.stat()
        except OSError:
            return "missing"
        if stat.st_size != entry["bytes"]:
            return f"{stat.st_size:,} bytes, committed with {entry['bytes']:,}"
        if stat.st_mtime_ns == entry["mtime_ns"] and not thorough:
            return ""
        # A copied store has other times: hash once, then the cache of hashes remembers.
        hashes = FileHashes(None) if thorough else self.hashes
        return "" if hashes.of_file(file) == entry["sha256"] else "content changed since it was committed"

    def set_aside(self, stage_id: str) -> Path:
        """Move a corrupt artifact to the quarantine, so that the stage can run again."""
        target = self.root / "quarantine" / f"{stage_id.replace('/', '-')}-{uuid.uuid4().hex[:6]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path(stage_id).rename(target)
        return target

    def open_draft(self, stage_id: str) -> Path:
        """Create the folder in which an artifact is written; drafts that dead attempts left are removed."""
        self.discard_drafts(stage_id)
        kind, fingerprint = stage_id.split("/")
        draft = self.root / kind / f".draft-{fingerprint}-{uuid.uuid4().hex[:8]}"
        draft.mkdir(parents=True)
        return draft

    def discard_drafts(self, stage_id: str) -> None:
        kind, fingerprint = stage_id.split("/")
        for draft in (self.root / kind).glob(f".draft-{fingerprint}-*"):
            shutil.rmtree(draft, ignore_errors=True)

    def commit(
        self, stage: Stage, draft: Path, record: dict[str, Any], after_each: Callable[[], None] = lambda: None
    ) -> None:
        """Turn a draft into the stage's artifact: fsync, manifest last, one rename.

        Where another attempt committed first, its artifact is verified and ours dropped.

        Args:
            after_each: called after every file.
        """
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        listing = {}
        for file in files:
            file.chmod(READABLE & ~_umask())  # safetensors leaves its files to their owner alone
            fsync_path(file)
            listing[str(file.relative_to(draft))] = self._describe(file)
            after_each()
        write_json(draft / MANIFEST, {"format": 1, "stage": stage.to_json(), "files": listing, **record})
        for folder in {file.parent for file in files} | {draft}:
            fsync_path(folder)
        final = self.path(stage.id)
        try:
            draft.rename(final)
        except OSError:
            if self.verify(stage.id).state != "done":
                raise
            shutil.rmtree(draft)
        fsync_path(final.parent)

    def _describe(self, file: Path) -> dict[str, Any]:
        stat = file.stat()
        return {"bytes": stat.st_size, "sha256": FileHashes(None).of_file(file), "mtime_ns": stat.st_mtime_ns}

    def discard_work(self, stage_id: str) -> None:
        """Forget the progress of a stage whose artifact is committed."""
        shutil.rmtree(self.work(stage_id), ignore_errors=True)


def _is_listing(files: Any) -> bool:
    """Whether it gives what verification needs of at least one file."""
    if not isinstance(files, dict) or not files:
        return False
    return all(isinstance(entry, dict) and {"bytes", "mtime_ns", "sha256"} <= entry.keys() for entry in files.values())


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it alone
    os.umask(mask)
    return mask


def require_writable(root: Path) -> None:
    """Create a folder and check that it can be written to, before any work starts.

    Raises:
        UserError: naming the folder and the reason.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{root}: can't be written to ({error.strerror or error}); choose another --out") from None
