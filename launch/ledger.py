"""The ledger: every attempt to run a stage as a job, written ahead of the submission and closed with a cause.

<store>/attempts/<kind>/<fingerprint>/<number>/
    intent.json        what is about to be submitted, under which job name: written before sbatch
    stage.pkl, job.sh  what is submitted
    job.json           the id that Slurm gave; a launcher that dies before it leaves a job to be found by its name
    run.<id>.<n>.json  the n-th start of the job (it may be requeued): where, from when to when, how far
    end.json           how the attempt ended, and why
    *_log.out, *.err   output of the ranks

Plain files made by mkdir and rename, which are atomic on local disks, NFS and Lustre alike.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hfprune_dist.files import read_json, write_json
from hfprune_dist.plan import Stage
from hfprune_dist.progress import Heartbeat

INTENT = "intent.json"
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
        lane: jobs in one lane run one after the other (``--max-running``); None without a limit.
        cluster, user: whose job it is. Empty in records of earlier versions.
    """

    stage_id: str
    number: int
    job_name: str
    created: float
    gpus: int
    cores: int
    time_minutes: int
    lane: int | None = None
    cluster: str = ""
    user: str = ""


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
        cause: done, or one of ``launch.causes``.
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


class Attempt:
    """One attempt's folder."""

    def __init__(self, folder: Path, intent: Intent) -> None:
        self.folder = folder
        self.intent = intent

    @property
    def job_id(self) -> str | None:
        """The job's id: as recorded by the launcher, or by the job itself where the launcher died before."""
        record = read_json(self.folder / JOB)
        if record is not None:
            return str(record["job_id"])
        return next((run.job_id for run in self.runs()), None)

    @property
    def end(self) -> End | None:
        record = read_json(self.folder / END)
        return None if record is None else End(**record)

    def record_job(self, job_id: str) -> None:
        write_json(self.folder / JOB, {"job_id": job_id, "at": time.time()})

    def close(self, end: End) -> None:
        """Record the end; where two launchers see the same end, both write the same."""
        write_json(self.folder / END, asdict(end))

    def runs(self) -> list[Run]:
        """All starts of the job, in order."""
        records = [read_json(file) for file in self.folder.glob("run.*.json")]
        return sorted((Run(**record) for record in records if record), key=lambda run: run.started)

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

    def attempts(self, stage_id: str) -> list[Attempt]:
        """Attempts at a stage, first to last; a folder without an intent is one that came to nothing."""
        return list(self._read(self._root / stage_id))

    def last(self, stage_id: str) -> Attempt | None:
        return next(self._read(self._root / stage_id, newest_first=True), None)

    def attempt_at(self, folder: Path) -> Attempt:
        """The attempt in a folder of this ledger."""
        return Attempt(folder, Intent(**read_json(folder / INTENT)))

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
        lane: int | None,
        *,
        cluster: str = "",
        user: str = "",
    ) -> Attempt:
        """Write down the next attempt; the caller holds the stage's claim."""
        folder = self._root / stage.id
        folder.mkdir(parents=True, exist_ok=True)
        last = self.last(stage.id)
        if last is not None and last.end is not None and last.end.cause in (QUEUE_FULL, NEED_ENDED):
            return self._reopen(last, lane, cluster, user)
        number = 1 + max((int(path.name) for path in folder.iterdir()), default=0)
        name = f"hfprune-{stage.kind}-{stage.fingerprint[:8]}-{number}-{uuid.uuid4().hex[:8]}"
        attempt = Attempt(
            folder / str(number),
            Intent(stage.id, number, name, time.time(), gpus, cores, time_minutes, lane, cluster, user),
        )
        attempt.folder.mkdir()
        write_json(attempt.folder / INTENT, asdict(attempt.intent))
        return attempt

    def _reopen(self, attempt: Attempt, lane: int | None, cluster: str, user: str) -> Attempt:
        intent = replace(attempt.intent, created=time.time(), lane=lane, cluster=cluster, user=user)
        again = Attempt(attempt.folder, intent)
        write_json(again.folder / INTENT, asdict(again.intent))
        (again.folder / END).unlink()
        return again

    def _read(self, folder: Path, newest_first: bool = False) -> Iterator[Attempt]:
        if not folder.is_dir():
            return
        for path in sorted(folder.iterdir(), key=lambda path: int(path.name), reverse=newest_first):
            record = read_json(path / INTENT)
            if record is not None:
                yield Attempt(path, Intent(**record))


def fruitless_starts(progress: Sequence[dict[str, Any] | None]) -> int:
    """How many starts in a row, up to the last one, got no further than those before them.

    Args:
        progress: the last heartbeats of all starts, oldest first; None where a start came to no heartbeat.
    """
    count = 0
    furthest: dict[str, int] = {}
    previous: dict[str, Any] | None = None
    for last in progress:
        count = 0 if last is not None and _got_further(last, previous, furthest) else count + 1
        if last is not None:
            furthest[last["phase"]] = max(last["done"], furthest.get(last["phase"], 0))
            previous = last
    return count


def _got_further(last: dict[str, Any], previous: dict[str, Any] | None, furthest: Mapping[str, int]) -> bool:
    """Within a phase, further than the previous start, for work may have begun anew; else further than ever there."""
    if previous is None:
        return bool(last["done"] > 0)
    if previous["phase"] == last["phase"]:
        return bool(last["done"] > previous["done"])
    return bool(last["done"] > furthest.get(last["phase"], -1))


def as_progress(heartbeat: Heartbeat | None) -> dict[str, Any] | None:
    return None if heartbeat is None else asdict(heartbeat)
