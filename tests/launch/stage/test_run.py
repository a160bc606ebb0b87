"""The end of a rank that fails, and its memory."""

import os
import subprocess
import sys

from hfprune_launch.stage.run import Provenance, write_stage_file
from made_stages import begun, stage_of

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.store.artifacts import Store

STAGE = stage_of("prune", "a 0.2")
# As when another rank is lost while rank 0 tokenizes a text, which takes hours.
LOST = f"""
import sys, time
from concurrent.futures import ThreadPoolExecutor
from hfprune_launch.stage import run

def lose_another(*_, **__):
    ThreadPoolExecutor(1).submit(time.sleep, 300)
    raise RuntimeError("connection closed by peer")

run.run_stage = lose_another
sys.argv = ["run.py", sys.argv[1], {STAGE.id!r}, "token"]
run.main()
"""


def test_a_rank_that_fails_ends_at_once_whatever_its_threads_do(tmp_path):
    store = Store(tmp_path)
    attempt = begun(store, STAGE)
    provenance = Provenance(RuntimeConfig(), {}, {})
    write_stage_file(store.handle(STAGE.id), STAGE, provenance, attempt.intent.number)
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
    (failure,) = attempt.failures()
    assert (failure.cause, failure.rank) == ("code", 3)


FAULTS = """
import resource
from hfprune_launch.stage.run import prepare_environment

prepare_environment()
for _ in range(3):
    tensors = [b"x" * 2**24 for _ in range(4)]
    del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def test_memory_that_was_freed_is_not_asked_of_the_system_again():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    first, _, last = map(int, run.stdout.split())
    assert last - first < 1000, "pages"
