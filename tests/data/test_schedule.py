"""The rows that each optimizer step sees."""

from hfprune_dist.data.schedule import Schedule


def test_an_epoch_sees_every_row_once_in_even_steps():
    schedule = Schedule(rows=130, batch_size=128, seed=3)
    assert [len(schedule.rows_of(step)) for step in range(2 * schedule.steps_per_epoch)] == [65] * 4
    first, second = (schedule.rows_of(step) + schedule.rows_of(step + 1) for step in (0, 2))
    assert sorted(first) == sorted(second) == list(range(130)) and first != second
