"""The ledger of attempts at stages, on this machine and in jobs: small JSON files in a folder of each attempt's own.

<store>/attempts/<kind>/<fingerprint>/<number>/
    intent.json        what is about to be started; written before
    job.sh             what is submitted
    environment.sh     the profile's setup and environment, which it sources and only its owner can read
    job.json           the id that Slurm gave; if a launcher dies before writing it, the job is found by its comment
                       (these three lie with the first stage of a job that runs several)
    run.<id>.<n>.json  the n-th start of the job (it may be requeued): nodes, times of start and end, progress
    exit.<id>.<n>      with what exit code that start ended, as the batch script says unless it was killed
    failure.<rank>.json  why a rank failed, as it says itself
    end.json           how the attempt ended, and why
    *_log.out, *_log.err  output of the batch script, of srun and of the ranks

Files are made by mkdir and rename, which are atomic on local disks, NFS and Lustre alike. A damaged one counts as
absent.
"""

from __future__ import annotations

import os
import re
import time
import traceback
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import listed, read_object, read_record, write_json
from hfprune_dist.store.claims import Claim, ClaimLostError
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.stage import Stage

INTENT, SCRIPT, JOB, END = "intent.json", "job.sh", "job.json", "end.json"
FAILURES = "failure.*.json"
# Error messages of the other ranks of a stage when one of them has died or hangs.
LOST_RANK = re.compile(
    r"closed by peer|connection (reset|refused)|broken pipe|remote process exited|recvvalue failed|gloo.*timeout"
    r"|\bsocket\b(?!, malloc)|timed out waiting|wait timeout|network error|distnetworkerror"
    r"|failed to (recv|send|connect)|seconds waiting for clients|failed to pass monitoredBarrier"
    r"|caught collective operation timeout",
    re.IGNORECASE,
)


class Cause(StrEnum):
    """Why an attempt ended. Some are also causes of failures that ranks report (``UserError.CAUSE``)."""

    DONE = "done"
    """The artifact is there and verified."""
    INTERRUPTED = "interrupted"
    """Nothing is wrong with the stage: its launcher on this machine was interrupted; or its job was preempted once all
    was saved, met the time limit while it got further, or never began the stage (it did not reach Slurm, a job that it
    needs did not succeed, or another process had the stage)."""
    KILLED = "killed"
    """From outside: a node died, or could not run the stage; a rank died without a message, or waited in vain for
    another one; or the job met its time limit and got no further."""
    LOST_INPUT = "lost input"
    """An artifact that the stage reads, or has made, is damaged or gone; it is made again."""
    OUT_OF_MEMORY = "out of memory"
    CANCELLED = "cancelled"
    INPUT = "input"
    """The user can correct it, in the profile or on the disk too."""
    CODE = "code"
    """A mistake in this project."""
    CUT_OFF = "cut off"
    """Nobody recorded the end, and there is a later attempt."""


