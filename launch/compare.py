"""Compare methods across sweeps that differ in their seed; runs nothing.

example:  python launch/compare.py runs/fidelity/0 runs/fidelity/1 runs/fidelity/2 --out runs/fidelity

The sweeps must have the same settings, but for the seed and which models, ratios and methods they are of. Writes
comparison.md and comparison.json: for each method, the mean and standard deviation of KL to the dense model, agreement,
perplexity and the average of tasks, and time and memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import command, folder, make_parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, compare, write and show."""
    parser = make_parser(__doc__)
    parser.add_argument("sweeps", metavar="SWEEP", type=folder, nargs="+", help="folders of sweeps")
    parser.add_argument("--out", type=folder, required=True, help="folder for comparison.md and comparison.json")
    parser.add_argument("--reference", help="the method whose KL the others are divided by; default: hfprune")
    parser.add_argument(
        "--wide", action="store_true", help="show perplexity, the average of tasks, time and memory too"
    )
    arguments = parser.parse_args(argv)
    from hfprune_launch.modes.compare import compare

    compare(arguments.sweeps, arguments.out, arguments.reference, arguments.wide)
    return 0


if __name__ == "__main__":
    sys.exit(main())
