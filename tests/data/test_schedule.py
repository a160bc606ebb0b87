"""The rows that each optimizer step sees."""

from hfprune_dist.data.schedule import Schedule


def test_an_epoch_sees_every_row_once_in_even_steps():
    schedule = Schedule(rows=130, batch_size=128, seed=3)
    assert schedule.steps_per_epoch == 2
    assert [len(schedule.rows_of(step)) for step in (0, 1)] == [65, 65]
    first_epoch = schedule.rows_of(0) + schedule.rows_of(1)
    assert sorted(first_epoch) == list(range(130))
    second_epoch = schedule.rows_of(2) + schedule.rows_of(3)
    assert sorted(second_epoch) == list(range(130))
    assert second_epoch != first_epoch
