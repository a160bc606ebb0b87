"""Causes found in real logs, captured from Slurm 24.11, gloo of torch 2.13 and CUDA."""

import time

import pytest
from hfprune_launch.slurm.attempt_records import Run
from hfprune_launch.slurm.attempts import Attempts
from hfprune_launch.slurm.causes import RETRIES, Cause
from hfprune_launch.slurm.exit_causes import explain_end
from hfprune_launch.slurm.job_info import JobInfo
from hfprune_launch.slurm.log_signs import SIGNALS, SIGNS, START, last_start, since_last_start

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Failure, write_failure_record
from hfprune_dist.store.stage import Input, Stage

STAGE = Stage("importance", "a", {}, {"model": Input("digest", "/somewhere")})
GLOO = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/"
CLOSED = (
    f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:29375. This is typically caused by a remote worker "
    "crashing. Check the logs of the remote worker before reporting an error."
)
RESET = f"{GLOO}pair.cc:537] Read error [127.0.0.1]:7072: Connection reset by peer."
LATE = f"{GLOO}unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
NO_MASTER = (
    "torch.distributed.DistNetworkError: The client socket has timed out after 4000ms while trying to connect to "
    "(127.0.0.1, 29712)."
)
NOT_ALL = "torch.distributed.DistStoreError: Timed out after 5 seconds waiting for clients. 1/2 clients joined."
MISMATCH = """terminate called after throwing an instance of 'gloo::EnforceNotMet'
  what():  [enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. \
40 vs 4. Received data size doesn't match expected size. Is there a distributed collective mismatch in your code?"""
DIED = """srun: error: n2: task 1: {how}
srun: Terminating StepId=5.0
slurmstepd: error: *** STEP 5.0 ON n1 CANCELLED AT 2026-11-26T06:56:58 ***
srun: error: n1: task 0: {then}
srun: Force Terminated StepId=5.0
"""


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    store.work(STAGE.id).mkdir(parents=True)
    return store


@pytest.fixture
def attempt(store):
    attempt = Attempts(store.root).begin(STAGE, 0, 2, 30, None)
    attempt.record_job("5")
    return attempt


@pytest.fixture
def end_of(store, attempt):
    """Return a function that explains an attempt's end by its log and by what ranks (by number) said, in this order."""

    def explain(log="", said=None, state="FAILED", started=True):
        if started:
            attempt.record_run(Run("5", 0, "n[1-2]", time.time() - 10))
        if log:
            (attempt.folder / "5_0_log.err").write_text(log)
        for number, (rank, message) in enumerate((said or {}).items()):
            write_failure_record(store.work(STAGE.id), Failure("code", message, rank, time.time() + number))
        job = JobInfo("5", state, "NonZeroExitCode", "n[1-2]", "N/A", "N/A", attempt.intent.job_name)
        end = explain_end(store, STAGE, attempt, job if state else None)
        assert end.cause in RETRIES
        return end

    return explain


@pytest.mark.parametrize("how", SIGNALS)
def test_a_signal_is_named_with_its_rank(end_of, how):
    """The first rank that srun names is the one that failed: srun itself ends the others."""
    core = " (core dumped)" if how == "Segmentation fault" else ""
    end = end_of(DIED.format(how=how + core, then="Terminated"), {0: CLOSED})
    signal, cause, meaning = SIGNALS[how]
    assert end.cause == cause
    assert f"rank 1 on n2 was ended by {signal} ({how.lower()}): {meaning}" in end.message.splitlines()[0]
    assert end.bad_nodes == [], "other jobs may run there"


def test_ranks_that_ended_together_are_all_named(end_of):
    end = end_of("srun: error: n2: tasks 0-3,5: Bus error (core dumped)\n")
    assert end.cause == "crash" and "rank 0-3,5 on n2 was ended by SIGBUS" in end.message


def test_what_is_ended_by_a_limit_is_not_tried_again():
    assert RETRIES["resource limit"] == 0 and RETRIES["crash"] > 0


