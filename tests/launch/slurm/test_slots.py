"""The slot that a new job joins, and the job that it follows there."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hfprune_launch.slurm.slots import Slot, choose_slot


@dataclass(frozen=True)
class Live:
    """A live attempt: its slot, when it was made, and its job's id if that is known."""

    slot: int | None
    created: float
    job_id: str | None

    @property
    def intent(self):
        return SimpleNamespace(slot=self.slot, created=self.created)


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
