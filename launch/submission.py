"""From a stage and a profile to a submitted job; the text of every batch script comes from here, dry runs included."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmExecutor

from hfprune_dist.files import fsync_path, write_text
from hfprune_dist.plan import Stage
from launch.hardware import threads_allowed
from launch.job import StageJob
from launch.ledger import Attempt
from launch.profiles import Resources

SCRIPT = "job.sh"
PICKLE = "stage.pkl"


@dataclass(frozen=True)
class Request:
    """One job to submit.

    Attributes:
        folder: the attempt's folder, which receives script, pickle and logs.
        after_ok: ids of jobs that must succeed before.
        after_any: id of a job that must have ended before, however (``--max-running``).
        exclude: nodes that failed earlier attempts.
        threads: CPU threads of each rank.
    """

    stage: Stage
    resources: Resources
    folder: Path
    job_name: str
    snapshot: Path
    threads: int
    after_ok: Sequence[str] = ()
    after_any: str | None = None
    exclude: Sequence[str] = ()

    @property
    def dependency(self) -> str | None:
        after_ok = ["afterok:" + ":".join(self.after_ok)] if self.after_ok else []
        after_any = [f"afterany:{self.after_any}"] if self.after_any else []
        return ",".join(after_ok + after_any) or None


def batch_script(request: Request) -> str:
    """The batch script, as submitit writes it."""
    resources = request.resources
    executor = _TextExecutor(request.folder)
    executor.update_parameters(
        job_name=request.job_name,
        partition=resources.partition,
        account=resources.account,
        qos=resources.qos,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks_per_node,
        gpus_per_node=resources.gpus_per_node or None,
        cpus_per_task=resources.cpus_per_task,
        time=resources.time_minutes,
        constraint=resources.constraint,
        exclude=",".join([*([resources.exclude] if resources.exclude else []), *request.exclude]) or None,
        dependency=request.dependency,
        signal_delay_s=resources.signal_seconds,
        wckey=None,
        additional_parameters={**_common_options(request), **resources.sbatch},
        setup=_setup(request),
        srun_args=_srun_arguments(resources),
    )
    return executor.text()


def write_submission(request: Request, attempt: Attempt, store: Path) -> Path:
    """Write the pickle and the batch script into the attempt's folder; return the script."""
    submission = DelayedSubmission(StageJob(str(store.resolve()), request.stage.id))
    submission.set_timeout(request.resources.time_minutes, 0)
    submission.dump(attempt.folder / PICKLE)
    fsync_path(attempt.folder / PICKLE)
    write_text(attempt.folder / SCRIPT, batch_script(request))
    return attempt.folder / SCRIPT


class _TextExecutor(SlurmExecutor):  # type: ignore[misc]
    """submitit's executor, for the text it makes: works where there is no Slurm, and submits nothing itself.

    submitit itself moves a job's pickle to its place after sbatch: a launcher that dies in between leaves a job that
    fails. Ours lies there before, and the batch script links it to the name that submitit expects.
    """

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self) -> str:
        text: str = self._make_submission_file_text(self._submitit_command_str, "")
        return text


def _common_options(request: Request) -> dict[str, str | bool]:
    options: dict[str, str | bool] = {
        # Slurm itself requeues a job that is preempted or whose node dies.
        "requeue": True,
        # Without this, a job whose dependency failed waits for ever.
        "kill-on-invalid-dep": "yes",
        "chdir": str(request.snapshot),
    }
    return options if request.resources.memory is None else {**options, "mem": request.resources.memory}


def _setup(request: Request) -> list[str]:
    """Shell lines before srun: the profile's, the environment, and the pickle under the job's id."""
    snapshot = shlex.quote(str(request.snapshot))
    environment = {"OMP_NUM_THREADS": str(request.threads), **request.resources.environment}
    folder = request.folder.resolve()
    return [
        *request.resources.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        f"export HFPRUNE_CODE={snapshot}",
        f"export PYTHONPATH={snapshot}${{PYTHONPATH:+:$PYTHONPATH}}",
        f'ln -sfn {PICKLE} {shlex.quote(str(folder))}/"${{SLURM_JOB_ID}}_submitted.pkl"',
    ]


def _srun_arguments(resources: Resources) -> list[str]:
    # srun takes no cpus-per-task from sbatch; a rank that dies must end the others; a requeue must not empty the logs.
    required = ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}", "--open-mode=append"]
    return [*required, *resources.srun_args]


def default_threads(resources: Resources, threads_per_rank: int | None) -> int:
    """CPU threads of a rank: as configured, else its cores, but no more than OMP_NUM_THREADS where that is set."""
    limit = threads_allowed() or resources.cpus_per_task
    return threads_per_rank or min(limit, resources.cpus_per_task)
