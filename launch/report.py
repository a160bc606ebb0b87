"""Write a sweep's tables, report.html and named checkpoints again from its store, and show the table of results. The
sweep need not have finished; nothing is run.

example:  python launch/report.py runs/demo --wide
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import command, folder, make_parser
from hfprune_launch.screen import make_console, say, show_checkpoints, show_results
from hfprune_launch.sweep_folder import read_sweep, write_page


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and show the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("out", type=folder, help="folder of a sweep, e.g. runs/demo")
    parser.add_argument("--wide", action="store_true", help="show all columns, however wide the table gets")
    arguments = parser.parse_args(argv)
    sweep, console, update = read_sweep(arguments.out), make_console(), None
    if os.access(sweep.out, os.W_OK):
        rows, update = sweep.write_results()
        write_page(sweep.out, console)
    else:  # another user's
        rows = sweep.rows()
        say(console, f"note: {sweep.out} can't be written to; the files in it stay as they are")
    # Shown once all is written, as a reader such as head may end the command.
    show_results(console, rows, arguments.wide)
    if update is not None:
        show_checkpoints(console, update)
    return 0


if __name__ == "__main__":
    sys.exit(main())
