"""Two nodes of a Slurm cluster: their network, the binding of ranks to GPUs, a large model (checks 8, 9 and 10)."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from gpu_marks import LARGE_MODEL, PROFILE
from gpu_runs import (
    estimate_of,
    finish_watched,
    folder_of,
    logs_of,
    manifest_of,
    write_config,
)

pytestmark = pytest.mark.multi_gpu(nodes=2)

LOADING_S = 180.0
MEMORY_TOLERANCE = 0.25


def profile_in(folder, **changes):
    """Write the cluster's profile with importance on two nodes and NCCL's log turned on; return its path."""
    profile = yaml.safe_load(Path(os.environ[PROFILE]).read_text()) | changes
    profile["environment"] = {**profile.get("environment", {}), "NCCL_DEBUG": "INFO"}
    profile["stages"] = {**profile.get("stages", {}), "importance": {"nodes": 2}}
    file = folder / "profile.yaml"
    file.write_text(yaml.safe_dump(profile))
    return str(file)


def run(config, folder, **changes):
    """Return heartbeats of a sweep in a folder that all nodes see: the one in which the tests run."""
    profile = profile_in(folder, **changes)
    return finish_watched(config, folder / "out", "--profile", profile, environment={})


@pytest.fixture
def shared(real_assets):
    """A new folder next to the profile, where all nodes see it, with the demo's model."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-", dir=Path(os.environ[PROFILE]).resolve().parent))
    shutil.copytree(real_assets / "llama", folder / "llama")
    return folder


def test_nodes_talk_by_the_fast_network_and_by_addresses_that_others_reach(real_assets, shared):
    run(write_config(shared, real_assets, shared / "llama"), shared)
    said = logs_of(shared)
    assert "NET/IB" in said and "127.0.1.1" not in said


def test_ranks_whose_gpus_slurm_binds_find_theirs(real_assets, shared):
    run(write_config(shared, real_assets, shared / "llama"), shared, srun_args=["--gpus-per-task=1"])
    said = logs_of(shared)
    assert "invalid device ordinal" not in said and "via P2P" in said


def test_a_large_model_on_two_nodes(real_assets, shared):
    model = folder_of(LARGE_MODEL)
    beats = run(write_config(shared, real_assets, model, calibration={"samples": 64, "micro_batch_size": 1}), shared)
    manifest = manifest_of(shared / "out", "importance")
    first = min(beat.at for beat in beats if beat.phase == "calibration")
    assert first - manifest["started"] < LOADING_S
    expected = estimate_of(shared / "out", model, manifest["world_size"])
    assert manifest["peak_memory_bytes"] == pytest.approx(expected, rel=MEMORY_TOLERANCE)
