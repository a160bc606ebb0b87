"""Exclusive claims, so that two sweeps or jobs on one store never run the same stage at once.

A claim is a file ``claim.<generation>``, created by hard link (atomic on local disks, NFS and Lustre). The highest
generation is in force; to succeed a dead holder, a process creates the next one, so no file is deleted under a
competitor. A holder that only seemed dead, e.g. while suspended, finds a higher generation than its own and must leave.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hfprune_dist.errors import naming
from hfprune_dist.store.atomic_files import as_record, listed, modified_at, read_object, unless_stale, write_json

CLAIM_FILES = "claim.*"
CANCELLED = "cancelled"  # file in a store with a random token, a new one each time that all that runs is cancelled
# The process of a holder on another host can't be checked; it counts as dead if its claim wasn't renewed for this long.
RENEWAL_LIMIT_S = 300.0
RENEW_S = 60.0
LOCK_POLL_S = 0.1


class ClaimLostError(Exception):
    """Another process has taken this one for dead and claimed the stage; the remaining work is left to that process."""


@dataclass(frozen=True)
class Holder:
    """A process that claimed a stage, and its job in a batch system, if any.

    Attributes:
        started: boot and PID namespace, and clock ticks since that boot at which the process started, which together
            with ``pid`` identify it: ids are reused, and clocks adjusted. None where there is no Linux to say so.
        lives: False for one that died at work.
    """

    host: str
    pid: int
    started: str | None
    job: str | None = None
    lives: bool = True

    @classmethod
    def me(cls, job: str | None = None) -> Holder:
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()), job)

    def __str__(self) -> str:
        place = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"process {self.pid}{place}" if self.job is None else f"job {self.job}{place}"


class Claim:
    """The right to run one stage, held until ``release``, or until another process takes the holder for dead. It has a
    random token; a rank that its launcher tells the token can check the claim.
    """

    def __init__(self, folder: Path, token: str) -> None:
        self.token = token
        self._folder = folder

    def is_held(self) -> bool:
        """Whether the claim is still in force: not released or succeeded by another, and the stage not finished."""
        with contextlib.suppress(ClaimLostError):
            return bool(self.require_held())
        return False

    def require_held(self) -> Path:
        """Return the claim's file, or raise ClaimLostError if it is no longer held: to be called before anything that
        must not collide with a successor's work.
        """
        file, record = _newest(self._folder)
        if record.get("token") != self.token or record.get("released"):
            raise ClaimLostError(
                f"{self._folder}: another process has taken over this stage; this one had given no sign of life for "
                f"{RENEWAL_LIMIT_S / 60:.0f} minutes or more (was it suspended?) and leaves the stage to it"
            )
        return file

    def release(self) -> None:
        """Give up the claim; its file stays, so that generations only grow while the folder exists."""
        with contextlib.suppress(ClaimLostError):
            file = self.require_held()
            write_json(file, {**(read_object(file) or {}), "released": True})


def keep_renewed(claim: Claim) -> threading.Event:
    """Renew a claim from a thread until it is released or lost, which its holder notices by itself, or until the
    returned event is set. What keeps it from being renewed now may pass until the next time.
    """
    enough = threading.Event()

    def renew() -> None:
        with contextlib.suppress(ClaimLostError):
            while not enough.wait(RENEW_S):
                with contextlib.suppress(OSError):
                    os.utime(claim.require_held())  # by which processes on other hosts see that this one is alive

    threading.Thread(target=renew, daemon=True).start()
    return enough


def try_claim(folder: Path, job: str | None = None) -> Claim | Holder:
    """Claim ``folder`` (created if needed), or return its holder; a requeued batch ``job`` takes over from itself."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # removed by a holder that finishes
        newest, record = _newest(folder)
        holder = _holder(newest, record)
        if holder is not None and holder.lives and (job is None or holder.job != job):
            return holder
        claim = Claim(folder, uuid.uuid4().hex[:12])
        me = {**asdict(Holder.me(job)), "token": claim.token}
        if _create(newest.with_suffix(f".{_generation(newest) + 1}"), json.dumps(me)):
            return claim


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep out other processes that lock the same folder, on any host and file system: the claims of a folder, one
    after another. One that dies is succeeded like any holder of a claim.
    """
    while isinstance(claim := try_claim(folder), Holder) or not claim.is_held():
        time.sleep(LOCK_POLL_S)
    renewing = keep_renewed(claim)
    for earlier in listed(folder, CLAIM_FILES):
        if _generation(earlier) < _generation(claim.require_held()):
            earlier.unlink(missing_ok=True)
    try:
        yield
    finally:
        renewing.set()
        claim.release()


def holder_of(folder: Path) -> Holder | None:
    """Who holds the claim on ``folder``, or died holding it; None if it was released, or if there is none."""
    return _holder(*_newest(folder))


def _newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The claim of the highest generation, ``claim.0`` if there is none, and its content; empty if it is gone or
    damaged. One that can't be read is an OSError, as its holder may well be alive.
    """
    files = [file for file in listed(folder, CLAIM_FILES) if file.suffix[1:].isdecimal()]
    file = max(files, key=_generation, default=folder / "claim.0")
    return file, read_object(file) or {}


