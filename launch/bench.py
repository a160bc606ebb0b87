"""Measure this machine, and a sweep's stages in a unit of time that depends little on the machine.

The unit, u, is the time of one forward of 4,096 tokens (16 windows of 256) through the body of the demo's Llama, by
plain transformers in float32, on all cores or on one GPU. It needs the demo's files (demo_assets.py).

examples:
  python launch/bench.py             u, and the demo's stages if they have run
  python launch/bench.py runs/my     the same with another sweep's stages
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, folder, make_parser

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.errors import UserError
from hfprune_dist.store.machine import count_gpus, usable_cores

DEMO, ASSETS = Path("runs/demo"), Path("runs/demo-assets")
WINDOWS, TOKENS = 16, 256
ROUNDS = 3


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("sweep", metavar="DIR", type=folder, nargs="?", help=f"a sweep's folder; default: {DEMO}")
    given: Path | None = parser.parse_args(argv).sweep
    import torch
    from hfprune_launch.screen import make_console, plain_table, say
    from hfprune_launch.sweep_folder import read_sweep, recorded_sweep

    from hfprune_dist.store.attempts import CUT_OFF, Ledger

    sweep, console = read_sweep(given) if given else recorded_sweep(DEMO), make_console()
    if not (ASSETS / "llama").is_dir():
        raise UserError(f"{ASSETS}: no llama there; `python launch/demo_assets.py` makes it")
    unit = seconds_of_a_forward(ASSETS / "llama")
    device = torch.cuda.get_device_name() if count_gpus() else f"a CPU, threads: {torch.get_num_threads()}"
    say(console, f"u = {unit:.3g} s: {WINDOWS} x {TOKENS} tokens on {device}, torch {torch.__version__}")
    if sweep is None:
        return 0
    times: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "all")}  # all attempts and starts of ranks included
    for stage in sweep.plan.stages.values():
        ends = Ledger(sweep.store).ends(stage.id)
        took = [
            end.at - next((run.started for run in attempt.runs()), attempt.intent.created)
            for attempt, end in ends
            if end is not None and end.cause != CUT_OFF
        ]
        for name in (stage.kind, "all") if took else ():
            times[name].append(sum(took))
    numbers = "number", "seconds", "u", "longest, u"
    table = plain_table(f"stages of {sweep.out}", *numbers, numbers=numbers)
    for name, seconds in times.items():
        if seconds:
            total, longest = sum(seconds), max(seconds)
            table.add_row(name, f"{len(seconds)}", f"{total:.1f}", f"{total / unit:.2f}", f"{longest / unit:.2f}")
    console.print(table)
    return 0


def seconds_of_a_forward(model: Path) -> float:
    """Return u, the median of a few rounds."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(usable_cores())
    body = AutoModel.from_pretrained(model, dtype=torch.float32).to("cuda" if count_gpus() else "cpu")
    vocabulary = body.config.vocab_size
    windows = torch.randint(vocabulary, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0)).to(body.device)
    took = []
    for _ in range(ROUNDS + 1):  # the first of them loads the weights' pages
        began = time.perf_counter()
        with torch.inference_mode():
            body(input_ids=windows, use_cache=False)
        if count_gpus():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])
