"""Prune, distill, recover and evaluate models at several ratios, and print the table. To resume, run the same command
again: it runs only what is missing.

examples:
  python launch/sweep.py --models llama,qwen --ratios 0.2,0.5 --config configs/demo.yaml
  python launch/sweep.py --models /data/my-llama --ratios 0.2 --set calibration.path=text.jsonl --out runs/mine
  python launch/sweep.py --config configs/demo.yaml --dry-run
  python launch/sweep.py --models llama --set 'calibration.mixture=[{path: a.jsonl, weight: 3}, {path: b.jsonl}]'
  python launch/sweep.py --out runs/mine --ratios 0.3                 another ratio, added to the rows already there
  python launch/sweep.py --out runs/mine --set efficiency.enabled=true      measure speed and memory too, off by default
  python launch/sweep.py --config configs/demo.yaml --profile mine.yaml     on a Slurm cluster
  python launch/sweep.py --config configs/demo.yaml --status | --cancel     from a second terminal

exit codes: 0 every cell has its result; 1 a stage failed; 2 bad input, also if it is found by a running stage;
130 interrupted
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import command, folder, make_parser, place
from hfprune_launch.local.cancel import running_without_job, wait_until_cancelled
from hfprune_launch.measured_hours import show_hours
from hfprune_launch.prepare import Request, prepare
from hfprune_launch.project import PROJECT
from hfprune_launch.run import run_to_tables
from hfprune_launch.screen import make_console, say, show_checkpoints, show_plan, show_results, show_shapes
from hfprune_launch.slurm.cli import cancel_sweep, show_jobs, show_status
from hfprune_launch.slurm.commands import SlurmUnavailableError
from hfprune_launch.slurm.estimate import show_estimates
from hfprune_launch.slurm.profile import Profile, load_profile
from hfprune_launch.slurm.status import row_logs
from hfprune_launch.sweep_folder import configuration, forget_rows, read_sweep, write_page
from rich.console import Console

from hfprune_dist.config.load import parse_assignments, parse_list, parse_ratios
from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.errors import UserError
from hfprune_dist.store.attempts import Ledger
from hfprune_dist.store.claims import Cancellation

LOG_LINES = 40


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    signal.signal(signal.SIGTERM, _interrupt)
    arguments = _parse(argv)
    out = arguments.out or Path("runs") / (arguments.config[0].stem if arguments.config else "default")
    console = make_console()
    try:
        if arguments.forget:
            return _forget(out, console, arguments.forget)
        if arguments.status:
            show_status(console, read_sweep(out), keep_on=bool(arguments.follow))
            return 0
        if arguments.cancel:
            return _cancel(out, console)
        if arguments.logs is not None:
            sweep = read_sweep(out)
            say(console, row_logs(sweep.plan, sweep.store, out / "logs", arguments.logs, LOG_LINES))
            return 0
        if arguments.show_config:
            print(to_yaml(configuration(out, arguments.config, overrides_of(arguments))[0].model_dump()), end="")
            return 0
        profile, overrides = _profile_of(arguments), overrides_of(arguments)
        request = Request(out, console, arguments.config, overrides, profile, arguments.follow is not False)
        return _dry_run(request) if arguments.dry_run else _run(request)
    except SlurmUnavailableError as error:
        print(f"error: Slurm does not answer: {error}; run the same command again to go on", file=sys.stderr)
        return 1


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _run(request: Request) -> int:
    """Run the sweep: configuration -> plan -> stages -> artifacts -> tables."""
    prepared = prepare(request, download=True)
    prepared.require_runnable()
    return run_to_tables(prepared)


def _dry_run(request: Request) -> int:
    """Show the plan, its checkpoints, and every job that would be submitted; writes nothing, downloads no weights."""
    prepared, console = prepare(request, download=False), request.console
    show_plan(console, prepared.sweep.plan, prepared.verdicts, prepared.todo)
    show_shapes(console, prepared.shapes())
    for remark in prepared.remarks():
        request.tell(f"note: {remark}")
    if request.profile is not None:
        show_jobs(console, prepared.sweep, request.profile, prepared.config.runtime, prepared.verdicts)
        show_estimates(console, prepared.estimates)
    show_hours(console, prepared.sweep.plan, prepared.sweep.store, prepared.todo)
    prepared.require_runnable(looks_only=True)
    return 0


def _cancel(out: Path, console: Console) -> int:
    """End the running stages of the sweep, on any machine or in jobs; saved work stays."""
    sweep = read_sweep(out)
    plan, store = sweep.plan, sweep.store
    is_any_running = bool(running_without_job(plan, store))
    try:
        Cancellation(store.root).request()
    except OSError as error:  # jobs can be ended all the same
        say(console, f"note: launchers can't be told ({error}), and may go on")
    for line in wait_until_cancelled(plan, store):
        say(console, line)
    has_jobs = bool(Ledger(store).open_jobs())  # after the waits: a launcher may have been submitting its first
    jobs_go_on = has_jobs and cancel_sweep(console, sweep)
    if not has_jobs and not is_any_running:
        say(console, "no stage runs; a launcher that is about to start one ends instead")
    return 1 if jobs_go_on or running_without_job(plan, store) else 0


def _forget(out: Path, console: Console, labels: Sequence[str]) -> int:
    """Remove rows from the folder's tables; the artifacts behind them stay."""
    rows, checkpoints = forget_rows(out, labels).write_results()
    write_page(out, console)
    show_results(console, rows)
    show_checkpoints(console, checkpoints)
    say(console, f"removed: {', '.join(labels)}; a run that plans such a row brings it back from {out / 'store'}")
    return 0


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that are settings as dotted keys; a dedicated flag wins over --set."""
    overrides = parse_assignments(arguments.set)
    if arguments.models is not None:
        overrides["models"] = parse_list("--models", ",".join(arguments.models))
    if arguments.ratios is not None:
        overrides["ratios"] = parse_ratios(",".join(arguments.ratios))
    if arguments.methods is not None:
        overrides["methods"] = parse_list("--methods", ",".join(arguments.methods))
    if arguments.ranks is not None:
        overrides["runtime.ranks"] = arguments.ranks
    return overrides


def _profile_of(arguments: argparse.Namespace) -> Profile | None:
    """Return the profile of the cluster to run on; None for this machine.

    Raises:
        UserError: for flags that don't go together, or an invalid profile.
    """
    limit = arguments.max_running
    if arguments.profile is None:
        if limit is not None:
            raise UserError(f"--max-running {limit}: only with jobs on Slurm (--profile); here stages run one by one")
        if arguments.follow is False:
            raise UserError("--no-follow: only with jobs on Slurm (--profile); stages here end with this command")
        return None
    if arguments.ranks is not None:
        raise UserError(f"--ranks {arguments.ranks}: with --profile, its nodes and tasks_per_node say how many")
    if limit is not None and limit < 1:
        raise UserError(f"--max-running {limit}: must be at least 1")
    profile = load_profile(arguments.profile, PROJECT.profiles)
    return replace(profile, max_running=limit or profile.max_running)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--models",
        metavar="A,B",
        action="append",
        help="aliases (configs/models), checkpoint folders or hub ids (org/name or org/name@revision)",
    )
    parser.add_argument(
        "--ratios",
        metavar="R,R",
        action="append",
        help="removed / all parameters of the model, each in (0, 1); default: 0.2,0.3",
    )
    parser.add_argument(
        "--methods",
        metavar="A,B",
        action="append",
        help="pruning methods (configs/methods) or YAML files; default: hfprune,surgeon-plain, which are the "
        "published one and ours",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=place,
        action="append",
        default=[],
        help="YAML configuration; may be repeated, later files win key by key",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set any key, e.g. --set calibration.samples=64 (value in YAML); wins over files",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=folder,
        help="folder for results and store; default: runs/<name of the first config>. Without --config, a folder in "
        "which a sweep has run uses its own config.yaml, with the other flags laid over it. Rows of earlier runs stay "
        "in its tables",
    )
    parser.add_argument("--ranks", metavar="N", type=int, help="processes per stage; default: one per GPU, or 1")
    parser.add_argument(
        "--profile", metavar="NAME", help="run on Slurm, as slurm/profiles/NAME.yaml or a YAML file says"
    )
    parser.add_argument(
        "--max-running",
        metavar="N",
        type=int,
        help="run at most N jobs of this sweep at once; default: the profile's",
    )
    parser.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="stay until all jobs have ended, then show the table (default); --no-follow: submit and leave; --status "
        "--follow: keep showing the state",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show-config", action="store_true", help="print all settings as YAML; runs nothing")
    instead.add_argument("--status", action="store_true", help="show the state of every stage; starts nothing")
    instead.add_argument(
        "--cancel",
        action="store_true",
        help="end all launchers on the sweep's store, on any machine, their ranks and all jobs; saved work stays",
    )
    instead.add_argument(
        "--logs",
        metavar="ROW",
        help="show the last lines of a row's logs, e.g. 'llama 0.2 hfprune + lora'; or of a stage's, by the id that "
        "--dry-run shows",
    )
    instead.add_argument(
        "--forget",
        metavar="ROW",
        action="append",
        help="remove a row from the folder's tables, e.g. 'llama 0.2 hfprune + lora'; may be repeated; its artifacts "
        "stay",
    )
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="show the plan, with a reason for each stage, and what is known of each checkpoint's shape; with "
        "--profile also every batch script, and what it takes; runs nothing",
    )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        assignments = [word for word in unknown if "=" in word and not word.startswith("-")]
        hint = f"; to set a key, write --set {assignments[0]}" if assignments else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
