"""Prune, recover and evaluate models at several ratios, and print the table. To resume, run the same command
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

exit codes: 0 every row has its result; 1 a stage failed; 2 bad input, even if a running stage finds it;
130 interrupted
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, expanded_path, make_parser, path_given
from hfprune_launch.dry_run import show_dry_run
from hfprune_launch.local.backend import running_without_job, wait_until_cancelled
from hfprune_launch.prepare import Request, prepare
from hfprune_launch.project import PROJECT
from hfprune_launch.run import run_to_tables
from hfprune_launch.screen import make_console, say
from hfprune_launch.slurm.cli import cancel_sweep, show_status
from hfprune_launch.slurm.commands import SlurmUnavailableError
from hfprune_launch.slurm.profile import Profile, load_profile
from hfprune_launch.slurm.status import row_logs
from hfprune_launch.sweep_folder import configuration, forget_rows, read_sweep
from rich.console import Console

from hfprune_dist.checkpoints.engines import ENGINES
from hfprune_dist.config.load import parse_assignments
from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.errors import UserError
from hfprune_dist.store.attempts import Ledger
from hfprune_dist.store.claims import Cancellation


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    arguments = _parse(argv)
    out = arguments.out or Path("runs") / (arguments.config[0].stem if arguments.config else "default")
    console = make_console()
    try:
        if arguments.forget:
            forget_rows(out, arguments.forget).write_results(console)
            back = f"a run that plans such a row brings it back from {out / 'store'}"
            say(console, f"removed: {', '.join(arguments.forget)}; {back}")
            return 0
        if arguments.status:
            show_status(console, read_sweep(out), keep_on=bool(arguments.follow))
            return 0
        if arguments.cancel:
            return _cancel(out, console)
        if arguments.logs is not None:
            sweep = read_sweep(out)
            say(console, row_logs(sweep.plan, sweep.store, out / "logs", arguments.logs, lines=40))
            return 0
        if arguments.show_config:
            print(to_yaml(configuration(out, arguments.config, overrides_of(arguments))[0].model_dump()), end="")
            return 0
        profile, overrides = _profile_of(arguments), overrides_of(arguments)
        request = Request(out, console, arguments.config, overrides, profile, arguments.follow is not False)
        if arguments.dry_run:
            show_dry_run(prepare(request, download=False))
            return 0
        return run_to_tables(prepare(request, download=True))
    except SlurmUnavailableError as error:
        print(f"error: Slurm does not answer: {error}; run the same command again to resume", file=sys.stderr)
        return 1


def _cancel(out: Path, console: Console) -> int:
    """End the running stages of the sweep, on any machine or in jobs; saved work stays."""
    sweep = read_sweep(out)
    plan, store = sweep.plan, sweep.store
    try:
        Cancellation(store.root).request()
    except OSError as error:  # jobs can be ended all the same
        say(console, f"note: launchers can't be told ({error}), and may go on")
    told = wait_until_cancelled(plan, store)
    for line in told:
        say(console, line)
    has_jobs = bool(Ledger(store).open_jobs())  # after the waits: a launcher may have been submitting its first
    jobs_go_on = has_jobs and cancel_sweep(console, sweep)
    if not has_jobs and not told:
        say(console, "no stage runs; a launcher that is about to start one ends instead")
    return 1 if jobs_go_on or running_without_job(plan, store) else 0


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that are settings as dotted keys; a dedicated flag wins over --set."""
    overrides = parse_assignments(arguments.set)
    for name in ("models", "ratios", "methods"):
        if (given := getattr(arguments, name)) is not None:
            overrides[name] = [item for items in given for item in items]
    if arguments.engines is not None:
        overrides["prune.for_engines"] = [item for items in arguments.engines for item in items]
    if arguments.ranks is not None:
        overrides["runtime.ranks"] = arguments.ranks
    return overrides


