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

exit codes: 0 every cell has its result; 1 a stage failed; 2 bad input, also if only a stage can see it;
130 interrupted
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import ListAction, folder, make_parser, place, run


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the sweep."""
    signal.signal(signal.SIGTERM, _interrupt)
    return run(lambda: _sweep(argv), "interrupted; run the same command again to go on")


def _sweep(argv: Sequence[str] | None) -> int:
    arguments = _parse(argv)
    from hfprune_launch.modes.sweep import run_sweep

    return run_sweep(arguments)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = sweep_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        assignments = [it for it in unknown if "=" in it and not it.startswith("-")]
        hint = f"; to set a key, write --set {assignments[0]}" if assignments else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


def sweep_parser() -> argparse.ArgumentParser:
    """The parser of the command line; its defaults are those of a call without arguments."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--models",
        metavar="A,B",
        action=ListAction,
        help="aliases (configs/models), checkpoint folders or hub ids (org/name or org/name@revision)",
    )
    parser.add_argument(
        "--ratios",
        metavar="R,R",
        action=ListAction,
        help="removed / all parameters of the model, each in (0, 1); default: 0.2,0.3",
    )
    parser.add_argument(
        "--methods",
        metavar="A,B",
        action=ListAction,
        help="pruning methods (configs/methods) or YAML files; default: hfprune,surgeon-plain, which are the "
        "published one and ours",
    )
    parser.add_argument(
        "--criteria",
        metavar="A,B",
        action=ListAction,
        help="further scores to compute in the calibration pass (importance.criteria)",
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
    parser.add_argument(
        "--backend",
        choices=("auto", "local", "slurm"),
        default="auto",
        help="where stages run; auto: on Slurm with --profile, else on this machine",
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
    parser.add_argument(
        "--wide", action="store_true", help="show all columns of the table of results, however wide it gets"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--show-config",
        action="store_true",
        help="print all settings as YAML; runs nothing",
    )
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
