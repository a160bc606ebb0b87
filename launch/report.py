"""Make the tables of a sweep again from what is in its store, whether it has finished or not; runs nothing.

example:  python launch/report.py runs/demo --published
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from hfprune_dist.artifacts import Store
from hfprune_dist.errors import UserError, explained
from hfprune_dist.plan import Plan
from hfprune_dist.report import DenseModel, Row, collect_rows, write_reports
from launch.screen import make_console, show_results
from launch.sweep import PROJECT, SWEEP_FILE, read_record


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of a sweep, e.g. runs/demo")
    parser.add_argument("--published", action="store_true", help="show the paper's rows below ours")
    arguments = parser.parse_args(argv)
    with explained():
        report(arguments.out, arguments.published)
    return 0


@dataclass(frozen=True)
class Finished:
    """A sweep as its folder tells of it, finished or not."""

    folder: Path
    plan: Plan
    rows: list[Row]


def read_sweep(out: Path) -> Finished:
    """Read the plan that sweep.py left, and collect what is there.

    Raises:
        UserError: where the folder is not a sweep's.
    """
    record = read_record(out)
    if record is None:
        raise UserError(f"{out}: no {SWEEP_FILE}; give the folder of a sweep that launch/sweep.py has started")
    dense = {name: DenseModel(**facts) for name, facts in record["dense"].items()}
    plan = Plan.from_json(record)
    return Finished(out, plan, collect_rows(plan, Store(out / "store"), dense))


def report(out: Path, published: bool) -> None:
    """Write the tables of a sweep and show them."""
    console = make_console()
    rows = read_sweep(out).rows
    write_reports(rows, out)
    show_results(console, rows)
    if published:
        _show_published(console)


def _show_published(console: Console) -> None:
    source = yaml.safe_load((PROJECT / "configs" / "published.yaml").read_text(encoding="utf-8"))
    tasks = source["tasks"]
    lines = Table("published", "ratio", "recovery", *tasks, "avg", box=None, pad_edge=False)
    for row in source["rows"]:
        scores = [f"{score:.1f}" for score in row.get("scores", [])] or ["-"] * len(tasks)
        lines.add_row(row["method"], f"{row['ratio']:g}", row["recovery"], *scores, f"{row['average']:.1f}")
    console.print("\nLLaMA-2-7B, arXiv 2603.08083, 10-task average; crows_pairs_english: lower is better")
    console.print(lines)


if __name__ == "__main__":
    sys.exit(main())
