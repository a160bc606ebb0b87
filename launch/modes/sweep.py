"""Implementation of launch/sweep.py, by mode: run, dry run, configuration, status, logs, cancel, forget."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from hfprune_launch.local.cancel import running_without_job, wait_until_cancelled
from hfprune_launch.measured_hours import show_hours
from hfprune_launch.modes.report_page import write_page
from hfprune_launch.modes.sweep_arguments import Command
from hfprune_launch.modes.sweep_plan import prepare
from hfprune_launch.modes.sweep_run import run_prepared
from hfprune_launch.screen import make_console, show_checkpoints, show_plan, show_results, show_shapes
from hfprune_launch.slurm.cli import cancel_sweep, show_jobs, show_status
from hfprune_launch.slurm.commands import SlurmUnavailableError
from hfprune_launch.slurm.estimate import show_estimates
from hfprune_launch.slurm.status import row_logs
from hfprune_launch.sweep_folder import configuration, forget_rows, read_sweep

from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.store.attempts import Ledger
from hfprune_dist.store.claims import Cancellation

LOG_LINES = 40


def run_sweep(arguments: Namespace) -> int:
    """Run the mode that the parsed command line asks for, and return the exit code.

    Raises:
        UserError: for bad input; nothing has been written.
    """
    out = arguments.out or Path("runs") / (arguments.config[0].stem if arguments.config else "default")
    try:
        return _mode(arguments)(Command(arguments, out, make_console()))
    except SlurmUnavailableError as error:
        print(f"error: Slurm does not answer: {error}; run the same command again to go on", file=sys.stderr)
        return 1


def _mode(arguments: Namespace) -> Callable[[Command], int]:
    if arguments.forget:
        return forget
    if arguments.status:
        return status
    if arguments.cancel:
        return cancel
    if arguments.logs is not None:
        return logs
    if arguments.show_config:
        return show_config
    return dry_run if arguments.dry_run else run


def run(command: Command) -> int:
    """Run the sweep: configuration -> plan -> stages -> artifacts -> tables."""
    prepared = prepare(command, download=True)
    prepared.require_runnable(command)
    return run_prepared(command, prepared)


def dry_run(command: Command) -> int:
    """Show the plan, its checkpoints, and every job that would be submitted; writes nothing, downloads no weights."""
    prepared, console = prepare(command, download=False), command.console
    show_plan(console, prepared.sweep.plan, prepared.verdicts, prepared.todo)
    show_shapes(console, prepared.shapes())
    for remark in prepared.remarks():
        command.tell(f"note: {remark}")
    if prepared.profile is not None:
        show_jobs(console, prepared.sweep, prepared.profile, prepared.config.runtime, prepared.verdicts)
        show_estimates(console, prepared.estimates)
    show_hours(console, prepared.sweep.plan, command.store, prepared.todo)
    prepared.require_runnable(command)
    return 0


def show_config(command: Command) -> int:
    """Print the configuration as YAML; nothing is looked up or written."""
    config, _ = configuration(command.out, command.arguments.config, command.overrides())
    print(to_yaml(config.model_dump()), end="")
    return 0


def status(command: Command) -> int:
    """Write the report and show the state of every stage."""
    sweep = read_sweep(command.out)
    write_page(command.out, command.console)
    show_status(command.console, sweep, keep_on=bool(command.arguments.follow))
    return 0


def logs(command: Command) -> int:
    """Show the last lines of a row's logs."""
    sweep = read_sweep(command.out)
    command.tell(row_logs(sweep.plan, sweep.store, sweep.out / "logs", command.arguments.logs, LOG_LINES))
    return 0


def cancel(command: Command) -> int:
    """End the running stages of the sweep, on any machine or in jobs; saved work stays."""
    sweep = read_sweep(command.out)
    plan, store = sweep.plan, sweep.store
    is_any_running = bool(running_without_job(plan, store))
    try:
        Cancellation(store.root).request()
    except OSError as error:  # jobs can be ended all the same
        command.tell(f"note: launchers can't be told ({error}), and may go on")
    for line in wait_until_cancelled(plan, store):
        command.tell(line)
    has_jobs = Ledger(store).has_jobs()  # after the waits: a launcher may have been submitting its first
    jobs_go_on = has_jobs and cancel_sweep(command.console, sweep)
    if not has_jobs and not is_any_running:
        command.tell("no stage runs; a launcher that is about to start one ends instead")
    return 1 if jobs_go_on or running_without_job(plan, store) else 0


def forget(command: Command) -> int:
    """Remove rows from the folder's tables; the artifacts behind them stay."""
    labels = command.arguments.forget
    rows, checkpoints = forget_rows(command.out, labels).write_results()
    write_page(command.out, command.console)
    show_results(command.console, rows, command.arguments.wide)
    show_checkpoints(command.console, checkpoints)
    store = command.out / "store"
    command.tell(f"removed: {', '.join(labels)}; a run that plans such a row brings it back from {store}")
    return 0
