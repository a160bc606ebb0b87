"""The ledger: every attempt to run a stage as a job, written ahead of the submission and closed with a cause.

<store>/attempts/<kind>/<fingerprint>/<number>/
    intent.json        what is about to be submitted, under which job name: written before sbatch
    stage.pkl, job.sh  what is submitted
    job.json           the id that Slurm gave; a launcher that dies before it leaves a job to be found by its name
    run.<id>.<n>.json  the n-th start of the job (it may be requeued): where, from when to when, how far
    end.json           how the attempt ended, and why
    *_log.out, *.err   output of the ranks

Plain files made by mkdir and rename, which are atomic on local disks, NFS and Lustre alike. A record that is damaged
(emptied, cut) counts as absent; but where a job may have been submitted, it is still known by its id or name.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.stage import Stage

Record = TypeVar("Record")

INTENT = "intent.json"
SCRIPT = "job.sh"
JOB = "job.json"
END = "end.json"
# Causes of an attempt that came to nothing before Slurm took its job; its folder serves for the next try.
QUEUE_FULL = "submit limit"  # the user had too many jobs
NEED_ENDED = "need ended"  # a job that it was to wait for had ended meanwhile
# In place of a state of Slurm's: the job is over, for Slurm has known none for long and nothing shows that it lives.
GONE = "GONE"


@dataclass(frozen=True)
class Intent:
    """What an attempt is going to submit.

    Attributes:
        number: 1 for the first attempt at the stage.
        job_name: unique, so that the job can be found by it.
        created: unix time.
        gpus, cores: of the whole job.
        time_minutes: time limit of the job.
        slot: jobs in one slot run one after the other (``--max-running``); None without a limit.
        cluster, user: whose job it is. Empty in records of earlier versions.
    """

    stage_id: str
    number: int
    job_name: str
    created: float
    gpus: int
    cores: int
    time_minutes: int
    slot: int | None = None
    cluster: str = ""
    user: str = ""


@dataclass(frozen=True)
class _Job:
    """The job that Slurm made of an intent; its name is here a second time, for where the intent is damaged."""

    job_id: str
    at: float
    job_name: str | None = None


@dataclass(frozen=True)
class Run:
    """One start of a job, as its first rank tells it.

    Attributes:
        restart: how often the job had been requeued before.
        nodes: in Slurm's notation.
        ended: unix time; None while it runs, or where it died and no later start has noticed.
        how: done, failed, interrupted, duplicate or died.
        progress: the last heartbeat when it ended.
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
    """How an attempt ended.

    Attributes:
        cause: done, or one of ``hfprune_launch.slurm.exit_causes``.
        message: for the user.
        state: the job's last state in Slurm, or GONE. Empty where nobody has said that the job is over.
        bad_nodes: nodes that the next attempt should avoid.
    """

    cause: str
    message: str
    at: float
    state: str = ""
    nodes: str = ""
    bad_nodes: list[str] = field(default_factory=list)
    log_tail: str = ""
    run_seconds: float = 0.0
    gpu_seconds: float = 0.0
    progress: dict[str, Any] | None = None


_ADAPTERS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Intent, _Job, Run, End)}


