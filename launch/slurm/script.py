"""Batch scripts, made from a chain of stages and a profile; every script is written here, including those of dry runs.

A script runs its stages one after another, up to the first that fails; one that was requeued goes on where it was.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfprune_launch.slurm.causes import NO_CONTROLLER, START
from hfprune_launch.slurm.profile import Resources
from submitit.slurm.slurm import SlurmExecutor

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import write_text
from hfprune_dist.store.attempts import SCRIPT
from hfprune_dist.store.machine import threads_allowed

# The profile's setup and environment, which may hold secrets: sourced by the batch script, readable by its owner alone.
ENVIRONMENT = "environment.sh"
# Characters to which Slurm (ids in the names of logs), batch scripts or PYTHONPATH give a meaning of their own.
UNUSABLE = re.compile(r"[%\\:\x00-\x1f\x7f-\x9f\ud800-\udfff]")
AS_SLURM_CALLS_IT = ("partition", "account", "qos", "nodes", "cpus_per_task", "constraint", "exclude")
# What srun exits with if SIGUSR2 ends a rank.
UNHEARD = 128 + signal.SIGUSR2


@dataclass(frozen=True)
class JobRequest:
    """One job to submit.

    Attributes:
        name: of this job alone, by which launchers find it.
        shared: name that Slurm is told if others have it, too, of which one runs at a time; empty for its own.
        folders: of the attempts at its stages, in order; the first receives the script, each the logs of its stage.
        threads: CPU threads of each rank.
    """

    resources: Resources
    folders: Sequence[Path]
    name: str
    snapshot: Path
    threads: int
    dependencies: Sequence[str] = ()
    shared: str = ""


def refuse_unusable_path(out: Path) -> None:
    """Raise UserError if jobs can't keep their logs and code below a folder."""
    for path in (out.absolute(), out.resolve()):
        if found := UNUSABLE.search(str(path)):
            raise UserError(
                f"--out {str(path)!r}: a folder of jobs can't have {found[0]!r} in its path, to which Slurm or "
                "batch scripts give a meaning of their own; choose another --out"
            )


def batch_script(request: JobRequest) -> str:
    """Return the batch script, as submitit writes it."""
    resources = request.resources
    gpus = f"{resources.gpu_type or ''}:{resources.gpus_per_node}".removeprefix(":")
    executor = _TextExecutor(request.folders[0])
    executor.update_parameters(
        **{name: getattr(resources, name) for name in AS_SLURM_CALLS_IT},
        job_name=request.shared or request.name,
        comment=request.name,
        ntasks_per_node=resources.tasks_per_node,
        gpus_per_node=gpus if resources.gpus else None,
        time=resources.time_minutes,
        mem=resources.memory,
        dependency=",".join(request.dependencies) or None,
        wckey=None,
        additional_parameters={
            "signal": f"USR2@{resources.signal_seconds}",
            "requeue": True,  # by Slurm, if it is preempted or its node dies
            "kill-on-invalid-dep": "yes",  # without it, a job whose dependency failed waits for ever
            "chdir": str(request.snapshot),
            "propagate": "NONE",  # the limits (ulimit) of the launcher's shell are not meant for the nodes
            **resources.sbatch,
        },
        setup=_setup(request),
        use_srun=False,
    )
    text: str = executor._make_submission_file_text(_run_stages(resources, executor.python), "")
    return text


def write_submission(request: JobRequest) -> Path:
    """Write the batch script and what it sources into the attempt's folder; return the script."""
    folder = request.folders[0]
    write_text(folder / ENVIRONMENT, environment_script(request), mode=0o600)
    write_text(folder / SCRIPT, batch_script(request))
    return folder / SCRIPT


