"""Ranks that are forks: alike, apart, and never left behind, whoever is killed at which moment."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from fork_server import OwnProcess
from hfprune_launch.local import warm
from hfprune_launch.local.warm import WarmProcess
from ranks import on_ranks

PATH = str(Path(__file__).resolve().parents[2])
HERE = "launch.local.test_warm"
# Whoever sees to it that this doesn't end by itself gives the reason.
FOR_EVER_S = 600.0
BE_LIGHT = "from hfprune_launch.local import warm; warm.IMPORTED = [{}]; warm.be_warm_process()"


class ThreadedProcess(OwnProcess):
    THREAD = f"import threading, time; threading.Thread(target=time.sleep, args=({FOR_EVER_S},), daemon=True).start()"
    PROGRAM = ("-c", f"{THREAD}; {BE_LIGHT.format('')}")


class OfflineProcess(OwnProcess):
    FAULT = "import socket; socket.create_server = lambda *_, **__: open('/no loopback')"
    PROGRAM = ("-c", f"{FAULT}; {BE_LIGHT.format('')}")


def join_and_tell(arguments):
    """A rank's main function: tell about this process, in the log, and do as the arguments say."""
    from hfprune_dist.distributed.world import join_world

    world = join_world(os.environ, 5)
    told = {
        "ranks": world.all_gather(world.rank),
        "environment": os.environ.get("OF_THIS_STAGE"),
        "folder": str(Path.cwd()),
        "hash": hash("text"),
        "processes": [os.getppid(), os.getpid()],
        "threads": sys.modules["torch"].get_num_threads(),
    }
    os.write(1, f"told: {json.dumps(told)}\n".encode())  # at once, as all ranks write there
    if arguments:
        rank, action = arguments
        if world.rank == int(rank):
            exec(action)  # in the words of the test
        time.sleep(FOR_EVER_S)


@pytest.fixture(scope="module")
def process():
    with closing(WarmProcess()) as process:
        yield process


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def start(process, log, *arguments, main=f"{HERE}:join_and_tell", ranks=2, **environment):
    log.write_text("")
    process.start(main, arguments, ranks, {**os.environ, "OMP_NUM_THREADS": "1", **environment}, log)


def told(log):
    lines = log.read_text().splitlines()
    return [json.loads(line.removeprefix("told: ")) for line in lines if line.startswith("told: ")]


def at_work(log, ranks=2):
    """Wait until all ranks have told about themselves; return the warm process and theirs."""
    deadline = time.monotonic() + 300
    while not log.exists() or len(found := told(log)) < ranks:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    alive = {process.pid: process for process in psutil.process_iter()}  # one that fails may be gone already
    pids = dict.fromkeys(pid for those in found for pid in those["processes"])
    return [alive[pid] for pid in pids if pid in alive]


def all_gone(processes):
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_ranks_join_in_surroundings_of_their_own(process, log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("raise ImportError('a file of the user has the name of a library')")
    for value, threads in (("first", "1"), ("second", "2")):
        start(process, log, ranks=2, OF_THIS_STAGE=value, OMP_NUM_THREADS=threads)
        assert process.ended(300) == {0: 0, 1: 0}
        one, other = told(log)
        assert one["ranks"] == other["ranks"] == [0, 1] and one["hash"] == other["hash"]
        assert (one["environment"], one["folder"], one["threads"]) == (value, str(tmp_path), int(threads))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError):
        start(process, log)


def test_a_process_that_has_only_imported_does_not_grow_with_the_stages_that_it_starts(log, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PATH)
    with closing(OwnProcess()) as process:
        process.begin()
        while "libtorch" not in Path(f"/proc/{process._process.pid}/maps").read_text():
            time.sleep(0.1)  # it imports before there are ranks
        start(process, log)
        warm_process = at_work(log)[0]
        assert warm_process.pid == process._process.pid
        assert process.ended(300) == {0: 0, 1: 0} and "hfprune_launch.local.warm" in warm_process.cmdline()

        def size_after(stages):
            for _ in range(stages):
                start(process, log, main="builtins:list")
                assert process.ended(300) == {0: 0, 1: 0}
            return warm_process.memory_full_info().uss, warm_process.num_fds(), warm_process.num_threads()

        (before, *handles), (after, *left) = size_after(5), size_after(50)
        assert after < before + 2**20 and left == handles and left[1] == 1


