"""Attempts to run stages as jobs, each recorded before its submission and closed with a cause.

Plain files made by mkdir and rename, which are atomic on local disks, NFS and Lustre alike; ``attempt_records`` lists
them.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfprune_launch.slurm.attempt_records import (
    END,
    INTENT,
    JOB,
    End,
    ExitRecord,
    Intent,
    Job,
    Run,
    job_name_of,
    read_attempt_record,
    read_script,
)
from hfprune_launch.slurm.causes import Cause

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import listed, locked, modified_at, write_json
from hfprune_dist.store.stage import Stage

LOCK = ".lock"


class JobAttempt:
    """One attempt's folder."""

    def __init__(self, folder: Path, intent: Intent) -> None:
        self.folder = folder
        self.intent = intent

    @property
    def job_id(self) -> str | None:
        """The job's id, as recorded by the launcher, or by the job itself if the launcher died before that."""
        job = read_attempt_record(self.folder / JOB, Job)
        return job.job_id if job is not None else next((run.job_id for run in self.runs()), None)

    @property
    def recorded_at(self) -> float:
        """Unix time at which the intent was written, by the file system's clock if it has one (NFS has, on Lustre it is
        the writer's), since each launcher has its own; by the launcher's if the record is lost.
        """
        written = modified_at(self.folder / INTENT)
        return self.intent.created if written is None else written

    @property
    def end(self) -> End | None:
        return read_attempt_record(self.folder / END, End)

    def record_job(self, job_id: str) -> None:
        write_json(self.folder / JOB, asdict(Job(job_id, time.time())))

    def close(self, end: End) -> None:
        """Record the end; if two launchers see the same end, both write the same."""
        write_json(self.folder / END, asdict(end))

    def runs(self) -> list[Run]:
        """Return all starts of the job, in order: by their numbers, as each node has its own clock.

        If there are two jobs (a submission whose answer was lost), the one that started first comes first.
        """
        read = [read_attempt_record(file, Run) for file in listed(self.folder, "run.*.json")]
        jobs: dict[str, list[Run]] = {}
        for run in sorted((it for it in read if it is not None), key=lambda run: run.started):
            jobs.setdefault(run.job_id, []).append(run)
        return [run for runs in jobs.values() for run in sorted(runs, key=lambda run: run.restart)]

    def record_run(self, run: Run) -> None:
        write_json(self.folder / f"run.{run.job_id}.{run.restart}.json", asdict(run))

    def exit_record(self) -> ExitRecord | None:
        """Return what the batch script recorded at the end of the job's last start; None if it was killed."""
        found = [_read_exit(file) for file in listed(self.folder, f"exit.{self.job_id}.*")]
        last = max((it for it in found if it is not None), default=None)
        runs = self.runs()
        return None if last is None or (runs and runs[-1].restart > last.restart) else last

    def run_seconds(self, now: float) -> float:
        """Return the seconds during which the job held its nodes, over all of its starts."""
        return sum(max(0.0, (run.ended or now) - run.started) for run in self.runs())

    def earlier_progress(self) -> list[dict[str, Any] | None]:
        """Return how far each ended start of the stage's jobs got, oldest first, including those of this attempt.

        It begins after the last attempt that made the artifact: if that was lost, the work started over.
        """
        number = self.intent.number
        before = [JobAttempt(self.folder.with_name(str(n)), self.intent) for n in range(1, number)]
        ends = [attempt.end for attempt in before]
        first = max((n for n, end in enumerate(ends, 1) if end is not None and end.cause == Cause.DONE), default=0)
        return [progress for attempt in [*before[first:], self] for progress in attempt._progress()]

    def _progress(self) -> list[dict[str, Any] | None]:
        runs, end = self.runs(), self.end
        progress = [run.progress for run in runs if run.ended is not None]
        # A start that was killed could not record how far it got; the launcher did so when it closed the attempt.
        return [*progress, end.progress] if end is not None and runs and runs[-1].ended is None else progress

    def logs(self) -> list[Path]:
        """Return the log files of the ranks, and of the batch script and srun."""
        return sorted([*listed(self.folder, "*_log.out"), *listed(self.folder, "*_log.err")])