class _TextExecutor(SlurmExecutor):  # type: ignore[misc]
    """submitit's executor, used only to write scripts, also where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _setup(request: JobRequest) -> list[str]:
    """Return the shell lines before srun, among them the profile's setup and environment."""
    snapshot, *folders = (shlex.quote(str(path)) for path in (request.snapshot, *map(Path.resolve, request.folders)))
    return [
        f'echo "{START} ${{SLURM_RESTART_COUNT:-0}}" >&2',
        f"hfprune_stages=({' '.join(folders)})",
        "# What this job has finished before it was requeued.",
        'while grep -qsx 0 "$hfprune_stages/exit.$SLURM_JOB_ID".*; do hfprune_stages=("${hfprune_stages[@]:1}"); done',
        'hfprune_record() { local file="$hfprune_stages/exit.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        'echo "$@" >"$file.new" && mv "$file.new" "$file"; }',
        'hfprune_end() { trap - EXIT; hfprune_record "$@"; exit "$1"; }',
        # With it, srun would need slurmdbd; the job's own cluster is that of its nodes.
        "unset SLURM_CLUSTERS",
        f"export OMP_NUM_THREADS={request.threads}",
        # Python doesn't notice bytecode that a full disk has cut off, and nobody else should run what a job writes.
        "export PYTHONDONTWRITEBYTECODE=1",
        f". {folders[0]}/{ENVIRONMENT}",
        "[ $? = 0 ] || hfprune_end 1 setup in the profile can not be read",
        "set +eu +o pipefail",  # which a line of setup may have set
        f"[ -d {snapshot} ] || hfprune_end 1 the copy of the code in {snapshot} is gone",
        f"export PYTHONPATH={snapshot}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def environment_script(request: JobRequest) -> str:
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


def _run_stages(resources: Resources, python: str) -> str:
    """Return the shell lines that run the stages that are left."""
    # srun doesn't inherit cpus-per-task from sbatch; a rank that dies must end the others; a requeue must not empty the
    # logs; ranks need all that the setup has exported, whatever environment the job was submitted with.
    required = ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}", "--open-mode=append"]
    arguments = shlex.join(["--unbuffered", *required, "--export=ALL", *resources.srun_args])
    alone = "|".join(kind for kind, about in KINDS.items() if about.on_one_rank)
    signal_at = 60 * (resources.time_minutes - 1) - resources.signal_seconds  # Slurm may be a minute early
    return f"""\
while [ "$hfprune_stages" ]; do
    hfprune_logs="$hfprune_stages/$SLURM_JOB_ID" hfprune_ranks=()
    [[ $hfprune_stages =~ /({alone})/[^/]+/[^/]+$ ]] && hfprune_ranks=(--nodes=1 --ntasks=1)
    echo "{START} ${{SLURM_RESTART_COUNT:-0}}" >>"${{hfprune_logs}}_srun_log.err"
    srun --output "${{hfprune_logs}}_%t_log.out" --error "${{hfprune_logs}}_%t_log.err" {arguments} \\
        "${{hfprune_ranks[@]}}" {python} -u -m hfprune_launch.slurm.job "$hfprune_stages" \\
        2>>"${{hfprune_logs}}_srun_log.err"
    hfprune_code=$?
    if [ $hfprune_code = 0 ]; then
        hfprune_record 0
        hfprune_stages=("${{hfprune_stages[@]:1}}") hfprune_got_further=1 hfprune_tries=0
    elif tac "${{hfprune_logs}}_srun_log.err" | sed "/^{START}/q" | head -n 2 | grep -qE "{NO_CONTROLLER}" &&
        ((++hfprune_tries <= 60)); then
        sleep 10
    elif [ $hfprune_code != {UNHEARD} ] || [ ! "$hfprune_got_further" ]; then
        hfprune_end $hfprune_code
    fi
    # The signal before the time limit has come, or may have come, while no rank listened.
    if [ "$hfprune_stages" ] && {{ [ $hfprune_code = {UNHEARD} ] || [ $SECONDS -ge {signal_at} ]; }}; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 1
    fi
done"""


def default_threads(resources: Resources, threads_per_rank: int | None) -> int:
    """Return the CPU threads of a rank: OMP_NUM_THREADS in the profile's environment, else as configured, else its
    cores, but no more than the launcher's own OMP_NUM_THREADS, if set.
    """
    limit = threads_allowed(os.environ) or resources.cpus_per_task
    own = threads_allowed(resources.environment)
    return own or threads_per_rank or min(limit, resources.cpus_per_task)
