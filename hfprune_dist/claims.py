"""Exclusive claims, so that two sweeps or jobs on one store never run the same stage at once.

A claim is a file ``claim.<generation>`` created by hard link (atomic on local disks, NFS and Lustre). The highest
generation holds; a dead holder is succeeded by creating the next one, so nothing is ever deleted under a competitor.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from hfprune_dist.files import read_json, write_json

# A holder on another host can't be looked up by process; it counts as dead when its claim was not renewed so long.
RENEWAL_LIMIT_S = 300.0


@dataclass(frozen=True)
class Holder:
    """A process: host, id and start time (ids are reused, the pair is not), and its job in a batch system, if any."""

    host: str
    pid: int
    started: float | None
    job: str | None = None

    @classmethod
    def me(cls, job: str | None = None) -> Holder:
        return cls(socket.gethostname(), os.getpid(), _start_time(os.getpid()), job)

    def is_alive(self, renewed_at: float) -> bool:
        if self.host == socket.gethostname():
            return self.started is not None and _start_time(self.pid) == self.started
        return time.time() - renewed_at < RENEWAL_LIMIT_S


class Claim:
    """The right to run one stage, held until ``release``."""

    def __init__(self, file: Path, holder: Holder) -> None:
        self._file = file
        self._holder = holder

    def renew(self) -> None:
        """Show holders on other hosts that this process is alive."""
        if self._file.exists():
            os.utime(self._file)

    def release(self) -> None:
        """Give the claim up; the file stays, so that generations only grow while the folder exists."""
        if self._file.exists():
            write_json(self._file, asdict(self._holder) | {"released": True})


def try_claim(folder: Path, job: str | None = None, ended_jobs: Collection[str] = ()) -> Claim | Holder:
    """Claim ``folder`` (created if need be), or return who holds it.

    Args:
        folder: the stage's work folder.
        job: the batch job that claims, if any; it succeeds itself when it was requeued.
        ended_jobs: jobs known to have ended: what they hold is free, however lately it was renewed.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # a holder that finishes removes it
        generation, holder = _current(folder)
        if holder is not None and (holder.job is None or holder.job not in {job, *ended_jobs}):
            return holder
        me = Holder.me(job)
        file = folder / f"claim.{generation + 1}"
        if _create(file, json.dumps(asdict(me))):
            return Claim(file, me)


def _current(folder: Path) -> tuple[int, Holder | None]:
    """The highest generation, and its holder if that one lives."""
    generations = [int(file.suffix[1:]) for file in folder.glob("claim.*") if file.suffix[1:].isdigit()]
    if not generations:
        return 0, None
    generation = max(generations)
    file = folder / f"claim.{generation}"
    try:
        record = read_json(file)
        renewed_at = file.stat().st_mtime
    except (ValueError, FileNotFoundError):
        record, renewed_at = None, 0.0
    if record is None or record.pop("released", False):
        return generation, None
    holder = Holder(**record)
    return generation, holder if holder.is_alive(renewed_at) else None


def _create(file: Path, text: str) -> bool:
    """Create ``file`` with its content in one step: readers never see a claim without its holder.

    False where somebody else was faster, or has just removed the folder.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.link(draft, file)
    except (FileExistsError, FileNotFoundError):
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _start_time(pid: int) -> float | None:
    """When a process started, in unix time; None where it does not run."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
