"""Measure this machine, and a sweep's stages in a unit of time that depends little on the machine.

The unit, u, is the time of one forward of 4,096 tokens (16 windows of 256) through the body of the demo's Llama, by
plain transformers in float32, on all cores or on one GPU. The demo's files are made if they are missing.

examples:
  python launch/bench.py             u, what a stage that does nothing takes, and the demo's stages if they have run
  python launch/bench.py runs/my     the same with another sweep's stages
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import command, folder, make_parser

from hfprune_dist.store.machine import count_gpus, usable_cores

if TYPE_CHECKING:  # commands import what they need once they run
    from hfprune_launch.sweep_folder import Sweep

DEMO, ASSETS = Path("runs/demo"), Path("runs/demo-assets")
WINDOWS, TOKENS = 16, 256
ROUNDS = 3
NOTHING = "hfprune_launch.bench:do_nothing"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("sweep", metavar="DIR", type=folder, nargs="?", help=f"a sweep's folder; default: {DEMO}")
    given: Path | None = parser.parse_args(argv).sweep
    import torch
    from hfprune_launch.demo.assets import QUIET_AND_OFFLINE, build
    from hfprune_launch.screen import make_console, plain_table, say
    from hfprune_launch.sweep_folder import read_sweep, recorded_sweep

    sweep, console = read_sweep(given) if given else recorded_sweep(DEMO), make_console()
    os.environ.update(QUIET_AND_OFFLINE)
    build(ASSETS)
    unit = seconds_of_a_forward(ASSETS / "llama")
    device = torch.cuda.get_device_name() if count_gpus() else f"a CPU, threads: {torch.get_num_threads()}"
    say(console, f"u = {unit:.3g} s: {WINDOWS} x {TOKENS} tokens on {device}, torch {torch.__version__}")
    times = {"a stage that does nothing": [seconds_of_nothing()]}
    if sweep is not None:
        every = list(stage_seconds(sweep))
        kinds = dict.fromkeys(kind for kind, _ in every)
        times |= {f"{sweep.out}: {kind}": [seconds for own, seconds in every if own == kind] for kind in kinds}
        times[f"{sweep.out}: all"] = [seconds for _, seconds in every]
    table = plain_table("stages", "number", "seconds", "u", "longest, u")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds in times.items():
        total, longest = sum(seconds), max(seconds, default=0.0)
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


def seconds_of_nothing() -> float:
    """Return the seconds in which two ranks, or one for each GPU, start, join and leave, after those of a first stage,
    which have waited for imports.
    """
    from hfprune_launch.local.warm import WarmProcess

    with closing(WarmProcess()) as warm, tempfile.NamedTemporaryFile() as log:
        for _ in range(2):
            began = time.perf_counter()
            warm.start(NOTHING, [], count_gpus() or 2, os.environ, Path(log.name))
            while (codes := warm.ended(1.0)) is None:
                pass
            assert set(codes.values()) == {0}, codes
    return time.perf_counter() - began


def do_nothing(_arguments: Sequence[str]) -> None:
    """Be a rank of a stage that does nothing."""
    from hfprune_dist.distributed.world import join_world, leave_world

    join_world(os.environ, timeout_minutes=1, reproducible=True)
    leave_world()


def stage_seconds(sweep: Sweep) -> Iterator[tuple[str, float]]:
    """Yield (kind of stage, seconds) for every stage that has run, all attempts and the start of ranks included."""
    from hfprune_dist.store.attempts import Ledger

    for stage in sweep.plan.stages.values():
        ends = Ledger(sweep.store).ends(stage.id)
        times = [end.at - attempt.intent.created for attempt, end in ends if end is not None]
        if times:
            yield stage.kind, sum(times)


if __name__ == "__main__":
    sys.exit(main())
