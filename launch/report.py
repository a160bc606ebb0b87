"""Write and show the tables of a sweep again from its store, whether it has finished or not; runs nothing.

example:  python launch/report.py runs/demo --published
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hfprune_launch.command import folder, run

PUBLISHED = Path(__file__).resolve().parents[1] / "configs" / "published.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and show the tables."""
    return run(lambda: _report(argv))


def _report(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=folder, help="folder of a sweep, e.g. runs/demo")
    parser.add_argument("--published", action="store_true", help="show the paper's rows below ours")
    arguments = parser.parse_args(argv)
    from hfprune_launch.screen import make_console, show_published, show_results
    from hfprune_launch.sweep_folder import read_sweep

    from hfprune_dist.results.table import write_reports

    sweep = read_sweep(arguments.out)
    write_reports(sweep.rows, arguments.out)
    console = make_console()
    show_results(console, sweep.rows)
    if arguments.published:
        show_published(console, PUBLISHED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
