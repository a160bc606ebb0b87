"""How the local backend finds out how its ranks ended; scripts stand in for torchrun."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from fork_server import forked
from hfprune_launch.local import backend as local
from hfprune_launch.local.backend import LocalBackend
from hfprune_launch.local.deaths import OUT_OF_STEP, explain_death
from hfprune_launch.stage.attempts import Ledger
from hfprune_launch.stage.stage_file import Provenance
from made_stages import stage_of

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.store import claims
from hfprune_dist.store.artifacts import StageHandle, Store
from hfprune_dist.store.cancellation import Cancellation, request_cancellation
from hfprune_dist.store.claims import Claim, Holder, try_claim
from hfprune_dist.store.heartbeat import Failure
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})
CLOSED = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4915"
TIMEOUT = "RuntimeError: [/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"
ABORT = "terminate called after throwing an instance of 'gloo::EnforceNotMet'\n  what():  [enforce fail at pair.cc:446]"
SUMMARY = """
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
launch/stage/run.py FAILED
------------------------------------------------------------
Failures:
{others}
------------------------------------------------------------
Root Cause (first observed failure):
{first}
============================================================
"""
ENTRY = """[{number}]:
  time      : 2026-01-01_00:00:00
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 4711)
  error_file: <N/A>
  traceback : {traceback}"""


def log_of(*ends, said=""):
    """Return what torchrun says of ranks that ended with an exit code, or by a signal where the number is negative."""

    def entry(number, rank, code):
        traceback = "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html"
        if code < 0:
            traceback = f"Signal {-code} ({signal.Signals(-code).name}) received by PID 4711"
        return ENTRY.format(number=number, rank=rank, code=code, traceback=traceback)

    first, *others = [entry(number, *end) for number, end in enumerate(ends)]
    return said + "\n" + SUMMARY.format(first=first, others="\n".join(others) or "  <NO_OTHER_FAILURES>")


def code(message, rank=0):
    return Failure("code", message, rank, 1.0, 3)


@pytest.mark.parametrize(
    ("left", "log", "cause", "expected"),
    [
        (None, log_of((1, -9)), "killed", ["a rank died without a message", "rank 1 by SIGKILL", "from outside"]),
        (None, log_of((0, -7)), "killed", ["rank 0 by SIGBUS", "from outside"]),
        (code(CLOSED), log_of((0, 1), (1, -9)), "killed", ["rank 1 by SIGKILL"]),
        (None, log_of((1, -11)), "code", ["a rank crashed: rank 1 by SIGSEGV", "ends with"]),
        (None, log_of((1, -6), said="free(): invalid pointer"), "code", ["a rank crashed: rank 1 by SIGABRT"]),
        (code(CLOSED), log_of((0, 1), (1, -11)), "code", ["a rank crashed: rank 1 by SIGSEGV"]),
        (
            None,
            log_of((1, -6), (0, -6), said=f"{ABORT} {OUT_OF_STEP}. 8 vs 4"),
            "code",
            ["did not make the same collective calls", "rank 0 by SIGABRT, rank 1 by SIGABRT", OUT_OF_STEP],
        ),
        (None, log_of((0, -6), said=f"{ABORT} {TIMEOUT}"), "code", ["a rank was lost or hangs", "rank 0 by SIGABRT"]),
        (
            code(TIMEOUT),
            log_of((0, 1), (1, -15)),
            "code",
            ["a rank was lost or hangs", "rank 0 waited for it", "Timed out"],
        ),
        (code("ValueError: ours"), log_of((0, 1), (1, -6), said=CLOSED), "code", ["ValueError: ours"]),
        (code("ValueError: ours"), log_of((0, 1), (1, -15)), "code", ["ValueError: ours"]),
        (Failure("input", "bad text", 0, 1.0, 3), log_of((0, 2), (1, -9)), "input", ["bad text"]),
        (None, "nothing at all", "killed", ["a rank died without a message", "nothing at all"]),
        (None, log_of((0, 1), (1, -15)), "killed", ["a rank died without a message"]),
    ],
)
def test_how_ranks_died(tmp_path, left, log, cause, expected):
    file = tmp_path / "prune.3.log"
    file.write_text(log)
    failure = explain_death(left, file, 3)
    assert failure.cause == cause and failure.attempt == 3
    for part in expected:
        assert part in failure.message
    assert "from outside" not in failure.message or cause == "killed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "cause", "real"),
    [(signal.SIGABRT, "code", False), (signal.SIGKILL, "killed", False), (signal.SIGKILL, "killed", True)],
)
def test_torchrun_says_it_like_that(tmp_path, number, cause, real):
    """This version of torch writes the summary in the form that is parsed, as torchrun's stand-in in tests does."""
    script = tmp_path / "rank.py"
    script.write_text(f"import os, time\nos.environ['RANK'] == '1' and os.kill(os.getpid(), {number})\ntime.sleep(60)")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--log-dir={os.devnull}",
        str(script),
    ]
    (temporary := tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with (tmp_path / "log").open("wb") as stream:
        started = torchrun if real else forked(torchrun)
        subprocess.run(started, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    assert not list(temporary.iterdir())
    failure = explain_death(None, tmp_path / "log", 1)
    assert failure.cause == cause and f"rank 1 by {number.name}" in failure.message


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def backend(store, tmp_path, monkeypatch):
    """A backend whose ranks are the command ``true``; ``meanwhile`` does nothing until a test replaces it.

    What it has ``said`` is its log.
    """

    class Scripted(LocalBackend):
        meanwhile = staticmethod(lambda claim: None)
        said = "the end\n"

        def _start(self, stage, claim, log):
            self.meanwhile(claim)
            log.write_text(self.said)
            return subprocess.Popen(["true"])

    monkeypatch.setattr(local, "POLL_S", 0.01)
    return Scripted(store, tmp_path / "logs", Provenance(RuntimeConfig(ranks=1), {}, {}), Cancellation(store.root))


def run(backend):
    return backend.run(STAGE, lambda beat: None)


def commit(store, claim=None):
    draft = store.handle(STAGE.id).open_draft(claim)
    (draft / "model.bin").write_text("weights")
    store.handle(STAGE.id).commit(STAGE, draft, {"metrics": {}}, claim=claim)


def test_a_launcher_that_waits_for_anothers_stage_is_cancelled_with_it(backend, store):
    """And the same command goes on, as that cancellation was of the launchers before it."""
    claim = store.handle(STAGE.id).claim()

    def cancel(beat):
        request_cancellation(store.root)
        claim.release()  # the other launcher is interrupted

    with pytest.raises(KeyboardInterrupt, match="cancelled by another command"):
        backend.run(STAGE, cancel)
    later = store.handle(STAGE.id).claim()
    assert not isinstance(later, Holder), "nothing is at work on it"
    later.release()
    backend._cancellation = Cancellation(store.root)
    backend.meanwhile = lambda claim: commit(store, claim)
    assert run(backend).state == "done"


def test_success_is_an_artifact(backend, store):
    backend.meanwhile = lambda claim: commit(store, claim)
    assert run(backend).state == "done"


def test_the_logs_of_an_artifact_that_was_lost_stay(backend, store, tmp_path):
    """Its store entry is removed by hand, for want of room or since it is damaged; then it is made again."""
    expected = [False, True, True, False, False, True]
    for number, succeeds in enumerate(expected, 1):
        backend.meanwhile = (lambda claim: commit(store, claim)) if succeeds else (lambda claim: None)
        backend.said = f"attempt {number}\n"
        run(backend)
        assert store.handle(STAGE.id).is_done() == succeeds
        if succeeds:
            store.handle(STAGE.id).discard()
            store.handle(STAGE.id).discard_work()
    logs = [tmp_path / "logs" / f"prune-{STAGE.fingerprint}.{number}.log" for number in range(1, len(expected) + 1)]
    assert [log.read_text().splitlines()[0] for log in logs] == [f"attempt {n}" for n in range(1, len(expected) + 1)]
    assert [it.end.cause == "done" for it in Ledger(store).of(STAGE.id)] == expected


@pytest.mark.parametrize(
    ("left", "log"),
    [
        (code(TIMEOUT), log_of((0, 1), (1, -15))),
        (code(CLOSED), log_of((0, 1), (1, -9))),
        (code("ValueError: ours"), log_of((0, 1), (1, -15))),
        (Failure("input", "bad text", 0, 1.0, 3), ""),
        (None, log_of((1, -11))),
    ],
    ids=["hangs", "killed", "ours", "input", "crashed"],
)
def test_the_failure_that_is_told_is_the_one_on_record(backend, store, left, log):
    def meanwhile(claim):
        if left is not None:
            store.handle(STAGE.id).report_failure(replace(left, attempt=1))

    backend.meanwhile, backend.said = meanwhile, log
    told = run(backend).failure
    assert told == store.handle(STAGE.id).failure() and told.attempt == 1


def test_a_failure_of_another_attempt_says_nothing(backend, store):
    """A rank of the previous attempt dies late, on a host whose clock is ahead."""
    late = Failure("input", "of the attempt before", 0, 1e10, 1)
    assert run(backend).failure.cause == "killed"
    backend.meanwhile = lambda claim: store.handle(STAGE.id).report_failure(late)
    assert run(backend).failure.cause == "killed"
    own = replace(late, message="mine", at=0.0, attempt=3)
    backend.meanwhile = lambda claim: store.handle(STAGE.id).report_failure(own)
    outcome = run(backend)
    assert (outcome.failure.cause, outcome.failure.message) == ("input", "mine")


def take_over(store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "_lives", lambda *_: False)
        claim = try_claim(store.work(STAGE.id))
    assert isinstance(claim, Claim)
    draft = store.handle(STAGE.id).open_draft(claim)
    store.handle(STAGE.id).report_failure(Failure("code", "the successor's", 0, 0.0, 2))
    return claim, draft


def test_who_lost_its_claim_says_so_and_leaves_its_successor_alone(backend, store):
    successors = []
    backend.meanwhile = lambda claim: successors.append(take_over(store))
    outcome = run(backend)
    assert (outcome.state, outcome.failure.cause) == ("failed", "duplicate")
    assert "another process has taken over this stage" in outcome.failure.message
    ((claim, draft),) = successors
    assert claim.is_held() and draft.is_dir()
    assert store.handle(STAGE.id).failure().message == "the successor's"


def test_what_its_successor_has_done_is_done(backend, store):
    def succeeded(claim):
        successor, _ = take_over(store)
        commit(store, successor)
        store.handle(STAGE.id).discard_work()

    backend.meanwhile = succeeded
    assert run(backend).state == "done"


KILLED_LAUNCHER = """
import os, signal, sys
from pathlib import Path
from hfprune_launch.local import backend
from hfprune_launch.stage.stage_file import Provenance
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.store.artifacts import StageHandle, Store
from hfprune_dist.store.cancellation import Cancellation
from hfprune_dist.store.stage import Input, Stage

backend.LocalBackend._watch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
settings = {"ratio": 0.2, "criterion": "entropy", "allocation": "uniform", "refit": "none", "multiple_of": 1}
stage = Stage("prune", "a 0.2", PruneParameters(**settings), {"model": Input("digest", "/somewhere")})
store, logs = Store(Path(sys.argv[1], "store")), Path(sys.argv[1], "logs")
provenance = Provenance(RuntimeConfig(ranks=1), {}, {})
backend.LocalBackend(store, logs, provenance, Cancellation(store.root)).run(stage, print)
"""


def test_a_launcher_that_is_killed_leaves_nothing_outside_its_sweep(tmp_path):
    (temporary := tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", KILLED_LAUNCHER, str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "logs").is_dir() and not list(temporary.iterdir())


def test_ranks_end_when_their_launcher_has_lost_its_claim(backend, store):
    processes = []

    def start(stage, claim, log):
        processes.append(subprocess.Popen(["sleep", "60"]))
        take_over(store)
        return processes[0]

    backend._start = start
    assert run(backend).failure.cause == "duplicate"
    assert processes[0].returncode == -signal.SIGTERM


def test_a_full_disk_is_told_even_where_a_draft_filled_it(backend, store, monkeypatch):
    full = [True]
    usage = shutil.disk_usage(os.curdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0 if full[0] else 10**9))
    discard = StageHandle.discard_drafts
    monkeypatch.setattr(StageHandle, "discard_drafts", lambda *a: full.__setitem__(0, False) or discard(*a))
    backend.meanwhile = lambda claim: store.handle(STAGE.id).open_draft(claim)
    outcome = run(backend)
    assert outcome.failure.cause == "input" and "No space left on device" in outcome.failure.message
    assert not list(store.root.rglob(".draft*"))
