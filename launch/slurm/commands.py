"""Slurm's commands, with patience for a controller that is busy or restarting.

Job states come from one squeue call for all jobs of the user, which also lists jobs that ended a few minutes ago
(MinJobAge). A job's absence from that list says nothing yet, as an answer may be cut short between two lines: scontrol
is then asked about the job itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.errors import UserError

COMMAND_TIMEOUT_S = 90.0
DELAYS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
TRANSIENT = re.compile(  # whole phrases of Slurm's, since a refusal repeats names such as a partition's
    r"timed out|unable to contact slurm controller|temporarily un(available|able)|zero bytes were|rate limit exceeded"
    r"|connection (refused|reset)|(message|communication) \w+ failure|missing socket|controller .*not responding"
    r"|slurmctld\b.*\b(down|restart)|try again|backup controller in standby|is shutting down",
    re.IGNORECASE,
)
# Variables with which a user changes what Slurm's commands ask for or show.
OPTION_VARIABLES = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SINFO_", "SRUN_")
# The ones among them that say which cluster is asked, and as which user.
CONNECTION_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
# Slurm names the limit that a job exceeds (QOSMinGRES), before a sentence that is the same for all limits.
NAMED_LIMIT = re.compile(r"error: (\w+)\s+sbatch: error: ")
# The limit of a user, an account or a QOS; and the cluster's own, at which sbatch tries again for minutes.
TOO_MANY_JOBS = re.compile(
    r"MaxSubmit|SubmitJob|job count limit|job submit limit|job queue full|temporarily unable to accept job",
    re.IGNORECASE,
)
# The final mark shows that a line is complete, since names may contain any character, including line ends.
SQUEUE_FIELDS = "%i|%T|%r|%N|%j|%k|;"
SQUEUE_HEADER = re.compile(r"^JOBID\|.*\|;\n", re.MULTILINE)
SQUEUE_JOB = re.compile(r"^(\d[^|\n]*)" + r"\|([^|\n]*)" * 3 + r"\|(.*?)\|(.*?)\|;\n", re.MULTILINE | re.DOTALL)
# What sbatch --parsable prints; sites may print notes before and after it.
SUBMITTED = re.compile(r"^(\d+)(?:;\S+)?[ \t\r]*$", re.MULTILINE)
INVALID_JOB_ID = re.compile("Invalid job id", re.IGNORECASE)

# Live, but on no node; in the last three Slurm holds a job until somebody releases or cancels it.
WAITING_STATES = frozenset({"PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
LIVE_STATES = WAITING_STATES | {
    *("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"),
    *("REQUEUED", "REQUEUE_FED", "EXPEDITING"),
}
# Why a job waits for others; and why it would wait for ever, as one of them did not succeed, if Slurm did not end it.
DEPENDENCY, NEVER = "Dependency", "DependencyNeverSatisfied"
# The state of a job of which the controller says that there is none.
FORGOTTEN = "forgotten by Slurm"


class SlurmUnavailableError(Exception):
    """Slurm did not answer despite retries; nothing is known about any job."""


class NoAnswerError(SlurmUnavailableError):
    """Slurm's answers were empty or cut off."""


class NotNowError(Exception):
    """A job can't be submitted now: too many are queued, one that it needs is forgotten, or it is no longer wanted."""


class SubmissionRefusedError(UserError):
    """Slurm refuses a job with these options."""


@dataclass(frozen=True)
class JobInfo:
    """Slurm's information on a job: its state, or ``FORGOTTEN``; why it waits or ended, or "None"; nodes as n[1-2];
    its name for Slurm, which jobs may share of which one runs at a time; and its own, unique one, in its comment.
    """

    job_id: str
    state: str
    reason: str
    nodes: str
    shared: str
    name: str

    @property
    def is_live(self) -> bool:
        return self.state in LIVE_STATES

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING_STATES


