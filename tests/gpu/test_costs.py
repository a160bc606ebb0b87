"""Memory is as estimated (check 5); the load of GPUs (check 6) and the gain of larger micro-batches (check 7) are told.

No bound is asserted on loads and times, which depend on the machine: pytest -rP shows them, --junitxml=FILE keeps them.
"""

import statistics

import pytest
from gpu_marks import MODEL
from gpu_runs import (
    finish_watched,
    folder_of,
    manifest_of,
    manifests_of,
    seconds_per_unit,
    shape_of,
    visible,
    write_config,
)

from hfprune_dist.kinds.importance import Calibration
from hfprune_dist.store.machine import count_gpus

# Parts that an estimate leaves out: CUDA's own memory, NCCL's buffers, and memory that the allocator can't use.
MEMORY_TOLERANCE = 0.25


@pytest.mark.multi_gpu
@pytest.mark.parametrize("windows", [1, 8])
def test_memory_of_a_calibration_pass_is_as_estimated(real_assets, tmp_path, windows):
    model, ranks = folder_of(MODEL), count_gpus()
    config = write_config(tmp_path, real_assets, model, calibration={"samples": 256, "micro_batch_size": windows})
    finish_watched(config, tmp_path / "out", environment=visible(ranks))
    expected = Calibration(windows, 1024).memory(shape_of(model), ranks).total
    found = manifest_of(tmp_path / "out", "importance")["peak_memory_bytes"]
    assert found == pytest.approx(expected, rel=MEMORY_TOLERANCE)


@pytest.mark.gpu
def test_the_load_of_gpus_in_the_calibration_pass_of_the_best_method(real_assets, tmp_path, record_property):
    config = write_config(tmp_path, real_assets, folder_of(MODEL), methods=["surgeon-plain"])
    beats = finish_watched(config, tmp_path / "out", environment=visible(count_gpus()))
    busy = [share for beat in beats if beat.phase == "calibration" and beat.done for share in beat.busy]
    assert busy and all(0 <= share <= 100 for share in busy)
    report(record_property, "load in %, mean over heartbeats", statistics.mean(busy))


@pytest.mark.gpu
def test_recovery_with_four_rows_at_a_time_takes_the_same_steps(real_assets, tmp_path, record_property):
    """Twenty each, without running out of memory."""
    seconds, steps = {}, {}
    for rows in (1, 4):
        folder = tmp_path / str(rows)
        folder.mkdir()
        recovery = {
            "method": "lora",
            "path": str(real_assets / "instructions.jsonl"),
            "sequence_length": 1024,
            "batch_size": 4 * count_gpus(),
            "micro_batch_size": rows,
            "max_steps": 20,
        }
        config = write_config(folder, real_assets, folder_of(MODEL), recovery=recovery)
        beats = finish_watched(config, folder / "out", environment=visible(count_gpus()))
        seconds[rows] = seconds_per_unit(beats, "recover", "recovery", first=3)
        steps[rows] = {it["metrics"]["steps"] for it in manifests_of(folder / "out", "recover")}
    assert steps == {1: {20}, 4: {20}}
    report(record_property, "time of a step with one row / with four", seconds[1] / seconds[4])


def report(record_property, what, value):
    record_property(what, value)
    print(f"{what}: {value:.3g}")