def _generation(file: Path) -> int:
    return int(file.suffix[1:])


def _holder(file: Path, record: dict[str, Any]) -> Holder | None:
    holder = as_record(Holder, record)
    return None if holder is None or record.get("released") else replace(holder, lives=_lives(holder, file))


def _lives(holder: Holder, file: Path) -> bool:
    """Whether a holder is running or, where that can't be seen, has renewed its claim within the limit.

    Not seen are processes on another machine, in another container, from before a reboot, and those that are hidden.
    """
    if holder.host == socket.gethostname() and (holder.started or "").rpartition("/")[0] == _system():
        started = _start_of(holder.pid)
        if started is not None or not _is_hidden(holder.pid):
            return started == holder.started
    renewed_at = modified_at(file)
    if renewed_at is None:
        return False
    # This host's clock may be ahead or behind; what decides is the clock of the file system, which is slower to read.
    silent_s = time.time() - renewed_at
    if not 0 <= silent_s < RENEWAL_LIMIT_S:
        silent_s = _clock_of(file.parent) - renewed_at
    return silent_s < RENEWAL_LIMIT_S


def _clock_of(folder: Path) -> float:
    """Current time by the clock that dates files on a file system; on NFS the server's, which dates all renewals."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as probe:
        os.utime(probe.fileno())
        return os.fstat(probe.fileno()).st_mtime
    return time.time()  # the folder has just been removed, or nothing can be written


def _create(file: Path, text: str) -> bool:
    """Create ``file`` with its content in one step, so that readers never see a claim without its holder.

    Returns False if another process was faster, or has just removed the folder.
    """
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with naming(file):
            draft.write_text(text, encoding="utf-8")
        os.link(draft, file)
    except FileExistsError:  # perhaps by our own link: NFS repeats a request whose answer was lost
        with contextlib.suppress(FileNotFoundError):
            return draft.stat().st_nlink > 1
        return False
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # stale on NFS if it was removed while it was written
            raise
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


class Cancellation:
    """Tells whether the runs on a store were cancelled, which a launcher asks before it starts anything and meanwhile.

    A launcher makes it when it starts, so that an earlier cancellation doesn't concern it.
    """

    def __init__(self, root: Path) -> None:
        self._file = root / CANCELLED
        self._earlier = self._content()

    def is_requested(self) -> bool:
        """Whether a cancellation has been requested since."""
        return self._content() != self._earlier

    def _content(self) -> str | None:
        """What the file holds, whoever has written it; None if there is no such file."""
        try:
            return unless_stale(lambda: self._file.read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            return None

    def request(self) -> None:
        """Ask all launchers that work on the store at present to end what they run, and to start nothing more."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, uuid.uuid4().hex)


def _system() -> str | None:
    """Boot and PID namespace, within which a process id and a start time identify one process; None if not on Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """Start of a process, in the form of ``Holder.started``; None if it isn't running, or can't be seen."""
    try:
        # The name in parentheses may contain anything; state is the first field after it, the start the twentieth.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else f"{_system()}/{fields[19]}"


def _is_hidden(pid: int) -> bool:
    """Whether another user's process has this id, which systems may hide from /proc."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False
