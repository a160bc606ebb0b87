"""Measure the cost of this project: the published formulation against ours, ranks, and waiting for commands.

Variants are measured side by side in one run and reported as ratios, so that other work on the machine matters little.
No network is needed: the model is the demo's, which is made if missing.

examples:
  python launch/bench.py                           all sections, about five minutes on two cores
  python launch/bench.py --rounds 1 --only pass
  python launch/bench.py --model /data/my-llama --out runs/bench-llama
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import ListAction, folder, make_parser, run
from hfprune_launch.project import PROJECT

from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.store.machine import usable_cores

ASSETS = Path("runs/demo-assets")
# Tokens per window, if the model has as many positions.
TOKENS = 1024
Lines = list[tuple[str, float, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen sections, print the table, and write it to the output folder."""
    return run(lambda: _bench(argv))


def _bench(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    sections = _sections(arguments.only)
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: at least 1")
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
    findings: dict[str, Lines] = {}
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n\n".join(reference_prose().calibration), encoding="utf-8")
        for section in sections:
            findings[section] = _measure(section, str(model), str(text), tokens, arguments.rounds)
    measured = [
        [section, what, f"{value:.3g} {unit}"] for section in sections for what, value, unit in findings[section]
    ]
    table = table_of_texts(["section", "what", "measured"], measured)
    write_json(out / "bench.json", {"machine": _machine(), "model": str(model), "tokens": tokens, **findings})
    write_text(out / "bench.md", table + "\n")
    say(make_console(), f"{table}\n\nwritten: {out / 'bench.json'}, bench.md")
    return 0


def _measure(section: str, model: str, text: str, tokens: int, rounds: int) -> Lines:
    if section == "commands":
        return _measure_commands(rounds)
    from hfprune_launch.benchmark import ranks, scoring

    measure = {"pass": scoring.measure_pass, "ranks": ranks.measure_ranks}[section]
    return measure(model, text, tokens, rounds)


def _measure_commands(rounds: int) -> Lines:
    """Measure how long a user waits for commands; none can be faster than the bare interpreter."""
    from hfprune_launch.benchmark.measurement import paired_seconds

    sweep = [sys.executable, str(PROJECT.packages["hfprune_launch"] / "sweep.py")]
    settings = ["--config", str(PROJECT.configs / "demo.yaml"), "--show-config"]
    commands = {
        "python -c ''": [sys.executable, "-c", ""],
        "--help": [*sweep, "--help"],
        "--show-config": [*sweep, *settings],
    }
    variants = {
        name: lambda command=command: subprocess.run(command, check=True, capture_output=True)
        for name, command in commands.items()
    }
    return [(name, statistics.median(times), "s") for name, times in paired_seconds(variants, rounds).items()]


def _machine() -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


SECTIONS = ("pass", "ranks", "commands")


def _sections(only: str | None) -> list[str]:
    from hfprune_dist.config.load import parse_list

    chosen = list(SECTIONS) if only is None else parse_list("--only", only)
    for section in chosen:
        if section not in SECTIONS:
            hint = did_you_mean(section, SECTIONS)
            raise UserError(f"--only: no section {section!r}{hint}; valid: {', '.join(SECTIONS)}")
    return list(dict.fromkeys(chosen))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--model", metavar="PATH", type=folder, help="a checkpoint folder; default: the demo's llama")
    told = f"sections to measure, of {', '.join(SECTIONS)}; default: all"
    parser.add_argument("--only", metavar="A,B", action=ListAction, help=told)
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=3, help="measured rounds, of which medians are taken"
    )
    default = Path("runs/bench")
    parser.add_argument("--out", metavar="DIR", type=folder, default=default, help=f"for results; default: {default}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
