"""Measure the cost of this project: the published formulation against ours, scaling, ranks, pruning, the launcher.

Variants are measured side by side in one run and reported as ratios (the launcher's waiting times in seconds), so that
other work on the machine matters little. No network is needed: the model is the demo's, which is made if missing.

examples:
  python launch/bench.py                                  all sections, ten to twenty minutes on one core
  python launch/bench.py --quick --only pass,criteria
  python launch/bench.py --model /data/my-llama --out runs/bench-llama
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import ListAction, folder, make_parser, run

from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.store.machine import usable_cores

if TYPE_CHECKING:
    from hfprune_launch.benchmark.results import Findings
    from hfprune_launch.benchmark.settings import Settings

SECTIONS = ("pass", "criteria", "scaling", "ranks", "prune", "launcher")
ASSETS = Path("runs/demo-assets")
ROUNDS, QUICK_ROUNDS = 3, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen sections, print the table, and write it to the output folder with all other results."""
    return run(lambda: _bench(argv))


def _bench(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    run_sections(_sections(arguments.only), arguments)
    return 0


def run_sections(sections: list[str], arguments: argparse.Namespace) -> None:
    """Measure section by section; the findings of each are on disk before the next one begins."""
    from hfprune_launch.benchmark.plot import can_plot, plot
    from hfprune_launch.benchmark.results import Findings, markdown
    from hfprune_launch.benchmark.settings import require_measurable
    from hfprune_launch.screen import make_console, say

    from hfprune_dist.checkpoints.checkpoint import open_checkpoint
    from hfprune_dist.store.atomic_files import write_json, write_text

    if arguments.model is not None:
        require_measurable(open_checkpoint(arguments.model))
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    findings, tell = Findings(), partial(say, make_console(works_on=True))
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        settings = _settings(arguments, Path(scratch))
        for section in sections:
            started = time.monotonic()
            findings += _measure(section, settings)
            tell(f"{section}: {time.monotonic() - started:.0f} s")
            write_json(out / "bench.json", {"machine": _machine(), **_told(settings), **findings.to_json()})
    table = markdown(findings.lines)
    write_text(out / "bench.md", table + "\n")
    charts = "" if can_plot() else "; for charts: pip install 'hfprune-dist[bench]'"
    if findings.charts and can_plot():
        plot(findings.charts, out / "bench.png")
        charts = ", bench.png"
    tell(f"\n{table}\n\nwritten: {out / 'bench.json'}, bench.md{charts}")


def _measure(section: str, settings: Settings) -> Findings:
    from hfprune_launch.benchmark import launcher, pruning, ranks, scaling, scoring

    measures: Mapping[str, Callable[[Settings], Findings]] = {
        "pass": scoring.measure_pass,
        "criteria": scoring.measure_criteria,
        "scaling": scaling.measure_scaling,
        "ranks": ranks.measure_ranks,
        "prune": pruning.measure_prune,
        "launcher": launcher.measure_launcher,
    }
    return measures[section](settings)


def _settings(arguments: argparse.Namespace, scratch: Path) -> Settings:
    """Return settings with the user's model, or the demo's (made if missing), and with the demo's text."""
    from hfprune_launch.benchmark.settings import Settings, tokens_of
    from hfprune_launch.demo.assets import QUIET_AND_OFFLINE, build
    from hfprune_launch.demo.prose import reference_prose

    from hfprune_dist.checkpoints.checkpoint import open_checkpoint

    os.environ.update(QUIET_AND_OFFLINE)
    if arguments.model is None:
        build(ASSETS)
    text = scratch / "text.txt"
    text.write_text("\n\n".join(reference_prose().calibration), encoding="utf-8")
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    model = arguments.model or ASSETS / "llama"
    tokens = tokens_of(open_checkpoint(model))
    return Settings(str(model), str(text), tokens, rounds, arguments.quick, scratch)


def _told(settings: Settings) -> dict[str, Any]:
    return {
        "settings": {"model": settings.model, "tokens": settings.tokens, "rounds": settings.rounds},
        "quick": settings.quick,
    }


def _machine() -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _sections(only: str | None) -> list[str]:
    from hfprune_dist.config.load import parse_list

    chosen = list(SECTIONS) if only is None else parse_list("--only", only)
    for section in chosen:
        if chosen.count(section) > 1:
            raise UserError(f"--only: {section!r} is named twice")
        if section not in SECTIONS:
            raise UserError(
                f"--only: no section {section!r}{did_you_mean(section, SECTIONS)}; valid: {', '.join(SECTIONS)}"
            )
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--model", metavar="PATH", type=folder, help="a checkpoint folder; default: the demo's llama")
    told = f"sections to measure, of {', '.join(SECTIONS)}; default: all"
    parser.add_argument("--only", metavar="A,B", action=ListAction, help=told)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and points, to see that it works")
    default = Path("runs/bench")
    parser.add_argument("--out", metavar="DIR", type=folder, default=default, help=f"for results; default: {default}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