class Attempt:
    """One attempt's folder."""

    def __init__(self, folder: Path, intent: Intent) -> None:
        self.folder = folder
        self.intent = intent

    @property
    def job_id(self) -> str | None:
        """The job's id: as recorded by the launcher, or by the job itself where the launcher died before."""
        job = _read(self.folder / JOB, _Job)
        return job.job_id if job is not None else next((run.job_id for run in self.runs()), None)

    @property
    def end(self) -> End | None:
        return _read(self.folder / END, End)

    def record_job(self, job_id: str) -> None:
        write_json(self.folder / JOB, asdict(_Job(job_id, time.time(), self.intent.job_name)))

    def close(self, end: End) -> None:
        """Record the end; where two launchers see the same end, both write the same."""
        write_json(self.folder / END, asdict(end))

    def runs(self) -> list[Run]:
        """All starts of the job, in order."""
        runs = [_read(file, Run) for file in self.folder.glob("run.*.json")]
        return sorted((run for run in runs if run is not None), key=lambda run: run.started)

    def record_run(self, run: Run) -> None:
        write_json(self.folder / f"run.{run.job_id}.{run.restart}.json", asdict(run))

    def run_seconds(self, now: float) -> float:
        """Time during which the job held its nodes, over all of its starts."""
        return sum(max(0.0, (run.ended or now) - run.started) for run in self.runs())

    def earlier_progress(self) -> list[dict[str, Any] | None]:
        """How far each start of the stage's jobs got that has ended, oldest first, this attempt's included.

        Begins after the last attempt that made the artifact: where that was lost, work began anew.
        """
        number = self.intent.number
        before = [Attempt(self.folder.with_name(str(n)), self.intent) for n in range(1, number)]
        ends = [attempt.end for attempt in before]
        first = max((n for n, end in enumerate(ends, 1) if end is not None and end.cause == "done"), default=0)
        return [progress for attempt in [*before[first:], self] for progress in attempt._progress()]

    def _progress(self) -> list[dict[str, Any] | None]:
        runs, end = self.runs(), self.end
        progress = [run.progress for run in runs if run.ended is not None]
        # A start that was killed could not say how far it got; the launcher did, when it closed the attempt.
        return [*progress, end.progress] if end is not None and runs and runs[-1].ended is None else progress

    def logs(self) -> list[Path]:
        """Output of the ranks, and of the batch script and srun."""
        return sorted([*self.folder.glob("*_log.out"), *self.folder.glob("*_log.err")])


class Ledger:
    """All attempts of a store."""

    def __init__(self, store_root: Path) -> None:
        self._root = store_root / "attempts"

    @property
    def is_empty(self) -> bool:
        """Whether nobody has submitted a job for this store."""
        return not self._root.is_dir()

    def attempts(self, stage_id: str) -> list[Attempt]:
        """Attempts at a stage, first to last; a folder from which nothing can have been submitted is left out."""
        return list(self._attempts(stage_id))

    def last(self, stage_id: str) -> Attempt | None:
        return next(self._attempts(stage_id, newest_first=True), None)

    def attempt_at(self, folder: Path) -> Attempt:
        """The attempt in a folder of this ledger.

        Raises:
            UserError: where nothing of it is left.
        """
        intent = _read_intent(folder)
        if intent is None:
            raise UserError(f"{folder}: no record of an attempt; jobs are submitted by launch/sweep.py")
        return Attempt(folder, intent)

    def open_attempts(self) -> list[Attempt]:
        """All attempts of the store that have no end, whichever sweep made them."""
        stages = sorted(folder.relative_to(self._root) for folder in self._root.glob("*/*"))
        return [attempt for stage in stages for attempt in self.attempts(str(stage)) if attempt.end is None]

    def ended_jobs(self, stage_id: str) -> set[str]:
        """Jobs of a stage that are over, by Slurm's word or because they are gone: what they claim is free.

        Not those whose id an open attempt has as well: another cluster, or one that was set up anew, gives ids again.
        """
        attempts = [(attempt.job_id, attempt.end) for attempt in self.attempts(stage_id)]
        over = {job_id for job_id, end in attempts if job_id is not None and end is not None and end.state}
        return over - {job_id for job_id, end in attempts if job_id is not None and end is None}

    def open_attempt(
        self,
        stage: Stage,
        gpus: int,
        cores: int,
        time_minutes: int,
        slot: int | None,
        *,
        cluster: str = "",
        user: str = "",
    ) -> Attempt:
        """Write down the next attempt; the caller holds the stage's claim."""
        folder = self._root / stage.id
        folder.mkdir(parents=True, exist_ok=True)
        last = self.last(stage.id)
        if last is not None and last.end is not None and last.end.cause in (QUEUE_FULL, NEED_ENDED):
            return self._reopen(last, slot, cluster, user)
        number = 1 + max((number for number, _ in _numbered(folder)), default=0)
        name = _job_name(stage.id, number) + uuid.uuid4().hex[:8]
        attempt = Attempt(
            folder / str(number),
            Intent(stage.id, number, name, time.time(), gpus, cores, time_minutes, slot, cluster, user),
        )
        attempt.folder.mkdir()
        write_json(attempt.folder / INTENT, asdict(attempt.intent))
        return attempt

    def _reopen(self, attempt: Attempt, slot: int | None, cluster: str, user: str) -> Attempt:
        intent = replace(attempt.intent, created=time.time(), slot=slot, cluster=cluster, user=user)
        again = Attempt(attempt.folder, intent)
        write_json(again.folder / INTENT, asdict(again.intent))
        (again.folder / END).unlink()
        return again

    def _attempts(self, stage_id: str, newest_first: bool = False) -> Iterator[Attempt]:
        folder = self._root / stage_id
        for _, path in sorted(_numbered(folder), reverse=newest_first) if folder.is_dir() else []:
            intent = _read_intent(path)
            if intent is not None:
                yield Attempt(path, intent)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """What attempts may have left in a stage's folder, and its number; stray files have other names."""
    return [(int(path.name), path) for path in folder.iterdir() if re.fullmatch("[1-9][0-9]*", path.name)]


