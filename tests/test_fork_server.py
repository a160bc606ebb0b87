"""Processes of the fork server are what other tests assume: separate processes that end as they should."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from fork_server import forked


@pytest.fixture
def script(tmp_path):
    def write(text):
        file = tmp_path / "script.py"
        file.write_text(text)
        return str(file)

    return write


def run(*arguments, **options):
    command = forked([sys.executable, *arguments])
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(print, 'bye', file=sys.stderr)", 0, "bye"),
    ],
)
def test_ends(script, text, code, said):
    result = run(script(text))
    assert result.returncode == code and said in result.stderr


WAIT = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
os.write(1, f"{os.getpid()}\\n".encode())  # at once, as two ranks write there
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 5),
        (signal.SIGINT, -signal.SIGINT),
    ],
)
@pytest.mark.parametrize("torchrun", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_signals_reach_it(script, torchrun, number, code):
    """Also the signal that nobody can catch; and ranks do not outlive the process that stands in for torchrun."""
    process = subprocess.Popen(
        forked([sys.executable, *torchrun, script(WAIT)]), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pids = [int(process.stdout.readline()) for _ in range(2 if torchrun else 1)]
    process.send_signal(number)
    process.wait(60)
    assert process.returncode == (-number if torchrun else code)
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


RANKS = """
import os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
sums = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(sums)
told = f"{sums.item()} {os.environ['LOCAL_RANK']} {os.environ['LOCAL_WORLD_SIZE']}\\n"
os.write(1, told.encode())  # at once, as three ranks write there
if len(sys.argv) > 1:
    dist.get_rank() == 1 and os._exit(int(sys.argv[1]))
    time.sleep(60)
os._exit(0)
"""


def test_ranks_are_joined(script):
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--log-dir=/somewhere"]
    result = run(*ranks, script(RANKS))
    assert result.returncode == 0 and sorted(result.stdout.splitlines()) == ["6 0 3", "6 1 3", "6 2 3"]


def test_one_rank_takes_the_others_along(script):
    result = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", script(RANKS), "9")
    assert result.returncode == 1 and "exitcode  : 9" in result.stderr.partition("Root Cause")[2]
