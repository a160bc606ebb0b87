"""Records of an attempt to run a stage as a job: small JSON files in its folder, each replaced as a whole.

<store>/attempts/<kind>/<fingerprint>/<number>/
    intent.json        what is about to be submitted, and its job name; written before sbatch
    job.sh             what is submitted
    environment.sh     the profile's setup and environment, which it sources and only its owner can read
    job.json           the id that Slurm gave; if a launcher dies before writing it, the job is found by its name
    run.<id>.<n>.json  the n-th start of the job (it may be requeued): nodes, times of start and end, progress
    exit.<id>.<n>      with what exit code that start ended, as the batch script says unless it was killed
    end.json           how the attempt ended, and why
    *_log.out, *.err   output of the ranks

A damaged record counts as absent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hfprune_dist.store.atomic_files import as_record, read_json

Record = TypeVar("Record")

INTENT = "intent.json"
SCRIPT = "job.sh"
JOB = "job.json"
END = "end.json"
# Instead of a state of Slurm's: the job is over, as Slurm has long known no such job and it shows no sign of life.
GONE = "GONE"


@dataclass(frozen=True)
class Intent:
    """The job that an attempt is about to submit.

    Attributes:
        number: 1 for the first attempt at the stage.
        job_name: unique, so that the job can be found by its name.
        created: unix time.
        gpus, cores: totals of the whole job.
        time_minutes: time limit of the job.
        slot: jobs in the same slot run one at a time (``--max-running``); None without a limit.
        ranks: of the whole job. Some GPUs may have no rank.
    """

    stage_id: str
    number: int
    job_name: str
    created: float
    gpus: int
    cores: int
    time_minutes: int
    slot: int | None = None
    ranks: int = 1


@dataclass(frozen=True)
class Job:
    """The job that Slurm made from an intent."""

    job_id: str
    at: float


@dataclass(frozen=True)
class Run:
    """One start of a job, as recorded by its first rank.

    Attributes:
        restart: number of times that the job had been requeued before.
        nodes: in Slurm's notation.
        ended: unix time; None while it runs, or if it died and no later start has noticed.
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


class ExitRecord(NamedTuple):
    """What the batch script recorded at the end of one start of its job.

    Attributes:
        restart: as of ``Run``.
        code: the exit code: srun's, or that of what failed before srun.
        message: what failed before srun; empty otherwise.
    """

    restart: int
    code: int
    message: str


@dataclass(frozen=True)
class End:
    """The end of an attempt.

    Attributes:
        cause: a ``Cause``.
        message: for the user.
        at: unix time, as far as Slurm or the stage's heartbeat tells it; a launcher may learn of it days later.
        state: the job's last state in Slurm, or GONE; empty if nothing has confirmed that the job is over.
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


def read_attempt_record(file: Path, kind: type[Record]) -> Record | None:
    """Read a record; None if there is none or it is damaged.

    Raises:
        OSError: if the file system does not answer, which says nothing about the record.
    """
    try:
        return as_record(kind, read_json(file))
    except (ValueError, IsADirectoryError, NotADirectoryError):
        return None


def job_name_of(stage_id: str, number: int) -> str:
    """Return the beginning of the names of an attempt's jobs; the rest makes them unique."""
    kind, fingerprint = stage_id.split("/")
    return f"hfprune-{kind}-{fingerprint[:8]}-{number}-"


def read_script(file: Path) -> str:
    """Return a batch script; empty if there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
