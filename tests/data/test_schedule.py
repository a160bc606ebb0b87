"""The rows that each optimizer step sees."""

import torch

from hfprune_dist.data.schedule import IGNORED, Schedule, ScheduledRows


def test_an_epoch_sees_every_row_once_in_even_steps():
    schedule = Schedule(rows=130, batch_size=128, seed=3)
    assert schedule.steps_per_epoch == 2
    assert [len(schedule.rows_of(step)) for step in (0, 1)] == [65, 65]
    first_epoch = schedule.rows_of(0) + schedule.rows_of(1)
    assert sorted(first_epoch) == list(range(130))
    second_epoch = schedule.rows_of(2) + schedule.rows_of(3)
    assert sorted(second_epoch) == list(range(130))
    assert second_epoch != first_epoch


def test_every_number_of_ranks_and_every_resume_sees_the_same_rows():
    def read(row):
        return {"input_ids": torch.tensor([row]), "labels": torch.tensor([row])}

    schedule = Schedule(rows=7, batch_size=4, seed=0)

    def steps(first, multiple_of):
        rows = ScheduledRows(read, schedule, first, 4, multiple_of)
        seen = {step: [] for step in range(first, 4)}
        for index in range(len(rows)):
            item = rows[index]
            assert all(type(it) is int for it in item["place"]), "a tensor would go to the GPU and be read back"
            if (item["labels"] != IGNORED).any():
                seen[item["place"][0]].append(int(item["input_ids"]))
        return seen

    whole = steps(0, 1)
    assert [len(rows) for rows in whole.values()] == [3, 4, 3, 4]
    assert steps(0, 2) == steps(0, 3) == whole
    assert steps(2, 2) == {step: whole[step] for step in (2, 3)}
