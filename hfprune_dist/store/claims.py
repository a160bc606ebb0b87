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
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from hfprune_dist.errors import naming
from hfprune_dist.store.atomic_files import as_record, listed, modified_at, read_json, write_json

CLAIM_FILES = "claim.*"
# The process of a holder on another host can't be checked; it counts as dead if its claim wasn't renewed for this long.
RENEWAL_LIMIT_S = 300.0
RENEW_S = 60.0
POLL_S = 1.0
# Unix times computed for the start of one process may differ by this much while the system's clock is adjusted.
START_TOLERANCE_S = 2.0

Clock = Callable[[], float]


class ClaimLostError(Exception):
    """Another process has taken this one for dead and claimed the stage; the remaining work is left to that process."""


@dataclass(frozen=True)
class Holder:
    """A process, and its job in a batch system, if any.

    Attributes:
        started: start of the process; with ``pid`` it identifies the process, since ids are reused. On Linux
            ``<system>/<ticks>``: boot and PID namespace, and clock ticks since that boot, which adjusting a clock does
            not change. On other systems, and in older claims, unix time; None if it isn't known.
    """

    host: str
    pid: int
    started: str | float | None
    job: str | None = None

    @classmethod
    def me(cls, job: str | None = None) -> Holder:
        return cls(socket.gethostname(), os.getpid(), _start_on_linux(os.getpid()) or _start_time(os.getpid()), job)

    def is_running(self) -> bool | None:
        """Whether the process is running; None if it can't be seen from here and only its claim's renewals can tell."""
        if self.host != socket.gethostname():
            return None
        if isinstance(self.started, str):
            return self._is_running_on_linux(self.started)
        started = _start_time(self.pid)
        return started is not None and self.started is not None and abs(started - self.started) < START_TOLERANCE_S

    def _is_running_on_linux(self, started: str) -> bool | None:
        if started.rpartition("/")[0] != _system():
            return None  # another machine of the same name, a container, or this machine before it was rebooted
        found = _start_on_linux(self.pid)
        if found is None and _is_hidden(self.pid):
            return None
        return found == started


class Claim:
    """The right to run one stage, held until ``release``, or until another process takes the holder for dead.

    Args:
        folder: the stage's work folder.
        token: random; tells this claim from one of the same generation in a folder that was removed and recreated.
    """

    def __init__(self, folder: Path, generation: int, token: str) -> None:
        self.token = token
        self._generation = generation
        self._folder = folder
        self._file = folder / f"claim.{generation}"

    @property
    def ticket(self) -> str:
        """Text from which another process of the holder's can restore the claim to check it; see ``from_ticket``."""
        return f"{self._generation}.{self.token}"

    @classmethod
    def from_ticket(cls, folder: Path, ticket: str) -> Claim:
        generation, _, token = ticket.partition(".")
        return cls(folder, int(generation), token)

    def is_held(self) -> bool:
        """Whether the claim is still in force: not released or succeeded by another, and the stage not finished."""
        if _newest_generation(self._folder) != self._generation:
            return False
        record = _read(self._file)
        return record.get("token") == self.token and not record.get("released")

    def require_held(self) -> None:
        """Check the claim; to be called before anything that must not collide with the work of a successor.

        Raises:
            ClaimLostError: if the claim is no longer held.
        """
        if not self.is_held():
            raise ClaimLostError(
                f"{self._folder}: another process has taken over this stage; this one had given no sign of life for "
                f"{RENEWAL_LIMIT_S / 60:.0f} minutes or more (was it suspended?) and leaves the stage to it"
            )

    def renew(self) -> None:
        """Show processes on other hosts that this one is alive.

        Raises:
            ClaimLostError: if the claim is no longer held.
            OSError: if the file system fails.
        """
        self.require_held()
        os.utime(self._file)

    def release(self) -> None:
        """Give up the claim; its file stays, so that generations only grow while the folder exists."""
        if self.is_held():
            write_json(self._file, {**_read(self._file), "released": True})


class Renewal:
    """Renews a claim at intervals as long as it is held; temporary failures of the file system are tolerated.

    Args:
        tell: called with a warning if renewals fail for so long that others may soon take the holder for dead.
        clock: returns seconds, from any origin.
    """

    def __init__(self, claim: Claim, tell: Callable[[str], None] | None = None, clock: Clock = time.monotonic) -> None:
        self._claim = claim
        self._tell = tell or _warn
        self._clock = clock
        self._tried_at = self._renewed_at = self._told_at = clock()

    def tick(self) -> None:
        """Renew the claim if it is time to.

        Raises:
            ClaimLostError: if the claim is no longer held.
        """
        now = self._clock()
        if now - self._tried_at < RENEW_S:
            return
        self._tried_at = now
        try:
            self._claim.renew()
        except OSError as error:
            self._complain(now, error)
        else:
            self._renewed_at = now

    def _complain(self, now: float, error: OSError) -> None:
        silent_s = now - self._renewed_at
        if silent_s < RENEWAL_LIMIT_S / 2 or now - self._told_at < RENEWAL_LIMIT_S / 2:
            return
        self._told_at = now
        self._tell(
            f"the claim on this stage could not be renewed for {silent_s:.0f} s ({error}); after {RENEWAL_LIMIT_S:.0f} "
            "s another host may take the stage over"
        )


