"""The end of a rank that fails."""

import os
import subprocess
import sys

from hfprune_dist.store.artifacts import Store

STAGE = "prune/0123456789abcdef0123"
# As when another rank is lost while rank 0 tokenizes a text, which takes hours.
LOST = f"""
import sys, time
from concurrent.futures import ThreadPoolExecutor
from hfprune_launch.stage import run

def lose_another(*_, **__):
    ThreadPoolExecutor(1).submit(time.sleep, 300)
    raise RuntimeError("connection closed by peer")

run.run_stage = lose_another
sys.argv = ["run.py", sys.argv[1], {STAGE!r}]
run.main()
"""


def test_a_rank_that_fails_ends_at_once_whatever_its_threads_do(tmp_path):
    handle = Store(tmp_path).handle(STAGE)
    handle.work.mkdir(parents=True)
    environment = {**os.environ, "RANK": "3"}
    ended = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback") and ended.stderr.endswith("RuntimeError: connection closed by peer\n")
    (failure,) = handle.failures()
    assert (failure.cause, failure.rank) == ("code", 3)