@dataclass
class SlurmCommands:
    """Runs Slurm's commands, again after each of the delays while there is no answer (SlurmUnavailableError)."""

    sleep: Callable[[float], None] = time.sleep
    retry_delays_s: Sequence[float] = DELAYS_S

    def require(self) -> None:
        """Raise UserError if this machine can't submit jobs."""
        for name in ("sbatch", "squeue", "scancel", "scontrol"):
            if shutil.which(name) is None:
                where = "a node of the cluster that can submit jobs (slurm/cluster.sh brings up one for tests)"
                raise UserError(f"no {name} on this machine; run on {where}, or leave out --profile")

    def submit(self, script: Path) -> str:
        """Submit a batch script and return the job's id.

        Raises:
            SubmissionRefusedError: with Slurm's message, if the job would be refused again.
            NotNowError: if it would be accepted later.
            SlurmUnavailableError: if Slurm did not say whether it took the job, which may be found by its name later.
        """
        result = _run(["sbatch", "--parsable", str(script)])
        if said := SUBMITTED.findall(result.stdout):
            return str(said[-1])
        if TOO_MANY_JOBS.search(" ".join(NAMED_LIMIT.findall(result.stderr)) or result.stderr):
            limit = "; ".join(result.stderr.strip().splitlines())  # the first line names it
            instead = "if none of yours is queued, name another account, qos or partition"
            raise NotNowError(f"{limit}; the rest is submitted when jobs have ended; {instead}")
        if result.returncode == 0 or _is_transient(result):
            raise SlurmUnavailableError(f"sbatch: {_last_line(result.stderr)}")
        if "job dependency problem" in result.stderr.lower():
            raise NotNowError(f"{_last_line(result.stderr)}; tried again")
        raise SubmissionRefusedError(f"sbatch refused {script}: {result.stderr.strip()}")

    def jobs(self) -> dict[str, JobInfo]:
        """Return all jobs of this user that squeue lists, by name: of those with one name a live one, if there is one.
        A job that isn't listed need not be over.
        """
        command = ["squeue", "--me", "--states=all", f"--format={SQUEUE_FIELDS}"]
        text = self._query(command, is_whole=_is_whole_listing)
        infos = [JobInfo(*fields) for fields in SQUEUE_JOB.findall(text)]
        return {info.name: info for info in sorted(infos, key=lambda info: info.is_live)}

    def accounted(self, job_id: str) -> str:
        """Return the state of a job by the cluster's accounting; empty if there is none, or it knows no such job."""
        result = _run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State"])
        words = result.stdout.split() if result.returncode == 0 else []
        return words[0] if words else ""

    def fields(self, job_id: str) -> dict[str, str]:
        """Return what the controller itself says of a job, by Slurm's names; nothing if it says that there is none."""
        command = ["scontrol", "show", "job", "--oneliner", job_id]
        text = self._query(command, INVALID_JOB_ID, is_whole=lambda text: "JobState=" in text)
        found = re.findall(r"(?:^| )(\w+)=(\S*)", text)
        return {name: "" if value == "(null)" else value for name, value in found}

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancel jobs; it is no error if one has already ended."""
        if job_ids:
            self._query(["scancel", *job_ids], ignore=re.compile("Invalid job id|already completed", re.IGNORECASE))

    def find(self, name: str) -> str | None:
        """Return the id of a job that squeue may have missed, by the name in its comment."""
        text = self._query(["scontrol", "show", "job", "--oneliner"], ignore=INVALID_JOB_ID)
        found = re.search(rf"^JobId=(\d+) .*\bComment={re.escape(name)}( |$)", text, re.MULTILINE)
        return found and found[1]

    def requeue(self, job_id: str) -> None:
        """Put a running job back into the queue."""
        self._query(["scontrol", "requeue", job_id])

    def _query(
        self,
        command: list[str],
        ignore: re.Pattern[str] | None = None,
        is_whole: Callable[[str], bool] = lambda _: True,
    ) -> str:
        """Run a command until it succeeds, or says what to ``ignore``, which counts as success without output."""
        for delay in (*self.retry_delays_s, None):
            result = _run(command)
            if result.returncode == 0 and is_whole(result.stdout):
                return result.stdout
            problem = _last_line(result.stderr) if result.returncode else "its output is empty or cut off"
            if result.returncode and ignore is not None and ignore.search(result.stderr):
                return ""
            if result.returncode and not _is_transient(result):
                break
            if delay is not None:
                self.sleep(delay)
        kind = SlurmUnavailableError if result.returncode else NoAnswerError
        raise kind(f"{command[0]}: {problem}")


def command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for Slurm's commands, without variables from a shell or a job that change what they do."""
    kept = {name: value for name, value in environment.items() if not name.startswith(OPTION_VARIABLES)}
    return kept | {name: environment[name] for name in CONNECTION_VARIABLES if name in environment}


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command; one that takes too long or can't be started is one that failed, and may succeed another time."""
    try:
        return subprocess.run(
            command,
            env=command_environment(os.environ),
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # names of a user's other jobs may be in any encoding
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")  # why it takes long, if it says so
        ended = f"{command[0]}: timed out after {COMMAND_TIMEOUT_S:.0f} s"
        return subprocess.CompletedProcess(command, 1, "", f"{said}{ended}")
    except OSError as error:  # e.g. a node on which the user may start no more processes at this moment
        return subprocess.CompletedProcess(command, -1, "", f"{command[0]}: {error.strerror or error}")


def _is_whole_listing(text: str) -> bool:
    """Return whether squeue's header is there and no job's line is cut off."""
    if SQUEUE_HEADER.search(text) is None:
        return False
    rest = SQUEUE_JOB.sub("", text)
    return not re.search(r"^\d", rest, re.MULTILINE)


def _is_transient(result: subprocess.CompletedProcess[str]) -> bool:
    # A command may be hit by a signal that is meant for the job inside which it is called.
    # A site's own advice, above the last line, may be to try again.
    return result.returncode < 0 or TRANSIENT.search(_last_line(result.stderr)) is not None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
