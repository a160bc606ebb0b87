"""Processes of the fork server are what other tests assume: separate processes that end as they should."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from fork_server import EXECUTABLE, WORKER, forked

TELL = """
import json, os, random, sys
import numpy as np
told = {
    "pid": os.getpid(), "session": os.getsid(0), "arguments": sys.argv, "folder": os.getcwd(), "main": __name__,
    "draws": [random.random(), float(np.random.rand())], "paths": sys.path[:2], "environment": dict(os.environ),
    "threads": len(os.listdir("/proc/self/task")), "large": "deepspeed" in sys.modules, "input": sys.stdin.read(),
}
print(json.dumps(told))
print("as it was", file=sys.stderr)
"""


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


def told(*arguments, **options):
    result = run(*arguments, **options)
    assert (result.returncode, result.stderr) == (0, "as it was\n")
    return json.loads(result.stdout)


def test_a_fork_has_everything_of_its_own_but_the_imports(tmp_path, script):
    file, elsewhere = script(TELL), tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {"ONLY": "this\udcff", "PYTHONPATH": str(elsewhere)}
    (elsewhere / "sitecustomize.py").write_text("import os\nos.environ['CUSTOMIZED'] = '1'\n")
    one, two = (told(file, "--a", "b c", cwd=elsewhere, env=environment, input="text") for _ in range(2))
    assert one["arguments"] == [file, "--a", "b c"] and one["main"] == "__main__" and one["input"] == "text"
    assert one["folder"] == str(elsewhere) and one["paths"] == [str(tmp_path), str(elsewhere)]
    assert one["environment"]["ONLY"] == "this\udcff" and one["environment"]["CUSTOMIZED"] == "1"
    assert "HOME" not in one["environment"] and one["threads"] == 1 and one["large"]
    for key in ("pid", "session"):
        assert one[key] != two[key]
    assert not {*one["draws"]} & {*two["draws"]}
    assert os.getsid(0) not in (one["session"], two["session"])


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no"),
        ("import os; os._exit(7)", 7, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import atexit, sys; atexit.register(print, 'bye', file=sys.stderr)", 0, "bye"),
    ],
)
def test_ends(script, text, code, said):
    result = run(script(text))
    assert result.returncode == code and said in result.stderr


WAIT = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(6))
os.write(1, f"{os.getpid()}\\n".encode())  # at once, as two ranks write there
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 5),
        (signal.SIGUSR2, 6),
        (signal.SIGINT, -signal.SIGINT),
        (signal.SIGKILL, -signal.SIGKILL),
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


def test_it_waits_for_no_disk(script):
    """A real process would be told that there is no such file."""
    assert run(script("import os; print(os.fsync(-1))")).stdout == "None\n"


def test_its_own_processes_are_forks_too(script):
    """Only processes of the project's commands: others are left alone."""
    text = """
import subprocess, sys
from pathlib import Path
import hfprune_launch
help = [sys.executable, str(Path(hfprune_launch.__file__).with_name("report.py")), "--help"]
for command in (help, [sys.executable, "-c", "print('usage: none')"]):
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    print(started.args[1], started.communicate()[0].split()[0], started.returncode)
"""
    assert run(script(text)).stdout.splitlines() == ["-IS usage: 0", "-c usage: 0"]


def test_its_jobs_are_started_with_what_it_is_told(script):
    result = run(script("import sys; print(sys.executable)"), env={**os.environ, EXECUTABLE: "/its/python"})
    assert result.stdout == "/its/python\n"


def test_a_worker_of_pytest_runs_what_it_is_given_and_starts_real_processes():
    """As execnet gives it, a line of its own protocol at a time."""
    line = "import subprocess, sys; print('deepspeed' in sys.modules, subprocess.Popen.__module__)"
    result = run(str(WORKER), "-u", "-c", "import sys;exec(eval(sys.stdin.readline()))", input=f"{line!r}\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, "True subprocess\n", "")