@dataclass(frozen=True)
class Intent:
    """What is about to be started.

    Attributes:
        number: 1 for the first attempt at the stage.
        created: unix time.
        job_name: unique, so that the job can be found by it, in its comment; empty on this machine.
        leader: <kind>/<fingerprint>/<number> of the attempt at the job's first stage; empty if it is this one.
        time_minutes: time limit of the job.
        needs: ids of the stages without which the job doesn't start.
    """

    stage_id: str
    number: int
    created: float
    job_name: str = ""
    leader: str = ""
    time_minutes: int = 0
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One start of a job, as recorded by its first rank.

    Attributes:
        restart: number of times that the job had been requeued before.
        nodes: in Slurm's notation.
        ended: unix time; None while it runs, or if it was killed.
        how: done, failed, interrupted, cancelled or duplicate.
        progress: the last heartbeat when it started, later when it ended, without times.
    """

    job_id: str
    restart: int
    nodes: str
    started: float
    ended: float | None = None
    how: str | None = None
    progress: dict[str, Any] | None = None


@dataclass(frozen=True)
class End:
    """The end of an attempt, as its launcher found it to be, or of one of its ranks that failed, as that says itself.

    Attributes:
        cause: a ``Cause``.
        message: for the user.
        at: unix time, as far as the stage's heartbeat tells it; a launcher may learn of it days later.
        rank: the rank that failed; -1 for an attempt.
    """

    cause: str
    message: str
    at: float
    rank: int = -1

    @classmethod
    def of_rank(cls, rank: int, error: BaseException) -> End:
        """The end of a rank by an error."""
        if isinstance(error, UserError):
            return cls(error.CAUSE, str(error), time.time(), rank)
        # Torch's error for GPUs has a class of its own, that of its allocator for CPUs none.
        has_name = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        lacks_memory = has_name or re.search("can(no|')t allocate memory|_STATUS_ALLOC_FAILED", str(error))
        message = "".join(traceback.format_exception(error)[-3:]).strip()
        return cls(Cause.OUT_OF_MEMORY if lacks_memory else Cause.CODE, message, time.time(), rank)

    @property
    def is_consequence(self) -> bool:
        """Whether the rank failed only because it waited for another one, which died or hangs."""
        return self.cause == Cause.CODE and LOST_RANK.search(self.message) is not None

    @property
    def order(self) -> tuple[bool, bool, bool, float, int]:
        """Sorts ends of ranks, the best explanation first: bad input explains more than any error of ours, and errors
        that only report the loss of another rank explain least. Time decides only among equals: clocks of hosts differ.
        """
        ours = self.cause == Cause.CODE
        return not self.cause.endswith("input"), ours, self.is_consequence, self.at, self.rank

    @property
    def in_one_line(self) -> str:
        """The last line of a traceback, else the first of the message; a colon there announces a log."""
        lines = self.message.strip().splitlines() or [""]
        return lines[-1 if lines[0].startswith(("Traceback", 'File "')) else 0].strip().removesuffix(":")


class Attempt:
    """One attempt, by its folder."""

    def __init__(self, folder: Path, intent: Intent) -> None:
        self.folder = folder
        self.intent = intent
        self._leader = folder.parents[2] / intent.leader if intent.leader else folder

    @property
    def job_id(self) -> str | None:
        """The job's id, as recorded by the launcher, or by the job itself if the launcher died before that."""
        job = read_object(self._leader / JOB) or {}
        runs = (run for folder in (self._leader, self.folder) for run in _runs(folder))
        return job.get("job_id") or next((run.job_id for run in runs), None)

    @property
    def end(self) -> End | None:
        return read_record(End, self.folder / END)

    def record_job(self, job_id: str) -> None:
        write_json(self._leader / JOB, {"job_id": job_id})

    def close(self, end: End) -> None:
        """Record the end; if two launchers see the same end, both write the same."""
        write_json(self.folder / END, asdict(end))

    def failures(self) -> list[End]:
        """Why its ranks failed at the last start, as far as they could say so, the best explanation first."""
        found = (read_record(End, file) for file in listed(self.folder, FAILURES))
        return sorted((end for end in found if end is not None), key=lambda end: end.order)

    def runs(self) -> list[Run]:
        """Return all starts of the job, in order: by their numbers, as each node has its own clock.

        If there are two jobs (a submission whose answer was lost), the one that started first comes first.
        """
        runs = _runs(self.folder)
        began = {run.job_id: run.started for run in sorted(runs, key=lambda run: -run.started)}
        return sorted(runs, key=lambda run: (began[run.job_id], run.job_id, run.restart))

    def record_run(self, run: Run) -> None:
        write_json(self.folder / f"run.{run.job_id}.{run.restart}.json", asdict(run))

    def exit_record(self) -> tuple[int, str] | None:
        """Return what the batch script recorded at the end of the job's last start: srun's exit code, or that of what
        failed before srun, and then what that was; None if the start was killed, or goes on.
        """
        files = listed(self.folder, f"exit.{self.job_id}.*")
        numbers = {int(file.suffix[1:]): file for file in files if file.suffix[1:].isdecimal()}
        last, runs = max(numbers, default=-1), self.runs()
        if last < 0 or (runs and runs[-1].restart > last):
            return None
        code, _, message = numbers[last].read_text(encoding="utf-8", errors="replace").strip().partition(" ")
        return (int(code), message) if code.isdecimal() else None

    def logs(self) -> list[Path]:
        """Return the log files of a job's ranks, and of its batch script and srun."""
        return sorted([*listed(self.folder, "*_log.out"), *listed(self.folder, "*_log.err")])


