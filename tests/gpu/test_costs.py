"""Memory of a calibration pass is as estimated (check 5)."""

import pytest
from gpu_marks import MODEL
from gpu_runs import estimate_of, finish_watched, folder_of, manifest_of, visible, write_config

from hfprune_dist.store.machine import count_gpus

# Parts that an estimate leaves out: CUDA's own memory, NCCL's buffers, and memory that the allocator can't use.
MEMORY_TOLERANCE = 0.25


@pytest.mark.multi_gpu
@pytest.mark.parametrize("windows", [1, 8])
def test_memory_of_a_calibration_pass_is_as_estimated(real_assets, tmp_path, windows):
    model, ranks = folder_of(MODEL), count_gpus()
    config = write_config(tmp_path, real_assets, model, calibration={"samples": 256, "micro_batch_size": windows})
    finish_watched(config, tmp_path / "out", "--set", "runtime.sharding=zero3", environment=visible(ranks))
    expected = estimate_of(tmp_path / "out", model, ranks)
    found = manifest_of(tmp_path / "out", "importance")["peak_memory_bytes"]
    assert found == pytest.approx(expected, rel=MEMORY_TOLERANCE)
