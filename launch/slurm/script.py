"""Batch scripts, made from a stage and a profile; every script is written here, including those of dry runs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfprune_launch.slurm.causes import START
from hfprune_launch.slurm.profile import Resources
from submitit.slurm.slurm import SlurmExecutor

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import write_text
from hfprune_dist.store.attempts import SCRIPT
from hfprune_dist.store.machine import threads_allowed
from hfprune_dist.store.stage import Stage

# The profile's setup and environment, which may hold secrets: sourced by the batch script, readable by its owner alone.
ENVIRONMENT = "environment.sh"
# Characters to which Slurm (ids in the names of logs), batch scripts or PYTHONPATH give a meaning of their own.
UNUSABLE = re.compile(r"[%\\:\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Request:
    """One job to submit.

    Attributes:
        folder: the attempt's folder, which receives script and logs.
        after_ok: ids of jobs that must have succeeded before it starts.
        after_any: id of a job that must have ended, in any way, before it starts (``--max-running``).
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


def refuse_unusable_path(out: Path) -> None:
    """Check that jobs can keep their logs and code below a folder.

    Raises:
        UserError: for characters to which Slurm or Python give a special meaning.
    """
    for path in (out.absolute(), out.resolve()):
        if found := UNUSABLE.search(str(path)):
            raise UserError(
                f"--out {str(path)!r}: a folder of jobs can't have {found[0]!r} in its path, to which Slurm or "
                "batch scripts give a meaning of their own; choose another --out"
            )


def batch_script(request: Request) -> str:
    """Return the batch script, as submitit writes it."""
    resources = request.resources
    executor = _TextExecutor(request.folder)
    executor.update_parameters(
        job_name=request.job_name,
        partition=resources.partition,
        account=resources.account,
        qos=resources.qos,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks_per_node,
        gpus_per_node=resources.gpus_per_node_option,
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
        teardown=["hfprune_end $?"],
    )
    return executor.text()


def write_submission(request: Request) -> Path:
    """Write the batch script and what it sources into the attempt's folder; return the script."""
    write_text(request.folder / ENVIRONMENT, environment_script(request), mode=0o600)
    write_text(request.folder / SCRIPT, batch_script(request))
    return request.folder / SCRIPT


class _TextExecutor(SlurmExecutor):  # type: ignore[misc]
    """submitit's executor, used only to write scripts: works without Slurm, and submits nothing itself."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self) -> str:
        command = f"{self.python} -u -m hfprune_launch.slurm.job {shlex.quote(str(self.folder))}"
        text: str = self._make_submission_file_text(command, "")
        return text


def _common_options(request: Request) -> dict[str, str | bool]:
    options: dict[str, str | bool] = {
        # Lets Slurm requeue a job that is preempted or whose node dies.
        "requeue": True,
        # Without this, a job whose dependency failed waits for ever.
        "kill-on-invalid-dep": "yes",
        "chdir": str(request.snapshot),
        # The limits (ulimit) of the launcher's shell are not meant for the nodes.
        "propagate": "NONE",
    }
    return options if request.resources.memory is None else {**options, "mem": request.resources.memory}


def _setup(request: Request) -> list[str]:
    """Return the shell lines before srun, among them the profile's setup and environment."""
    snapshot, folder = shlex.quote(str(request.snapshot)), request.folder.resolve()
    return [
        f'echo "{START} ${{SLURM_RESTART_COUNT:-0}}" >&2',
        f"hfprune_folder={shlex.quote(str(folder))}",
        'hfprune_record="$hfprune_folder/exit.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        "hfprune_end() { trap - EXIT",
        'echo "$@" >"$hfprune_record.new" && mv "$hfprune_record.new" "$hfprune_record"; exit "$1"; }',
        # With it, srun would need slurmdbd; the job's own cluster is that of its nodes.
        "unset SLURM_CLUSTERS",
        f"export OMP_NUM_THREADS={request.threads}",
        # Python doesn't notice bytecode that a full disk has cut off, and nobody else should run what a job writes.
        "export PYTHONDONTWRITEBYTECODE=1",
        f'. "$hfprune_folder/{ENVIRONMENT}"',
        "[ $? = 0 ] || hfprune_end 1 setup in the profile can not be read",
        f"export HFPRUNE_CODE={snapshot}",
        '[ -d "$HFPRUNE_CODE" ] || hfprune_end 1 "the copy of the code in $HFPRUNE_CODE is gone"',
        f"export PYTHONPATH={snapshot}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def environment_script(request: Request) -> str:
    """Return the profile's setup and environment as shell lines; the first line of setup that fails ends the job and is
    named in its record; one that exits ends it too.

    As with ``set -e``, conditions may fail; unlike with it, so may commands inside functions and sourced files: the
    batch script sources these lines, so that their own commands have a depth of two.
    """
    failed = "hfprune_end $hfprune_code setup in the profile failed in its line $((LINENO - 2))"
    checked = [
        f"trap 'hfprune_code=$?; if [ ${{#BASH_SOURCE[@]}} = 2 ]; then {failed}; fi' ERR",
        "trap 'hfprune_end 1 a line of setup in the profile ended the job' EXIT",
        *request.resources.setup,
        "trap - ERR EXIT",
    ]
    environment = [f"export {name}={shlex.quote(value)}" for name, value in request.resources.environment.items()]
    return "".join(f"{line}\n" for line in [*checked, *environment])


def _srun_arguments(resources: Resources) -> list[str]:
    # srun doesn't inherit cpus-per-task from sbatch; a rank that dies must end the others; a requeue must not empty the
    # logs; ranks need all that the setup has exported, whatever environment the job was submitted with.
    required = ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}", "--open-mode=append"]
    return [*required, "--export=ALL", *resources.srun_args]


def default_threads(resources: Resources, threads_per_rank: int | None) -> int:
    """Return the CPU threads of a rank: OMP_NUM_THREADS in the profile's environment, else as configured, else its
    cores, but no more than OMP_NUM_THREADS here, if set.
    """
    limit = threads_allowed(os.environ) or resources.cpus_per_task
    own = threads_allowed(resources.environment)
    return own or threads_per_rank or min(limit, resources.cpus_per_task)