class Ledger:
    """All attempts of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._root = store.root / "attempts"
        self.mark = digest_of(str(store.root.resolve()))[:6]  # in the names of its jobs, between dashes

    def attempts_at(self, stage_id: str) -> list[Attempt]:
        """Return the attempts at a stage, first to last, without those whose intents are missing."""
        intents = ((path, read_record(Intent, path / INTENT)) for _, path in sorted(_numbered(self._root / stage_id)))
        return [Attempt(path, intent) for path, intent in intents if intent is not None]

    def jobs_of(self, stage_id: str) -> list[Attempt]:
        """Return the attempts at a stage that were made in jobs, first to last."""
        return [attempt for attempt in self.attempts_at(stage_id) if attempt.intent.job_name]

    def open_job(self, stage_id: str) -> Attempt | None:
        """Return the newest attempt in a job if it has no end yet; the job may be waiting, running or over."""
        newest = next(reversed(self.jobs_of(stage_id)), None)
        return newest if newest is not None and newest.end is None else None

    def open_jobs(self) -> list[Attempt]:
        """Return all attempts of the store in jobs that have no end, whichever sweep made them."""
        stages = (folder for kind in listed(self._root, "*") for folder in listed(kind, "*"))
        attempts = (attempt for folder in stages for attempt in self.jobs_of(str(folder.relative_to(self._root))))
        return [attempt for attempt in attempts if attempt.end is None]

    def begin(
        self,
        stage: Stage,
        claim: Claim,
        *,
        time_minutes: int = 0,
        leader: Attempt | None = None,
        needs: Iterable[str] = (),
    ) -> Attempt:
        """Record the next attempt under the stage's claim; raises ClaimLostError. An attempt in a job has a time limit,
        the ids of the stages without which the job doesn't start and, if it isn't the job's first, the ``leader`` that
        is.
        """
        folder = self._root / stage.id
        number = 1 + max((number for number, _ in _numbered(folder)), default=0)
        name, first = "", ""
        if leader is not None:
            name, first = leader.intent.job_name, str(leader.folder.relative_to(self._root))
        elif time_minutes:
            name = f"hfprune-{stage.kind}-{stage.fingerprint[:8]}-{number}-{self.mark}-{uuid.uuid4().hex[:8]}"
        intent = Intent(stage.id, number, time.time(), name, first, time_minutes, tuple(needs))
        attempt = Attempt(folder / str(number), intent)
        folder.mkdir(parents=True, exist_ok=True)
        claim.require_held()
        try:
            attempt.folder.mkdir()
        except FileExistsError:
            raise ClaimLostError(f"{attempt.folder}: another process has begun this attempt") from None
        write_json(attempt.folder / INTENT, asdict(intent))
        return attempt

    def last_end(self, stage_id: str) -> End | None:
        """Return how the last attempt at a stage ended, or what its ranks say while that is not recorded."""
        attempts = self.attempts_at(stage_id)
        return (attempts[-1].end or next(iter(attempts[-1].failures()), None)) if attempts else None

    def failure(self, stage_id: str) -> End | None:
        """Return why the last attempt at a stage failed; None if it has not failed."""
        end = self.last_end(stage_id)
        return None if end is None or end.cause in (Cause.DONE, Cause.INTERRUPTED) else end

    def ends(self, stage_id: str) -> list[tuple[Attempt, End | None]]:
        """Return the attempts at a stage, first to last, each with its end, also if nobody was there to record it; None
        if the last one has none: it is queued, is running, or was cut off.
        """
        attempts, manifest = self.attempts_at(stage_id), self.store.handle(stage_id).manifest() or {}
        ends = [attempt.end for attempt in attempts]
        for number, attempt in enumerate(attempts):
            if ends[number] is None and manifest.get("attempts") == attempt.intent.number:
                ends[number] = End(Cause.DONE, "", manifest["finished"])
            elif ends[number] is None and attempt is not attempts[-1]:
                ends[number] = End(
                    Cause.CUT_OFF, "at the latest then; see its log", attempts[number + 1].intent.created
                )
        return list(zip(attempts, ends, strict=True))

    def close_done(self, stage_id: str) -> None:
        """Record the end of an attempt that no launcher saw make its artifact, which has been verified."""
        if (attempt := self.open_job(stage_id)) is not None:
            manifest = self.store.handle(stage_id).manifest() or {}
            attempt.close(End(Cause.DONE, "", manifest.get("finished", time.time())))


def report_failure(folder: Path, end: End) -> None:
    """Record why a rank failed, in the folder of its attempt."""
    write_json(folder / f"failure.{end.rank}.json", asdict(end))


def local_log(folder: Path, intent: Intent) -> Path:
    """Return the log of an attempt on this machine, in the folder of a sweep's logs."""
    return folder / f"{intent.stage_id.replace('/', '-')}.{intent.number}.log"


def end_of_log(log: Path, most: int) -> str:
    """Return the last ``most`` bytes of a log, whose first line may be cut off; empty if there is no log (any more)."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - most))
            return stream.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _runs(folder: Path) -> list[Run]:
    return [run for file in listed(folder, "run.*.json") if (run := read_record(Run, file)) is not None]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return number and path of each attempt in a stage's folder; stray files have other names."""
    return [(int(path.name), path) for path in listed(folder, "*") if re.fullmatch("[1-9][0-9]*", path.name)]