def _profile_of(arguments: argparse.Namespace) -> Profile | None:
    """Return the profile of the cluster to run on; None for this machine. Flags have to go together."""
    limit = arguments.max_running
    if arguments.profile is None:
        if limit is not None or arguments.follow is False:
            raise UserError("--max-running and --no-follow: only with jobs on Slurm (--profile)")
        return None
    if arguments.ranks is not None:
        raise UserError(f"--ranks {arguments.ranks}: with --profile, its nodes and tasks_per_node say how many")
    if limit is not None and limit < 1:
        raise UserError(f"--max-running {limit}: must be at least 1")
    profile = load_profile(arguments.profile, PROJECT.profiles)
    return replace(profile, max_running=limit or profile.max_running)


def names(text: str) -> list[str]:
    """Argument type for names with commas between them."""
    return [name.strip() for name in text.split(",")]


def numbers(text: str) -> list[float]:
    """Argument type for numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers between 0 and 1, e.g. --ratios 0.2,0.5") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)

    def several(flag: str, metavar: str, meaning: str, **more: Any) -> None:
        parser.add_argument(flag, metavar=metavar, action="append", help=meaning, **more)

    models = "aliases (configs/models), checkpoint folders, or hub ids (org/name, org/name@revision)"
    several("--models", "A,B", models, type=names)
    ratios = "removed / all parameters of the model, each in (0, 1); default: 0.2,0.3"
    several("--ratios", "R,R", ratios, type=numbers)
    methods = "hfprune,surgeon-plain, which are the published one and ours"
    several("--methods", "A,B", f"pruning methods (configs/methods) or YAML files; default: {methods}", type=names)
    engines = f"keep to shapes that these load, if they support the model's family: {', '.join(ENGINES)}"
    several("--for", "A,B", engines, type=names, dest="engines")
    files = "YAML configuration; may be repeated, later files win key by key"
    several("--config", "FILE", files, type=expanded_path, default=[])
    values = "set any key, e.g. --set calibration.samples=64 (value in YAML); wins over files"
    several("--set", "KEY=VALUE", values, default=[])
    add = parser.add_argument
    out = (
        "folder for results and store; default: runs/<name of the first config>, or runs/default. Without --config, a "
        "folder in which a sweep has run uses its own config.yaml, overridden by the other flags. Rows of earlier "
        "runs stay in its tables"
    )
    add("--out", metavar="DIR", type=path_given, help=out)
    add("--ranks", metavar="N", type=int, help="processes per stage; default: one per GPU, or 1")
    add("--profile", metavar="NAME", help="run on Slurm, as slurm/profiles/NAME.yaml or a YAML file says")
    add("--max-running", metavar="N", type=int, help="run at most N jobs at once; default: the profile's")
    follow = (
        "stay until all jobs have ended, then show the table (default); --no-follow: submit and leave; --status "
        "--follow: keep showing the state"
    )
    add("--follow", action=argparse.BooleanOptionalAction, default=None, help=follow)
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--show-config", action="store_true", help="print all settings as YAML; runs nothing")
    instead("--status", action="store_true", help="show the state of every stage; starts nothing")
    cancel = "end all launchers on the sweep's store, on any machine, their ranks and all jobs; saved work stays"
    instead("--cancel", action="store_true", help=cancel)
    logs = "show the last lines of a row's logs; or of a stage's, by the id that --dry-run shows"
    instead("--logs", metavar="ROW", help=logs)
    forget = (
        "remove a row from the folder's tables, e.g. 'llama 0.2 hfprune + lora'; may be repeated; its artifacts stay"
    )
    instead("--forget", metavar="ROW", action="append", help=forget)
    dry_run = (
        "show the plan, with a reason for each stage, and what is known of each checkpoint's shape; with --profile "
        "also every batch script, and what it takes; runs nothing"
    )
    instead("--dry-run", action="store_true", help=dry_run)
    return parser.parse_args(argv)
