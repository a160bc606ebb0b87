"""Slurm's commands: sbatch, squeue, sacct and scancel, with patience for a controller that is busy or restarting.

Job states come from one squeue call for all jobs of the user. It also knows jobs that ended a few minutes ago
(MinJobAge); sacct is asked about older ones, where there is accounting.
"""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.errors import UserError

COMMAND_TIMEOUT_S = 90.0
RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
TRANSIENT = re.compile(
    r"timed out|unable to contact slurm controller|temporarily|zero bytes|connection (refused|reset|failure)"
    r"|communication|controller .*not responding|slurmctld.*(down|restart)|try again|backup|shutdown",
    re.IGNORECASE,
)
NO_CONFIGURATION = re.compile("could not establish a configuration source|unable to process configuration", re.I)
# Slurm names the limit that a job goes beyond, before a sentence that is the same for all of them.
NAMED_LIMIT = re.compile(r"\b(?:QOS|Assoc)\w*Limit\b", re.IGNORECASE)
TOO_MANY_JOBS = re.compile(r"MaxSubmit|SubmitJob|job count limit|job submit limit", re.IGNORECASE)
LIVE_STATES = frozenset(
    {
        *(
            "PENDING",
            "CONFIGURING",
            "RUNNING",
            "COMPLETING",
            "SUSPENDED",
            "STOPPED",
            "RESIZING",
            "SIGNALING",
            "STAGE_OUT",
        ),
        *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
    }
)
SQUEUE_FIELDS = "%i|%T|%r|%N|%S|%e|%j"


class SlurmUnavailableError(Exception):
    """Slurm did not answer, in spite of retries; nothing is known about any job."""


class SubmitLimitError(Exception):
    """The user has as many jobs as the cluster allows; some have to end first."""


class SubmissionRefusedError(UserError):
    """Slurm refuses a job as it was asked for."""


@dataclass(frozen=True)
class JobInfo:
    """What Slurm says about a job.

    Attributes:
        state: as squeue names it, e.g. RUNNING or NODE_FAIL.
        reason: why it waits or ended; "None" where there is no reason.
        nodes: its nodes in Slurm's notation, e.g. n[1-2]; empty while it waits.
    """

    job_id: str
    state: str
    reason: str
    nodes: str
    start: str
    end: str
    name: str

    @property
    def is_live(self) -> bool:
        return self.state in LIVE_STATES


class SlurmCommands:
    """Runs Slurm's commands.

    Args:
        sleep: waits between retries.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep

    def require(self) -> None:
        """Raises UserError where this machine can't submit jobs."""
        missing = [name for name in ("sbatch", "squeue", "scancel", "scontrol") if shutil.which(name) is None]
        if missing:
            raise UserError(
                f"--profile: no {missing[0]} on this machine; run on a node of the cluster that can submit jobs, or "
                "use --backend local (slurm/cluster.sh brings up a cluster for tests)"
            )
        refusal = _run(["scontrol", "ping"]).stderr
        if NO_CONFIGURATION.search(refusal):
            raise UserError(
                f"--profile: Slurm is not set up on this machine ({_last_line(refusal)}); run on a node of the "
                "cluster, set SLURM_CONF, or use --backend local"
            )

    def submit(self, script: Path, job_name: str) -> str:
        """Submit a batch script and return the job's id.

        A submission that went wrong on the way may have arrived: before another try, the job is looked for by name.

        Raises:
            SubmissionRefusedError: with Slurm's words, where it would be refused again.
            SubmitLimitError: where it would be accepted later.
            SlurmUnavailableError: where Slurm did not answer.
        """
        for delay in (*RETRY_DELAYS_S, None):
            result = _run(["sbatch", "--parsable", str(script)])
            if result.returncode == 0:
                return result.stdout.strip().splitlines()[-1].split(";")[0]
            if _is_full(result.stderr):
                raise SubmitLimitError(_last_line(result.stderr))
            if not _is_transient(result):
                raise SubmissionRefusedError(f"sbatch refused {script}: {result.stderr.strip()}; check the profile")
            arrived = [job.job_id for job in self.jobs().values() if job.name == job_name]
            if arrived:
                return arrived[0]
            if delay is not None:
                self._sleep(delay)
        raise SlurmUnavailableError(f"sbatch: {_last_line(result.stderr)}")

    def jobs(self) -> dict[str, JobInfo]:
        """All jobs of this user that Slurm still knows, by id.

        Raises:
            SlurmUnavailableError: where Slurm did not answer.
        """
        command = ["squeue", f"--user={getpass.getuser()}", "--states=all", "--noheader", f"--format={SQUEUE_FIELDS}"]
        lines = self._query(command).splitlines()
        infos = [JobInfo(*line.split("|", 6)) for line in lines if line.count("|") >= 6]
        return {info.job_id: info for info in infos}

    def history(self, job_ids: Collection[str]) -> dict[str, JobInfo]:
        """What accounting knows about jobs that squeue has forgotten; nothing where there is no accounting."""
        if not job_ids or shutil.which("sacct") is None:
            return {}
        fields = "JobIDRaw,State,Reason,NodeList,Start,End,JobName"
        command = [
            "sacct",
            "--allocations",
            "--noheader",
            "--parsable2",
            f"--format={fields}",
            "--jobs",
            ",".join(job_ids),
        ]
        result = _run(command)
        if result.returncode != 0:
            return {}
        infos = [JobInfo(*line.split("|", 6)) for line in result.stdout.splitlines() if line.count("|") >= 6]
        # "CANCELLED by 1000"
        return {info.job_id: JobInfo(**{**vars(info), "state": info.state.split(" ")[0]}) for info in infos}

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancel jobs; one that has ended meanwhile is no error."""
        if job_ids:
            self._query(["scancel", *job_ids], ignore=re.compile("Invalid job id|already completed", re.IGNORECASE))

    def requeue(self, job_id: str) -> bool:
        """From inside a job: put it back into the queue, unless Slurm is ending or requeueing it already.

        Returns:
            whether it is queued again, by us or by Slurm.
        """
        state = re.search(r"JobState=(\S+)", self._query(["scontrol", "show", "job", "--oneliner", job_id]))
        if state is not None and state[1] != "RUNNING":
            return state[1] != "CANCELLED"
        self._query(["scontrol", "requeue", job_id])
        return True

    def _query(self, command: list[str], ignore: re.Pattern[str] | None = None) -> str:
        """Run a command until it succeeds; an error that waiting can't mend is a broken assumption of ours."""
        for delay in (*RETRY_DELAYS_S, None):
            result = _run(command)
            if result.returncode == 0 or (ignore is not None and ignore.search(result.stderr)):
                return result.stdout
            if not _is_transient(result):
                break
            if delay is not None:
                self._sleep(delay)
        raise SlurmUnavailableError(f"{command[0]}: {_last_line(result.stderr)}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: timed out after {COMMAND_TIMEOUT_S:.0f} s")


def _is_transient(result: subprocess.CompletedProcess[str]) -> bool:
    # A command may be hit by a signal that is meant for the job from inside which it is called.
    return result.returncode < 0 or TRANSIENT.search(result.stderr) is not None


def _is_full(message: str) -> bool:
    """Whether a job is refused only because the user has as many as may be."""
    named = NAMED_LIMIT.findall(message)
    return bool(TOO_MANY_JOBS.search(" ".join(named) if named else message))


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