LOGS = {
    "setup line": (
        "/x/environment.sh: line 26: module: command not found\n"
        "hfprune: setup failed with exit code 127: module load cuda/99",
        "input",
        ("setup", "module load cuda/99"),
    ),
    "setup syntax": (
        "/x/environment.sh: line 29: syntax error: unexpected end of file",
        "input",
        ("setup", "line 29"),
    ),
    "task prolog": (
        "slurmstepd: error: run_command: user task_prolog can not be executed (/none) No such file or directory\n"
        "slurmstepd: error: user task_prolog did not exit normally. reason: Run command failed - configuration error\n"
        "slurmstepd: error: --task-prolog failed status=1\n"
        "srun: error: n3: task 0: Exited with exit code 1\nsrun: Terminating StepId=20.0",
        "bad node",
        ("prolog", "administrators"),
    ),
    "no Python there": (
        "slurmstepd: error: execve(): /shared/venv/bin/python: No such file or directory\n"
        "srun: error: n3: task 0: Exited with exit code 2\nsrun: Terminating StepId=15.0",
        "bad node",
        ("does not see", "/shared/venv/bin/python"),
    ),
    "no snapshot there": (
        "slurmstepd: error: couldn't chdir to `/shared/code/0123': No such file or directory: going to /tmp instead\n"
        "srun: error: n3: task 0: Exited with exit code 1",
        "bad node",
        ("does not see", "/shared/code/0123"),
    ),
    "no such MPI": (
        "srun: error: Invalid MPI type 'pmi9', --mpi=list for acceptable types",
        "input",
        ("MPI", "--mpi=none"),
    ),
    "no MPI plugin": (
        "srun: error: Couldn't find the specified plugin name for mpi/pmix looking at all files\n"
        "srun: error: cannot find mpi plugin for mpi/pmix\nsrun: error: MPI: Cannot create context for mpi/pmix",
        "input",
        ("MPI", "--mpi=none"),
    ),
    "cores can't be bound": (
        "srun: error: CPU binding outside of job step allocation, allocated CPUs are: 0x000000000000000F.\n"
        "srun: error: Task launch for StepId=5.0 failed on node n2: Unable to satisfy cpu bind request\n"
        "srun: error: Application launch failed: Unable to satisfy cpu bind request\n"
        "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
        "input",
        ("bind ranks to cores", "--cpu-bind=none"),
    ),
    "memory asked for twice": (
        "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.",
        "input",
        ("srun refused", "SLURM_MEM_PER_CPU"),
    ),
    "more than the job has": (
        "srun: error: Unable to create step for job 18: More processors requested than permitted",
        "input",
        ("srun refused", "More processors"),
    ),
    "a launch that failed": (
        "srun: error: Task launch for StepId=5.0 failed on node n2: Invalid job credential\n"
        "srun: error: Application launch failed: Invalid job credential",
        "bad node",
        ("could not start a rank", "Invalid job credential"),
    ),
    "a GPU at fault": (
        "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
        "bad node",
        ("GPU", "uncorrectable ECC"),
    ),
    "different collectives": (
        f"{MISMATCH}\n{DIED.format(how='Aborted', then='Terminated')}",
        "code",
        ("different collectives", "op.preamble.length <= op.nbytes. 40 vs 4"),
    ),
    "killed for memory": (
        "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0. Some of the step tasks have been OOM Killed.\n"
        "srun: error: n2: task 1: Out Of Memory",
        "out of memory",
        ("memory in the profile",),
    ),
    "over Slurm's limit": (
        "slurmstepd: error: StepId=5.0 exceeded memory limit (2101248 > 2097152), being killed",
        "out of memory",
        ("memory in the profile",),
    ),
    "std::bad_alloc": (
        "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"
        + DIED.format(how="Aborted", then="Terminated"),
        "out of memory",
        ("memory in the profile",),
    ),
    "torch on the CPU": (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)",
        "out of memory",
        ("memory in the profile",),
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_each_is_named_with_what_to_do(end_of, name):
    log, cause, words = LOGS[name]
    end = end_of(log + "\n")
    assert end.cause == cause, end.message
    # --status shows only the first line.
    assert all(word in end.message.splitlines()[0] for word in words), end.message


def test_what_the_user_must_mend_is_not_tried_again():
    assert RETRIES["input"] == 0 and all(sign.cause in RETRIES for sign in SIGNS)
    assert not any(RETRIES[cause] for cause in ("out of memory", "code", "cancelled", "refused", Cause.NO_PROGRESS))


@pytest.mark.parametrize("lost", [CLOSED, RESET, LATE, NO_MASTER, NOT_ALL, "DistNetworkError: Broken pipe"])
def test_a_rank_that_lost_another_one_does_not_hide_it(end_of, lost):
    """Nodes' clocks differ, and the last words of the rank that really failed may be written last."""
    end = end_of(
        DIED.format(how="Exited with exit code 1", then="Terminated"), {0: lost, 1: "ValueError: we are wrong"}
    )
    assert (end.cause, end.message) == ("code", "ValueError: we are wrong")


def test_a_crash_behind_an_error_that_nobody_knows(end_of):
    end = end_of(DIED.format(how="Segmentation fault", then="Exited with exit code 1"), {0: "KeyError: some wrapper"})
    assert end.cause == "crash" and "rank 1 on n2" in end.message


def test_a_mistake_that_srun_followed_with_kills(end_of):
    log = DIED.format(how="Exited with exit code 1", then="Killed")
    assert end_of(log, {1: "ValueError: we are wrong"}).cause == "code"


@pytest.mark.parametrize("said", [LATE, NOT_ALL, NO_MASTER])
def test_a_rank_that_hangs(end_of, said):
    end = end_of(DIED.format(how="Exited with exit code 1", then="Killed"), {2: said, 0: said})
    assert end.cause == "collective timeout"
    assert "collective_timeout_minutes" in end.message and "ranks that waited: 0, 2" in end.message


def test_lost_ranks_without_a_reason(end_of):
    end = end_of(DIED.format(how="Exited with exit code 1", then="Killed"), {0: CLOSED})
    assert end.cause == "killed" and "rank 1 on n2 ended first" in end.message


def test_a_step_that_slurm_ends_after_a_crash_is_no_cancelled_job(end_of):
    """Where the job has been forgotten, its log decides; srun cancels the step after a rank has died."""
    assert end_of(DIED.format(how="Segmentation fault", then="Terminated"), state=None).cause == "crash"


def test_the_node_at_fault_is_avoided(end_of):
    log = LOGS["a launch that failed"][0] + "\nsrun: error: n1: task 0: Exited with exit code 1"
    assert end_of(log).bad_nodes == ["n2"]


def test_the_node_whose_rank_ended_first_is_avoided(end_of):
    assert end_of(LOGS["task prolog"][0]).bad_nodes == ["n3"]


def test_an_earlier_start_of_the_job_explains_nothing(end_of):
    """Logs are appended to when a job is requeued."""
    earlier = (
        "hfprune: start 0\nslurmstepd: error: *** JOB 5 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO PREEMPTION ***\n"
    )
    log = (
        earlier + DIED.format(how="Segmentation fault", then="Killed") + "hfprune: start 1\nhfprune: start 1\nworking\n"
    )
    end = end_of(log, {0: CLOSED}, state=None)
    assert end.cause == "killed" and "SIGSEGV" not in end.message


def test_what_slurm_said_long_before_the_last_line(end_of):
    words = DIED.format(how="Bus error", then="Terminated") + "".join(f"farewell {line}\n" for line in range(100))
    assert end_of(words).cause == "crash"


def test_words_of_a_library_in_mid_log_are_no_sign(end_of):
    log = "note: if you run out of memory, lower the batch size\n" + "".join(f"step {line}\n" for line in range(100))
    assert end_of(log, {0: "ValueError: we are wrong"}).cause == "code"


def test_a_job_without_a_trace(end_of):
    end = end_of(started=False)
    assert end.cause == "killed" and "no log" in end.message and "file system that all nodes share" in end.message


def test_a_damaged_record_of_a_failure_is_left_out(end_of, store):
    (store.work(STAGE.id) / "failure.3.json").write_text('{"cause": "co')
    (store.work(STAGE.id) / "failure.4.json").write_text("")
    (store.work(STAGE.id) / "progress.json").write_text("{")
    assert end_of("", {1: "ValueError: we are wrong"}).cause == "code"


def test_a_requeued_job_is_judged_by_what_it_has_written_since_its_last_start():
    assert since_last_start("no start\nat all") == "no start\nat all" and last_start("no start\nat all") is None
    once = f"before\n{START} 0\nfirst\n"
    assert since_last_start(once) == f"{START} 0\nfirst\n"
    assert since_last_start(f"{once}{START} 1\nsecond\nsays {START} 2\n") == f"{START} 1\nsecond\nsays {START} 2\n"
    assert last_start(f"{once}{START} 1\nsecond\nsays {START} 2\nand {START} 3\n") == 1
    # The batch script and srun's ranks may write to one file.
    assert since_last_start(f"{once}{START} 1\nscript\n{START} 1\nrank\n").startswith(f"{START} 1\nscript\n")
