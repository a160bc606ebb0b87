"""Show the state of every stage of a sweep, as planned by the last run in its folder, and write its report.html; starts
nothing.

example:  python launch/status.py runs/demo --follow
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import command, folder, make_parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and show the state."""
    parser = make_parser(__doc__)
    parser.add_argument("out", type=folder, help="folder of a sweep, e.g. runs/demo")
    parser.add_argument("--follow", action="store_true", help="keep it up to date while a stage is queued or running")
    arguments = parser.parse_args(argv)
    from hfprune_launch.modes.report_page import write_page
    from hfprune_launch.screen import make_console
    from hfprune_launch.slurm.cli import show_status
    from hfprune_launch.sweep_folder import read_sweep

    console, sweep = make_console(), read_sweep(arguments.out)
    write_page(sweep.out, console)
    show_status(console, sweep, keep_on=arguments.follow)
    return 0


if __name__ == "__main__":
    sys.exit(main())