def _read(file: Path, kind: type[Record]) -> Record | None:
    """A record; None where there is none, or where it is damaged. Keys of later versions are passed over.

    Raises:
        OSError: where the file system does not answer, which says nothing about the record.
    """
    try:
        record: Record = _ADAPTERS[kind].validate_python(read_json(file))
    except (ValueError, IsADirectoryError, NotADirectoryError):
        return None
    return record


def _read_intent(folder: Path) -> Intent | None:
    """What was about to be submitted from a folder; None where nothing can have been."""
    return _read(folder / INTENT, Intent) or (_recover_intent(folder) if folder.is_dir() else None)


def _recover_intent(folder: Path) -> Intent | None:
    """What the other files tell of an intent that is lost: its job may be running all the same.

    The batch script is written after the intent and before the submission: without it there is no job.
    """
    job, script = _read(folder / JOB, _Job), _read_script(folder / SCRIPT)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script, re.MULTILINE))
    if job is None and not script and not list(folder.glob("run.*.json")):
        return None
    stage_id, number = "/".join(folder.parts[-3:-1]), int(folder.name)
    name = (job.job_name if job is not None else None) or options.get("job-name")
    return Intent(
        stage_id=stage_id,
        number=number,
        job_name=name or _job_name(stage_id, number),
        created=min(file.stat().st_mtime for file in folder.iterdir()),
        gpus=0,
        cores=0,
        time_minutes=int(options.get("time", "0")),
    )


def _job_name(stage_id: str, number: int) -> str:
    """What the names of an attempt's jobs begin with; the rest makes them unique."""
    kind, fingerprint = stage_id.split("/")
    return f"hfprune-{kind}-{fingerprint[:8]}-{number}-"


def _read_script(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def fruitless_starts(progress: Sequence[dict[str, Any] | None]) -> int:
    """How many starts, since one that got further than all before it, fell back or got no further.

    Where work has begun anew, a start that gets further than the previous one doesn't count as fruitless, nor does it
    make up for those that were: starts that go to and fro come to an end.

    Args:
        progress: the last heartbeats of all starts, oldest first; None where a start came to no heartbeat.
    """
    count = 0
    furthest: dict[str, int] = {}
    previous: dict[str, Any] | None = None
    for last in progress:
        if last is not None and last["done"] > furthest.get(last["phase"], -1 if furthest else 0):
            count = 0
        elif last is None or not _goes_on(last, previous):
            count += 1
        if last is not None:
            furthest[last["phase"]] = max(last["done"], furthest.get(last["phase"], 0))
            previous = last
    return count


def _goes_on(last: dict[str, Any], previous: dict[str, Any] | None) -> bool:
    """Whether a start got further in the phase in which the previous one ended."""
    return previous is not None and previous["phase"] == last["phase"] and bool(last["done"] > previous["done"])


def as_progress(heartbeat: Heartbeat | None) -> dict[str, Any] | None:
    return None if heartbeat is None else asdict(heartbeat)