@pytest.mark.parametrize(("action", "code"), [("os.kill(os.getpid(), 9)", -9), ("os._exit(3)", 3), ("1 / 0", 1)])
def test_a_rank_that_fails_takes_the_others_along_and_is_the_one_that_is_reported(process, log, action, code):
    start(process, log, "1", action)
    ranks = at_work(log)[1:]
    assert process.ended(60) == {1: code} and all_gone(ranks)
    assert action != "1 / 0" or "ZeroDivisionError" in log.read_text()


def test_a_rank_that_ignores_the_request_to_end_is_killed(monkeypatch):
    monkeypatch.setattr(warm, "GRACE_S", 0.2)

    def act(world):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        world.barrier()
        assert world.rank == 0
        time.sleep(FOR_EVER_S)

    assert on_ranks(2, act) == [-signal.SIGTERM, 1], "the first, of which nothing is reported, and the second"


@pytest.mark.parametrize("end", ["killed", "killed while idle", "closed"])
def test_ranks_end_with_the_warm_process_and_the_next_ones_start(process, log, end):
    start(process, log, *([] if end == "killed while idle" else ["0", "pass"]))
    processes = at_work(log)
    if end == "closed":
        assert process.ended(0.01) is None
        process.close()
    elif end == "killed while idle":
        assert process.ended(60) == {0: 0, 1: 0}
        processes[0].kill()
    else:
        processes[0].kill()
        assert process.ended(60) == {}
    assert all_gone(processes)
    start(process, log)
    assert process.ended(300) == {0: 0, 1: 0}


# A launcher whose warm process imports little, and its ranks.
LAUNCHER = """
import os, signal, sys
from pathlib import Path
from hfprune_launch.local.warm import WarmProcess
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup may have changed
WarmProcess.PROGRAM = ("-c", sys.argv[2])
process = WarmProcess()
process.start("light:main", [], 2, dict(os.environ), Path(sys.argv[1]))
print(process._process.pid, flush=True)
process.ended(600)
"""
RANK = f"""
import json, os, time
def main(_):
    told = {{"processes": [os.getppid(), os.getpid()]}}
    os.write(1, f"told: {{json.dumps(told)}}\\n".encode())
    time.sleep({FOR_EVER_S})
"""


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGKILL, "imports"), (signal.SIGHUP, "ranks")],
    ids=["killed during imports", "closed terminal"],
)
def test_nothing_outlives_the_launcher(log, tmp_path, number, moment):
    (tmp_path / "light.py").write_text(RANK)
    launcher = subprocess.Popen(
        [sys.executable, "-P", "-c", LAUNCHER, str(log), BE_LIGHT.format("'torch'")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    processes = [psutil.Process(int(launcher.stdout.readline()))]
    if moment == "ranks":
        processes = at_work(log)
    launcher.send_signal(number)
    launcher.communicate()
    assert all_gone(processes)


def test_where_a_library_does_what_forks_do_not_survive_ranks_are_new_interpreters(log, tmp_path, monkeypatch):
    (tmp_path / "rank.py").write_text("import os, sys\ndef main(_):\n    print(os.environ['RANK'], *sys.orig_argv)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with closing(ThreadedProcess()) as process:
        start(process, log, main="rank:main")
        assert process.ended(300) == {0: 0, 1: 0}
    lines = sorted(log.read_text().splitlines())
    assert [(line[0], "from rank import main" in line) for line in lines] == [("0", True), ("1", True)]


def test_what_keeps_ranks_from_starting_is_in_the_log(log):
    with closing(OfflineProcess()) as process:
        start(process, log)
        assert process.ended(300) == {} and "No such file or directory: '/no loopback'" in log.read_text()
