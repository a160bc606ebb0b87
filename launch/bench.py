"""Measure this machine and what the project takes, in a unit that makes times depend little on the machine.

The unit, u, is the time of one forward of 4,096 tokens (16 windows of 256) through the body of the demo's Llama, by
plain transformers in float32, on all cores or on one GPU. It needs the demo's files (demo_assets.py). Shown in u: a
stage that does nothing, after a first one has waited for imports; a sweep's stages, with all their attempts and the
start of ranks; and the last run of the tests by tests/run.sh.

examples:
  python launch/bench.py             with the demo's stages, if they have run
  python launch/bench.py runs/my     with another sweep's stages
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, make_parser, path_given

from hfprune_dist.errors import UserError
from hfprune_dist.store.machine import count_gpus, usable_cores

DEMO, ASSETS = Path("runs/demo"), Path("runs/demo-assets")
WINDOWS, TOKENS = 16, 256
ROUNDS = 3
TESTS = Path("runs/tests.xml")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("sweep", metavar="DIR", type=path_given, nargs="?", help=f"a sweep's folder; default: {DEMO}")
    given: Path | None = parser.parse_args(argv).sweep
    import torch
    from hfprune_launch.screen import make_console, plain_table, say
    from hfprune_launch.sweep_folder import read_sweep, recorded_sweep

    from hfprune_dist.store.attempts import Cause, Ledger

    sweep, console = read_sweep(given) if given else recorded_sweep(DEMO), make_console()
    if not (ASSETS / "llama").is_dir():
        raise UserError(f"{ASSETS}: no llama there; `python launch/demo_assets.py` makes it")
    unit = seconds_of_a_forward(ASSETS / "llama")
    device = torch.cuda.get_device_name() if count_gpus() else f"a CPU, threads: {torch.get_num_threads()}"
    say(console, f"u = {unit:.3g} s: {WINDOWS} x {TOKENS} tokens on {device}, torch {torch.__version__}")
    took: dict[str, list[float]] = {"a stage that does nothing": [seconds_of_nothing()]}
    if sweep is not None:
        ledger = Ledger(sweep.store)
        for stage in sweep.plan.stages.values():
            ends = [(attempt, end) for attempt, end in ledger.ends(stage.id) if end and end.cause != Cause.CUT_OFF]
            begun = [next((run.started for run in each.runs()), each.intent.created) for each, _ in ends]
            for name in (stage.kind, f"all of {sweep.out}") if ends else ():
                took.setdefault(name, []).append(sum(end.at for _, end in ends) - sum(begun))
    rows = [(name, len(times), sum(times)) for name, times in took.items()]
    if TESTS.is_file() and (told := re.search(r'tests="(\d+)" time="([\d.]+)"', TESTS.read_text(encoding="utf-8"))):
        rows.append(("all tests of the last run", int(told[1]), float(told[2])))
    table = plain_table("", "number", "seconds", "u", numbers=("number", "seconds", "u"))
    for name, number, seconds in rows:
        table.add_row(name, f"{number:,}", f"{seconds:.1f}", f"{seconds / unit:.2f}")
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
    body = AutoModel.from_pretrained(model, dtype=torch.float32, use_kernels=False)
    body = body.to("cuda" if count_gpus() else "cpu")
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


def seconds_of_nothing() -> float:
    """Return the time in which two ranks, or one for each GPU, start, join and leave."""
    from hfprune_launch.local.warm import WarmProcess

    with closing(WarmProcess()) as warm, tempfile.NamedTemporaryFile() as log:
        for _ in range(2):
            began = time.perf_counter()
            warm.start("hfprune_launch.bench:do_nothing", [], count_gpus() or 2, os.environ, Path(log.name))
            while (codes := warm.ended(1.0)) is None:
                pass
            assert set(codes.values()) == {0}, Path(log.name).read_text(encoding="utf-8")
        return time.perf_counter() - began


def do_nothing(_arguments: Sequence[str]) -> None:
    """Be a rank of a stage that does nothing."""
    from hfprune_dist.distributed.world import join_world, leave_world

    join_world(os.environ, timeout_minutes=1, reproducible=True).barrier()  # none leaves while another joins
    leave_world()
