"""Free disk space in a sweep's folder by removing what no row of its tables refers to any more.

examples:
  python launch/clean.py runs/demo --dry-run          show what would be removed, and its size in bytes
  python launch/clean.py runs/demo
  python launch/clean.py runs/demo --intermediates    also remove intermediate checkpoints of finished rows

Removed: artifacts and progress of rows that were removed (--forget) or replaced by others, drafts of stages that
ended early, artifacts that failed verification, and files that stages share, which are made again when needed. Kept:
rows, tables, named checkpoints and logs, and what waiting Slurm jobs need.

Later sweeps: the same command still runs nothing, since the rows are complete. --intermediates removes pruned and
distilled checkpoints that finished rows were recovered from; they are made again only if something needs them, such as
another recovery of the same pruned model, a recovered checkpoint that was deleted, or a ratio that shares its first
rounds. Scores of calibration passes stay, so another ratio costs as much as before otherwise. Large files in
checkpoints/ share their bytes with the store, so these are free only once both are gone.

exit codes: 0 done; 2 a stage of the sweep is running, something can't be removed, or bad input
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import command, folder, make_parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and clean up."""
    parser = make_parser(__doc__)
    parser.add_argument("out", type=folder, help="folder of a sweep, e.g. runs/demo")
    parser.add_argument(
        "--intermediates",
        action="store_true",
        help="also remove the files of pruned and distilled checkpoints that finished rows were trained from",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be removed; removes nothing")
    arguments = parser.parse_args(argv)
    from hfprune_launch.modes.clean import clean

    clean(arguments.out, intermediates=arguments.intermediates, dry_run=arguments.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