def with_job_ids(attempts: Iterable[JobAttempt]) -> list[tuple[str, JobAttempt]]:
    """Return attempts whose jobs have recorded ids, each after its job's id."""
    return [(job_id, attempt) for attempt in attempts if (job_id := attempt.job_id) is not None]


class Attempts:
    """All attempts of a store."""

    def __init__(self, store_root: Path) -> None:
        self._root = store_root / "attempts"

    @property
    def is_empty(self) -> bool:
        """Whether no job has been submitted for this store."""
        return not self._root.is_dir()

    def locked(self) -> AbstractContextManager[None]:
        """Keep other launchers that do the same from submitting; what they submit has to be read after this."""
        self._root.mkdir(parents=True, exist_ok=True)
        return locked(self._root / LOCK)

    def of(self, stage_id: str) -> list[JobAttempt]:
        """Return the attempts at a stage, first to last, without those whose intents are missing."""
        return list(self._iterate(stage_id))

    def last(self, stage_id: str) -> JobAttempt | None:
        return next(self._iterate(stage_id, newest_first=True), None)

    def attempt_at(self, folder: Path) -> JobAttempt:
        """Return the attempt in a folder of the store.

        Raises:
            UserError: if its intent is lost.
        """
        intent = read_attempt_record(folder / INTENT, Intent)
        if intent is None:
            raise UserError(f"{folder}: no record of an attempt; jobs are submitted by a sweep")
        return JobAttempt(folder, intent)

    def open_attempts(self) -> list[JobAttempt]:
        """Return all attempts of the store that have no end, whichever sweep made them."""
        stages = (folder for kind in listed(self._root, "*") for folder in listed(kind, "*"))
        ids = (str(folder.relative_to(self._root)) for folder in stages)
        return [attempt for stage_id in ids for attempt in self.of(stage_id) if attempt.end is None]

    def ended_jobs(self, stage_id: str) -> set[str]:
        """Return the jobs of a stage that are over, according to Slurm or because they are gone; their claims are void.

        Ids that an open attempt has as well are left out: a cluster that was set up anew reuses ids.
        """
        attempts = [(attempt.job_id, attempt.end) for attempt in self.of(stage_id)]
        over = {job_id for job_id, end in attempts if job_id is not None and end is not None and end.state}
        return over - {job_id for job_id, end in attempts if job_id is not None and end is None}

    def begin(
        self,
        stage: Stage,
        gpus: int,
        cores: int,
        time_minutes: int,
        slot: int | None,
        *,
        ranks: int = 1,
    ) -> JobAttempt:
        """Record the next attempt; the caller must hold the stage's claim."""
        folder = self._root / stage.id
        folder.mkdir(parents=True, exist_ok=True)
        number, name = self._next(stage.id)
        attempt = JobAttempt(
            folder / str(number),
            Intent(stage.id, number, name, time.time(), gpus, cores, time_minutes, slot, ranks),
        )
        attempt.folder.mkdir(exist_ok=True)
        write_json(attempt.folder / INTENT, asdict(attempt.intent))
        (attempt.folder / END).unlink(missing_ok=True)
        return attempt

    def _next(self, stage_id: str) -> tuple[int, str]:
        """Return number and job name of the next attempt: those of the last one if its job was not accepted."""
        last = self.last(stage_id)
        if last is not None and last.end is not None and last.end.cause == Cause.NOT_ACCEPTED:
            return last.intent.number, last.intent.job_name
        number = 1 + max((number for number, _ in _numbered(self._root / stage_id)), default=0)
        return number, job_name_of(stage_id, number) + uuid.uuid4().hex[:8]

    def _iterate(self, stage_id: str, newest_first: bool = False) -> Iterator[JobAttempt]:
        for _, path in sorted(_numbered(self._root / stage_id), reverse=newest_first):
            intent = read_attempt_record(path / INTENT, Intent)
            if intent is not None:
                yield JobAttempt(path, intent)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return number and path of each attempt in a stage's folder; stray files have other names."""
    return [(int(path.name), path) for path in listed(folder, "*") if re.fullmatch("[1-9][0-9]*", path.name)]


def _read_exit(file: Path) -> ExitRecord | None:
    code, _, message = read_script(file).strip().partition(" ")
    number = file.suffix[1:]
    return ExitRecord(int(number), int(code), message) if number.isdecimal() and code.isdecimal() else None
