"""How the local backend finds out how its ranks ended, which here only seem to run."""

import errno
import os
import tempfile
from unittest import mock

import pytest
from hfprune_launch.local import backend as local
from hfprune_launch.local.backend import LocalBackend, explain_death, wait_until_cancelled
from hfprune_launch.stage.run import Provenance
from made_stages import stage_of, taken_over

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import StageHandle
from hfprune_dist.store.attempts import End, Ledger
from hfprune_dist.store.claims import Cancellation, Claim
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})
CLOSED = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4915"
TIMEOUT = "RuntimeError: [/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"


def code(message):
    return End("code", message, 1.0, 0)


@pytest.mark.parametrize(
    ("left", "codes", "cause", "expected"),
    [
        (None, {1: -9}, "killed", ["a rank died without a message: rank 1 by SIGKILL, from outside", "the end"]),
        (None, {}, "killed", ["all, and what started them"]),
        (code(CLOSED), {1: -9, 0: 1}, "killed", ["rank 1 by SIGKILL"]),
        (code(CLOSED), {1: -11, 0: 1}, "code", ["a rank died without a message: rank 1 by SIGSEGV\n", "the end"]),
        (code(TIMEOUT), {0: 1}, "code", ["a rank was lost or hangs", "rank 0 waited for it", "Timed out"]),
        (code("ValueError: ours"), {0: 1, 1: -6}, "code", ["ValueError: ours"]),
        (End("input", "bad text", 1.0, 0), {0: 2, 1: -9}, "input", ["bad text"]),
        (None, {0: 3, 1: 0}, "killed", ["rank 0 with exit code 3"]),
    ],
)
def test_how_ranks_died(tmp_path, left, codes, cause, expected):
    log = tmp_path / "prune.3.log"
    log.write_text("the end\n")
    found, message = explain_death(left, codes, log)
    assert found == cause
    for part in expected:
        assert part in message


class Ranks:
    """A warm process whose ranks do what ``meanwhile`` does with their claim, say something, and end with ``codes``."""

    def __init__(self, store):
        self.meanwhile = lambda claim: None
        self.said = "the end\n"
        self.codes = {0: 1}  # None if they go on
        self.were_ended = False
        self._work = store.handle(STAGE.id).work

    def start(self, main, arguments, size, environment, log):
        self.meanwhile(Claim(self._work, arguments[-1]))
        log.write_text(self.said)

    def ended(self, timeout):
        return self.codes

    def close(self):
        self.were_ended = True


@pytest.fixture
def backend(store, tmp_path):
    return LocalBackend(
        store, tmp_path / "logs", Provenance(RuntimeConfig(ranks=1), {}, {}), Cancellation(store.root), Ranks(store)
    )


@pytest.fixture
def ranks(backend):
    return backend.warm


def run(backend):
    return backend.run(STAGE, lambda beat: None)


def commit(store, claim=None):
    draft = store.handle(STAGE.id).open_draft(claim)
    (draft / "model.bin").write_text("weights")
    store.handle(STAGE.id).commit(STAGE, draft, {"metrics": {}}, claim=claim)


def test_a_launcher_that_waits_for_anothers_stage_is_cancelled_with_it(backend, ranks, store):
    """And the same command goes on, as that cancellation was of the launchers before it."""
    claim = store.handle(STAGE.id).claim()

    def cancel(beat):
        Cancellation(store.root).request()
        claim.release()  # the other launcher is interrupted

    with pytest.raises(KeyboardInterrupt, match="cancelled by another command"):
        backend.run(STAGE, cancel)
    backend.cancellation = Cancellation(store.root)
    ranks.meanwhile = lambda claim: commit(store, claim)
    assert run(backend) is None


def test_a_launcher_that_goes_on_after_a_cancellation_is_named_with_what_ends_it(store, monkeypatch):
    monkeypatch.setattr(local, "CANCELLING_S", 0.0)
    claim = store.handle(STAGE.id).claim()
    (told,) = wait_until_cancelled(Plan({STAGE.id: STAGE}, (), ()), store)
    assert told.startswith("not cancelled yet: prune a 0.2: ") and f"kill {os.getpid()} ends it" in told
    claim.release()


def take_over(store):
    claim = taken_over(store, STAGE)
    return claim, store.handle(STAGE.id).open_draft(claim)


@pytest.mark.parametrize("codes", [{0: 1}, None])
def test_who_lost_its_claim_says_so_and_leaves_its_successor_alone(backend, ranks, store, monkeypatch, codes):
    """Ranks that go on are ended."""
    monkeypatch.setattr(local, "CANCELLATION_POLL_S", 0.0)
    successors = []
    ranks.codes = codes
    ranks.meanwhile = lambda claim: successors.append(take_over(store))
    told = run(backend)
    assert ranks.were_ended == (codes is None)
    assert told.cause == "interrupted" and "another process has taken over this stage" in told.message
    ((claim, draft),) = successors
    assert claim.is_held() and draft.is_dir()
    assert Ledger(store).failure(STAGE.id) is None


def test_a_full_disk_is_told_even_where_a_draft_filled_it(backend, ranks, store, monkeypatch):
    full = [True]
    trial = tempfile.TemporaryFile
    refused = mock.Mock(side_effect=OSError(errno.EDQUOT, ""))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **at: (refused if full[0] else trial)(**at))
    discard = StageHandle.discard_draft
    monkeypatch.setattr(StageHandle, "discard_draft", lambda *a: full.__setitem__(0, False) or discard(*a))
    ranks.meanwhile = lambda claim: store.handle(STAGE.id).open_draft(claim)
    told = run(backend)
    assert told.cause == "input" and "Disk quota exceeded" in told.message
    assert not list(store.root.rglob(".draft*"))
