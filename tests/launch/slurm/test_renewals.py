"""Claims that are renewed while their holders wait."""

import errno
import os
import socket
import time
from pathlib import Path

from fake_slurm import Clock, Controller
from hfprune_launch.slurm.attempts import Attempts
from hfprune_launch.slurm.backend import SlurmBackend
from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.profile import Profile, Resources
from hfprune_launch.slurm.submission import Submitting
from hfprune_launch.stage.stage_file import Provenance
from made_stages import stage_of

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store import claims
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.cancellation import Cancellation
from hfprune_dist.store.claims import Renewal, try_claim
from hfprune_dist.store.stage import Input

STAGE = stage_of("importance", "a", {}, {"model": Input("digest", "/model")})
PLAN = Plan({STAGE.id: STAGE}, (), (STAGE.id,))


def test_renewal_survives_a_file_system_that_fails_once(tmp_path, monkeypatch):
    claim, ticks = try_claim(tmp_path), []

    class Ticks:
        """A clock, and the event that it is enough, which never happens."""

        def __call__(self):
            return 100.0 * len(ticks)

        def wait(self, _):
            ticks.append(1)
            if len(ticks) == 4:
                claim.release()
            return False

    utime, failing = os.utime, [OSError(errno.ESTALE, "stale")]
    renewed = []

    def fail_once(file):
        if failing:
            raise failing.pop()
        renewed.append(len(ticks))
        utime(file)

    monkeypatch.setattr(os, "utime", fail_once)
    claims._renew(Renewal(claim, None, Ticks()), Ticks())  # returns when the claim is gone
    assert renewed == [2, 3]


def launcher(store):
    submitting = Submitting(
        Provenance(RuntimeConfig(), {}, {}),
        Profile("x", {STAGE.kind: Resources()}, None),
        Path("/code"),
        None,
        Cancellation(store.root),
    )
    clock = Clock()
    return SlurmBackend(store, PLAN, submitting, SlurmCommands(sleep=clock.sleep), lambda _: None, clock=clock)


def test_a_submission_that_takes_longer_than_a_claim_lasts_is_not_made_twice(tmp_path, monkeypatch):
    """A launcher on another host comes while the first one waits for an answer to its submission."""
    store, controller = Store(tmp_path / "store"), Controller()
    monkeypatch.setattr("hfprune_launch.slurm.commands._run", controller.run)
    monkeypatch.setattr(claims, "POLL_S", 0.01)
    monkeypatch.setattr(claims, "RENEW_S", 0.0)
    submit = SlurmCommands.submit

    def slowly(slurm, script, job_name):
        (claim,) = store.work(STAGE.id).glob("claim.*")
        os.utime(claim, (0, 0))  # as if it had been made long ago
        deadline = time.monotonic() + 5
        while not claim.stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.01)
        with monkeypatch.context() as there:
            there.setattr(SlurmCommands, "submit", submit)
            there.setattr(socket, "gethostname", lambda: "another-host")
            launcher(store).start()
        return submit(slurm, script, job_name)

    monkeypatch.setattr(SlurmCommands, "submit", slowly)
    launcher(store).start()
    assert len(controller.live()) == 1
    (attempt,) = Attempts(store.root).of(STAGE.id)
    assert attempt.end is None and [attempt.job_id] == controller.live()
