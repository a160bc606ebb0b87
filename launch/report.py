"""Write a sweep's tables, report.html and named checkpoints again from its store, and show the table of results. The
sweep need not have finished; nothing is run.

example:  python launch/report.py runs/demo --wide
"""

from __future__ import annotations

import os
from collections.abc import Sequence

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, make_parser, path_given
from hfprune_launch.screen import make_console, say, show_results
from hfprune_launch.sweep_folder import read_sweep


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and show the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("out", type=path_given, help="folder of a sweep, e.g. runs/demo")
    parser.add_argument("--wide", action="store_true", help="show all columns, however wide the table gets")
    arguments = parser.parse_args(argv)
    sweep, console = read_sweep(arguments.out), make_console()
    if os.access(sweep.out, os.W_OK):
        sweep.write_results(console, arguments.wide)
    else:  # another user's
        say(console, f"note: {sweep.out} can't be written to; the files in it stay as they are")
        show_results(console, sweep.rows(), arguments.wide)
    return 0
