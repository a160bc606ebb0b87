"""What launch/sweep.py does, a function for each mode: run, dry run, status, logs, cancel, forget."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from hfprune_launch.modes.sweep_arguments import Command
from hfprune_launch.modes.sweep_plan import prepare, sweep_to_show
from hfprune_launch.modes.sweep_run import run_prepared
from hfprune_launch.screen import make_console, show_plan, show_results
from hfprune_launch.slurm.cli import cancel_sweep, show_jobs, show_status
from hfprune_launch.slurm.commands import SlurmUnavailableError
from hfprune_launch.slurm.estimate import show_estimates
from hfprune_launch.slurm.status_table import cell_logs
from hfprune_launch.sweep_folder import Sweep, forget_rows, require_sweep

LOG_LINES = 40


def run_sweep(arguments: Namespace) -> int:
    """Do what the parsed command line says; returns the exit code.

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
    return dry_run if arguments.dry_run else run


def run(command: Command) -> int:
    """configuration -> plan -> stages -> artifacts -> tables."""
    prepared = prepare(command, download=True)
    prepared.require_runnable()
    return run_prepared(command, prepared)


def dry_run(command: Command) -> int:
    """Show the plan, and every job that would be submitted; nothing is written, and models aren't downloaded."""
    prepared, console = prepare(command, download=False), command.console
    show_plan(console, prepared.sweep.plan, prepared.verdicts, prepared.todo)
    if prepared.profile is not None:
        show_jobs(console, prepared.sweep, prepared.profile, prepared.config.runtime, prepared.verdicts)
        show_estimates(console, prepared.estimates)
    prepared.require_runnable()
    return 0


def status(command: Command) -> int:
    """Show the state of every stage."""
    show_status(command.console, _existing(command), keep_on=bool(command.arguments.follow))
    return 0


def logs(command: Command) -> int:
    """Show the last lines of a cell's logs."""
    sweep = _existing(command)
    command.tell(cell_logs(sweep.plan, sweep.store, sweep.out / "logs", command.arguments.logs, LOG_LINES))
    return 0


def cancel(command: Command) -> int:
    """Cancel the sweep's jobs; what they have saved stays."""
    cancel_sweep(command.console, _existing(command))
    return 0


def forget(command: Command) -> int:
    """Remove rows from the folder's tables; the artifacts behind them stay."""
    labels = command.arguments.forget
    show_results(command.console, forget_rows(command.out, labels))
    store = command.out / "store"
    command.tell(f"removed: {', '.join(labels)}; a run that plans such a row brings it back from {store}")
    return 0


def _existing(command: Command) -> Sweep:
    """The sweep to look at, or to stop.

    Raises:
        UserError: where nobody has run one in the folder, and no configuration says which it would be.
    """
    if not command.arguments.config:
        require_sweep(command.out)
    return sweep_to_show(command)
