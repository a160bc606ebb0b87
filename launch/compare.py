"""Compare methods across sweeps that differ in their seed, and show how far criteria agree; runs nothing.

example:  python launch/compare.py runs/fidelity/0 runs/fidelity/1 runs/fidelity/2 --out runs/fidelity

Rows of one model, ratio, method and recovery must have the same settings and files in all sweeps that have them, apart
from the seed. Writes comparison.md and comparison.json. For each method: the mean and standard deviation of KL to the
dense model, agreement, perplexity and the average of tasks, and time and memory. For each pair of criteria: the rank
correlation of their scores and the overlap of what they keep, by layer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import folder, make_parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, compare, write and show."""
    return run(lambda: _compare(argv))


def _compare(argv: Sequence[str] | None) -> int:
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
