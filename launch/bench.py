"""Measure what the calibration pass costs: the published formulation against ours, in time and memory.

Variants are measured side by side in one run and reported as ratios, so that other work on the machine matters little.
No network is needed: the model is the demo's, which is made if missing.

examples:
  python launch/bench.py                           about three minutes on two cores
  python launch/bench.py --model /data/my-llama --out runs/bench-llama --rounds 1
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import command, folder, make_parser

from hfprune_dist.errors import UserError
from hfprune_dist.store.machine import usable_cores

ASSETS = Path("runs/demo-assets")
# Tokens per window, if the model has as many positions.
TOKENS = 1024


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write it to the output folder."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", metavar="PATH", type=folder, help="a checkpoint folder; default: the demo's llama")
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=3, help="measured rounds, of which medians are taken"
    )
    default = Path("runs/bench")
    parser.add_argument("--out", metavar="DIR", type=folder, default=default, help=f"for results; default: {default}")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: at least 1")
    import torch
    from hfprune_launch.benchmark.scoring import measure_pass
    from hfprune_launch.demo.assets import QUIET_AND_OFFLINE, build
    from hfprune_launch.demo.prose import reference_prose
    from hfprune_launch.screen import make_console, say

    from hfprune_dist.checkpoints.checkpoint import open_checkpoint
    from hfprune_dist.results.markdown import table_of_texts
    from hfprune_dist.store.atomic_files import write_json, write_text

    os.environ.update(QUIET_AND_OFFLINE)
    if arguments.model is None:
        build(ASSETS)
    model: Path = arguments.model or ASSETS / "llama"
    checkpoint = open_checkpoint(model)
    if checkpoint.family.experts:
        raise UserError(f"--model {model}: a mixture of experts; give a model with one MLP in each layer")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    tokens = min(TOKENS, checkpoint.max_positions or TOKENS)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n\n".join(reference_prose().calibration), encoding="utf-8")
        lines = measure_pass(str(model), str(text), tokens, arguments.rounds)
    table = table_of_texts(["what", "measured"], [[what, f"{value:.3g} {unit}"] for what, value, unit in lines])
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_json(out / "bench.json", {"machine": machine, "model": str(model), "tokens": tokens, "pass": lines})
    write_text(out / "bench.md", table + "\n")
    say(make_console(), f"{table}\n\nwritten: {out / 'bench.json'}, bench.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
