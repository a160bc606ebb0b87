"""The slot that a new job joins, and the job that it follows there."""

import os
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hfprune_launch.slurm import attempts
from hfprune_launch.slurm.attempt_records import INTENT
from hfprune_launch.slurm.slots import Slot, choose_slot
from made_stages import stage_of


@dataclass(frozen=True)
class Live:
    """A live attempt: its slot, when it was recorded, and its job's id if that is known."""

    slot: int | None
    recorded_at: float
    job_id: str | None

    @property
    def intent(self):
        return SimpleNamespace(slot=self.slot, created=0.0)


def test_without_a_limit_there_are_no_slots():
    assert choose_slot(None, [Live(None, 1.0, "a")], {"a"}) == Slot(None, None)


def test_the_first_free_slot_is_taken_by_a_job_that_waits_for_none():
    assert choose_slot(2, [], ()) == Slot(0, None)
    assert choose_slot(3, [Live(2, 1.0, "a"), Live(0, 2.0, "b")], {"a"}) == Slot(1, None)


@pytest.mark.parametrize("turn", [1, -1])
def test_a_slot_ends_with_the_job_that_joined_it_last_however_attempts_are_listed(turn):
    live = [Live(0, 1.0, "a"), Live(1, 2.0, "b"), Live(0, 3.0, "c"), Live(1, 4.0, "d")][::turn]
    assert choose_slot(2, live, ()) == Slot(0, "c")
    assert choose_slot(2, live, {"d"}) == Slot(1, "d"), "it waits for that job anyway"
    assert choose_slot(2, live, {"a", "b"}) == Slot(0, "c"), "those are not last"


def test_slots_beyond_a_limit_that_was_lowered_and_jobs_without_a_slot_get_no_followers():
    live = [Live(None, 0.0, "x"), Live(2, 1.0, "a"), Live(1, 2.0, "b"), Live(0, 3.0, "c")]
    assert choose_slot(2, live, {"a", "x"}) == Slot(1, "b")


def test_nothing_joins_slots_whose_last_jobs_have_no_known_ids():
    live = [Live(0, 1.0, "a"), Live(0, 2.0, None), Live(1, 3.0, "b")]
    assert choose_slot(2, live, {"a"}) == Slot(1, "b")
    assert choose_slot(1, live, {"a"}) is None


@pytest.mark.parametrize(("ticks", "last"), [((100.0, 101.0), "b"), ((101.0, 100.0), "a"), ((100.0, 100.0), "a")])
def test_launchers_whose_clocks_differ_agree_which_job_joined_last(tmp_path, monkeypatch, ticks, last):
    """The file system's clock decides; within one tick of it, that of a launcher does."""
    live = []
    for job_id, clock, tick in zip("ab", (5000.0, 1000.0), ticks, strict=True):
        monkeypatch.setattr(attempts, "time", SimpleNamespace(time=lambda clock=clock: clock))
        attempt = attempts.Attempts(tmp_path).begin(
            stage_of("prune", job_id, {"ratio": 0.2 + clock / 1e5}, {}), 0, 1, 60, 0
        )
        attempt.record_job(job_id)
        os.utime(attempt.folder / INTENT, (tick, tick))
        live.append(attempt)
    assert choose_slot(1, live, ()) == choose_slot(1, live[::-1], ()) == Slot(0, last)


def test_an_attempt_whose_record_is_lost_counts_from_when_it_was_made(tmp_path):
    attempt = attempts.Attempts(tmp_path).begin(stage_of("prune", "a", {"ratio": 0.2}, {}), 0, 1, 60, 0)
    assert abs(attempt.recorded_at - attempt.intent.created) < 60
    (attempt.folder / INTENT).unlink()
    assert attempt.recorded_at == attempt.intent.created