def keep_renewed(claim: Claim) -> threading.Event:
    """Renew a claim from a thread until it is released or lost, which its holder notices by itself, or until the
    returned event is set.
    """
    enough = threading.Event()
    threading.Thread(target=_renew, args=(Renewal(claim), enough), daemon=True).start()
    return enough


def _renew(renewal: Renewal, enough: threading.Event) -> None:
    with contextlib.suppress(ClaimLostError):
        while not enough.wait(POLL_S):
            renewal.tick()


def try_claim(folder: Path, job: str | None = None, ended_jobs: Collection[str] = ()) -> Claim | Holder:
    """Claim ``folder`` (created if needed), or return its holder.

    Args:
        folder: the stage's work folder.
        job: the batch job that claims, if any; a requeued job succeeds itself.
        ended_jobs: jobs known to have ended: their claims are void, however recently they were renewed.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # removed by a holder that finishes
        generation, holder = _current(folder)
        if holder is not None and (holder.job is None or holder.job not in {job, *ended_jobs}):
            return holder
        claim = Claim(folder, generation + 1, uuid.uuid4().hex[:12])
        file = folder / f"claim.{generation + 1}"
        if _create(file, json.dumps({**asdict(Holder.me(job)), "token": claim.token}, allow_nan=False)):
            return claim


@dataclass(frozen=True)
class OpenClaim:
    """A claim that its holder has not released; if the holder is not alive, it died at work."""

    holder: Holder
    lives: bool


def open_claim(folder: Path) -> OpenClaim | None:
    """The newest claim on ``folder``, without claiming it; None if it was released, or if there is none."""
    return _open_claim(folder, _newest_generation(folder))


def _open_claim(folder: Path, generation: int) -> OpenClaim | None:
    file = folder / f"claim.{generation}"
    record = _read(file)
    holder = as_record(Holder, record)
    return None if holder is None or record.get("released") else OpenClaim(holder, _lives(holder, file))


def _current(folder: Path) -> tuple[int, Holder | None]:
    """The highest generation, and its holder if that process is alive."""
    generation = _newest_generation(folder)
    claim = _open_claim(folder, generation)
    return generation, claim.holder if claim is not None and claim.lives else None


def _read(file: Path) -> dict[str, Any]:
    """Content of a claim; empty if it is gone or damaged.

    Raises:
        OSError: if it can't be read, in which case its holder may well be alive.
    """
    try:
        record = read_json(file)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _newest_generation(folder: Path) -> int:
    """The highest generation; 0 if there is no claim."""
    numbers = [file.suffix[1:] for file in listed(folder, CLAIM_FILES)]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _lives(holder: Holder, file: Path) -> bool:
    running = holder.is_running()
    if running is not None:
        return running
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
    probe = folder / f".clock.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # the folder has just been removed, or nothing can be written
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _create(file: Path, text: str) -> bool:
    """Create ``file`` with its content in one step, so that readers never see a claim without its holder.

    Returns False if another process was faster, or has just removed the folder.
    """
    draft = file.with_name(f".{file.name}.{socket.gethostname()}.{uuid.uuid4().hex}")
    try:
        with naming(file):
            draft.write_text(text, encoding="utf-8")
        os.link(draft, file)
    except FileExistsError:
        return _has_two_names(draft)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # stale on NFS if it was removed while it was written
            raise
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _has_two_names(draft: Path) -> bool:
    """Whether a link that "already exists" is ours: NFS repeats a request whose answer was lost."""
    try:
        return draft.stat().st_nlink > 1
    except FileNotFoundError:
        return False


def _system() -> str | None:
    """Boot and PID namespace, within which a process id and a start time identify one process; None if not on Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _start_on_linux(pid: int) -> str | None:
    """Start of a process in the form of ``Holder.started`` on Linux; None if it isn't running, or on other systems."""
    system = _system()
    try:
        # The name in parentheses may contain anything; state is the first field after it, the start the twentieth.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if system is None or fields[0] in ("Z", "X") else f"{system}/{fields[19]}"


def _is_hidden(pid: int) -> bool:
    """Whether a process is running that ``/proc`` doesn't show, since it may hide processes of other users."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except OSError:
        return False
    return False


def _start_time(pid: int) -> float | None:
    """Start of a process, in unix time; None if it isn't running."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
