"""The efficiency stage: its figures for a pruned model and for the dense one, on any number of ranks."""

import json
from statistics import median

import made_stages
import pytest
import torch
from ranks import metrics_of
from tiny import save_tiny
from worlds import Ranks, run_in_threads

from hfprune_dist.stages.efficiency import RESULTS
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.machine import cpu_model, usable_cores
from hfprune_dist.store.stage import Input

PARAMS = {
    "batch_sizes": [1, 3],
    "prompt_tokens": [4, 9],
    "new_tokens": 3,
    "repeats": 3,
    "dtype": "float32",
    "device": "here",
    "packages": {"torch": torch.__version__},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("efficiency")
    save_tiny(folder / "dense", "qwen3")
    save_tiny(folder / "pruned", "qwen3", intermediate_size=17)
    return folder


def stage_of(source, model="pruned", **changes):
    inputs = {role: Input(name, str(source / name)) for role, name in (("model", model), ("dense", "dense"))}
    return made_stages.stage_of("efficiency", "tiny", PARAMS | changes, inputs)


def test_both_models_are_measured_under_every_workload_on_the_first_rank(source, tmp_path):
    store, stage = Store(tmp_path), stage_of(source)
    run_in_threads(store, stage, Ranks(2))
    metrics = metrics_of(store, stage)
    sizes = [(run["batch_size"], run["prompt_tokens"], run["new_tokens"]) for run in metrics["runs"]]
    assert sizes == [(1, 4, 3), (1, 9, 3), (3, 4, 3), (3, 9, 3)]
    assert metrics["device"] == cpu_model() and metrics["threads"] == torch.get_num_threads()
    assert metrics["cores"] == usable_cores()
    gone = 2 * 3 * 31 * 32  # layers, projections, neurons, hidden size
    assert metrics["dense"]["parameters"] - metrics["model"]["parameters"] == gone
    assert metrics["dense"]["flops_per_token"] - metrics["model"]["flops_per_token"] == 2 * gone
    assert metrics["dense"]["weight_bytes_on_disk"] - metrics["model"]["weight_bytes_on_disk"] == 4 * gone
    details = json.loads((store.handle(stage.id).artifact / RESULTS).read_text())
    for run, seconds in zip(metrics["runs"], details["seconds"], strict=True):
        assert run["dense"]["peak_memory_bytes"] > run["model"]["peak_memory_bytes"] > 0
        pairs = list(zip(seconds["dense"], seconds["model"], strict=True))
        assert len(pairs) == 3
        factors = [one["others"] / other["others"] for one, other in pairs]
        assert run["decode_speed"] == {"median": median(factors), "min": min(factors), "max": max(factors)}
        rates = [run["batch_size"] * 2 / other["others"] for _, other in pairs]
        assert run["model"]["decode_tokens_per_s"]["median"] == median(rates)


def test_the_dense_model_is_as_fast_as_itself(source, tmp_path):
    store, stage = Store(tmp_path), stage_of(source, "dense")
    run_in_threads(store, stage, Ranks(1))
    for run in metrics_of(store, stage)["runs"]:
        assert run["decode_speed"] == run["first_token_speed"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert run["model"] == run["dense"]
