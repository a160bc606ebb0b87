"""Scores, kept units and refitted weights have the same bits each time (check 3); sharding only rounds (check 4)."""

import pytest
from gpu_runs import visible, write_config
from ranks import assert_close_files, killing
from sweeps import artifacts, finish, results, sweep

from hfprune_dist.store.machine import count_gpus

SMALL = {
    "methods": ["surgeon-uniform-block", "llm-pruner"],
    "prune": {"effort": "thorough"},
    "calibration": {"samples": 16, "sequence_length": 256, "shard_size": 1},
}


@pytest.fixture(scope="module")
def config(real_assets, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("bits"), real_assets, real_assets / "llama", **SMALL)


@pytest.fixture(scope="module")
def on_one(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    finish(config, out, environment=visible(1))
    return bits_of(out)


def bits_of(out):
    """Return scores, windows, kept units and weights of a sweep, by file."""
    found = {kind: artifacts(out, kind) for kind in ("importance", "prune")}
    assert all(found.values())
    return found


@pytest.mark.gpu
def test_a_second_run_has_the_same_bits(config, on_one, tmp_path):
    finish(config, tmp_path / "out", environment=visible(1))
    assert bits_of(tmp_path / "out") == on_one


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["partial.draft", "layer-"])
def test_a_resume_has_the_same_bits(config, on_one, tmp_path, where):
    """It is killed in the middle of the calibration pass, or of the layers that follow."""
    killed = sweep(config, tmp_path / "out", environment={**visible(1), **killing(0, 5, where)})
    assert killed.returncode == 1
    finish(config, tmp_path / "out", environment=visible(1))
    assert bits_of(tmp_path / "out") == on_one


@pytest.mark.multi_gpu
@pytest.mark.parametrize("ranks", [2, 8])
def test_any_number_of_ranks_has_the_same_results_up_to_rounding(config, on_one, tmp_path, ranks):
    if count_gpus() < ranks:
        pytest.skip(f"needs {ranks} NVIDIA GPUs; this machine has {count_gpus()}")
    finish(config, tmp_path / "out", environment=visible(ranks))
    assert_close_files(bits_of(tmp_path / "out")["importance"], on_one["importance"])


@pytest.mark.multi_gpu
def test_sharded_and_whole_models_agree_within_rounding(config, tmp_path):
    found = {}
    for sharding in ("replicate", "zero3"):
        finish(config, tmp_path / sharding, "--set", f"runtime.sharding={sharding}", environment=visible(2))
        found[sharding] = [float(row["kl"]) for row in results(tmp_path / sharding)]
    assert found["zero3"] == pytest.approx(found["replicate"], rel=1e-2, abs=1e-4)
