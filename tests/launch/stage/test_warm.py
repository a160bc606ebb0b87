"""Ranks that are forks: alike, apart, and never left behind, whoever is killed at which moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fork_server import OwnProcess
from hfprune_launch.stage import warm
from ranks import on_ranks

TESTS = Path(__file__).resolve().parents[2]
# Whoever sees to it that this doesn't end by itself gives the reason.
FOR_EVER_S = 600.0


def join_and_tell(arguments):
    """A rank's main function: tell about this process, in the log, and do as the arguments say."""
    from hfprune_dist.distributed.world import join_world

    world = join_world(os.environ, 5)
    told = {
        "ranks": world.all_gather(world.rank),
        "environment": os.environ.get("OF_THIS_STAGE"),
        "folder": str(Path.cwd()),
        "hash": hash("text"),
        "processes": [psutil.Process().parent().ppid(), os.getppid(), os.getpid()],
        "threads": sys.modules["torch"].get_num_threads(),
    }
    os.write(1, f"told: {json.dumps(told)}\n".encode())  # at once, as all ranks write there
    if arguments:
        rank, action = arguments
        if world.rank == int(rank):
            exec(action)  # in the words of the test
        time.sleep(FOR_EVER_S)


def tell_of_start(_arguments):
    is_fork = "-m" in sys.orig_argv
    os.write(1, f"told: {json.dumps([is_fork, os.environ['RANK']])}\n".encode())


@pytest.fixture(scope="module")
def process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{TESTS}:{Path(__file__).parent}")
        process = OwnProcess()
        yield process
        process.close()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def start(process, log, *arguments, main="test_warm:join_and_tell", ranks=2, **environment):
    with log.open("wb") as stream:
        return process.start(main, arguments, ranks, {**os.environ, "OMP_NUM_THREADS": "1", **environment}, stream)


def told(log):
    lines = log.read_text().splitlines()
    return [json.loads(line.removeprefix("told: ")) for line in lines if line.startswith("told: ")]


def at_work(log, ranks=2):
    """Wait until all ranks have told about themselves; return the warm process, the watcher and theirs."""
    deadline = time.monotonic() + 300
    while len(found := told(log)) < ranks:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    return [psutil.Process(pid) for pid in dict.fromkeys(pid for it in found for pid in it["processes"])]


def all_gone(processes):
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_ranks_join_in_surroundings_of_their_own(process, log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("raise ImportError('a file of the user has the name of a library')")
    for value, threads in (("first", "1"), ("second", "2")):
        ranks = start(process, log, ranks=2, OF_THIS_STAGE=value, OMP_NUM_THREADS=threads)
        assert ranks.ended(300) and ranks.codes == {0: 0, 1: 0}
        one, other = told(log)
        assert one["ranks"] == other["ranks"] == [0, 1] and one["hash"] == other["hash"]
        assert (one["environment"], one["folder"], one["threads"]) == (value, str(tmp_path), int(threads))


def test_nothing_but_imports_happens_before_the_fork(process, log):
    ranks = start(process, log)
    warm_process = at_work(log)[0]
    assert ranks.ended(60) and warm_process.num_threads() == 1


@pytest.mark.parametrize(
    ("action", "code"),
    [("os.kill(os.getpid(), 9)", -9), ("os.abort()", -6), ("os._exit(3)", 3), ("1 / 0", 1)],
)
def test_a_rank_that_fails_takes_the_others_along_and_is_the_one_that_is_reported(process, log, action, code):
    ranks = start(process, log, "1", action)
    processes = at_work(log)[1:]
    assert ranks.ended(60) and ranks.codes == {1: code} and all_gone(processes)
    assert action != "1 / 0" or "ZeroDivisionError" in log.read_text()


def test_a_rank_that_ignores_the_request_to_end_is_killed(monkeypatch):
    monkeypatch.setattr(warm, "GRACE_S", 0.2)

    def act(world):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        world.barrier()
        assert world.rank == 0
        time.sleep(FOR_EVER_S)

    assert on_ranks(2, act) == [-signal.SIGTERM, 1], "the first, of which nothing is reported, and the second"


def test_ranks_end_when_they_are_told_to(process, log):
    ranks = start(process, log, "0", "pass")
    processes = at_work(log)[1:]
    ranks.end()
    assert all_gone(processes)


@pytest.mark.parametrize("victim", ["watcher", "warm process"])
def test_ranks_end_with_those_who_started_them_and_the_next_ones_start(process, log, victim):
    ranks = start(process, log, "0", "pass")
    processes = at_work(log)[victim == "watcher" :]
    processes[0].kill()
    assert ranks.ended(60) and ranks.codes == {} and all_gone(processes)
    again = start(process, log)
    assert again.ended(300) and again.codes == {0: 0, 1: 0}


LAUNCHER = """
import os, signal, sys
from pathlib import Path
from hfprune_launch.stage.warm import WarmProcess
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup may have changed
process, log = WarmProcess(), Path(sys.argv[1]).open("wb")
ranks = process.start("test_warm:join_and_tell", ["0", "pass"], 2, dict(os.environ), log)
print(process._process.pid, flush=True)
ranks.ended(600)
"""


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGKILL, "imports"), (signal.SIGKILL, "ranks"), (signal.SIGHUP, "ranks")],
    ids=["killed during imports", "killed", "closed terminal"],
)
def test_nothing_outlives_the_launcher(log, number, moment):
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(log)],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{Path(__file__).parent}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    processes = [psutil.Process(int(launcher.stdout.readline()))]
    if moment == "ranks":
        processes = at_work(log)
    launcher.send_signal(number)
    launcher.communicate()
    assert all_gone(processes)


def test_memory_stays_the_same_over_many_stages(process, log):
    def used():
        ranks = start(process, log)
        warm_process = at_work(log)[0]
        assert ranks.ended(60)
        return warm_process.memory_info().rss, warm_process.num_fds()

    before = used()
    for _ in range(50):
        assert start(process, log, main="test_warm:tell_of_start", ranks=1).ended(60) and told(log) == [[True, "0"]]
    after = used()
    assert after[0] < before[0] + 2**21 and after[1] == before[1]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            "sitecustomize",
            f"import threading, time\nthreading.Thread(target=time.sleep, args=({FOR_EVER_S},), daemon=True).start()\n",
        ),
        ("lm_eval", "raise ImportError('broken')\n"),
    ],
    ids=["starts a thread", "can't be imported"],
)
def test_where_a_library_does_what_forks_do_not_survive_ranks_are_new_interpreters(
    process, log, tmp_path, monkeypatch, module, text
):
    (tmp_path / f"{module}.py").write_text(text)
    process.close()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    ranks = start(process, log, main="test_warm:tell_of_start")
    assert ranks.ended(300) and ranks.codes == {0: 0, 1: 0}
    assert sorted(told(log)) == [[False, "0"], [False, "1"]]
    process.close()
