"""The efficiency stage: its figures for a pruned model and for the dense one."""

import json
import time
from statistics import median

import made_stages
import pytest
import torch
import transformers
from engine_marks import python_of
from ranks import run_here
from tiny import save_tiny

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.engines import process
from hfprune_dist.errors import UserError
from hfprune_dist.stages.efficiency import RESULTS
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.machine import cpu_model, usable_cores
from hfprune_dist.store.stage import Input

PARAMS = {
    "engine": None,
    "batch_sizes": [1, 3],
    "prompt_tokens": [4, 9],
    "new_tokens": 3,
    "repeats": 3,
    "dtype": "float32",
    "device": "here",
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


def test_both_models_are_measured_under_every_workload(source, tmp_path):
    store, stage = Store(tmp_path), stage_of(source)
    metrics = run_here(store, stage)
    sizes = [(run["batch_size"], run["prompt_tokens"], run["new_tokens"]) for run in metrics["runs"]]
    assert sizes == [(1, 4, 3), (1, 9, 3), (3, 4, 3), (3, 9, 3)]
    assert metrics["engine"] == f"transformers {transformers.__version__}" and metrics["device"] == cpu_model()
    assert metrics["threads"] == torch.get_num_threads()
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
    for run in run_here(store, stage)["runs"]:
        assert run["decode_speed"] == run["first_token_speed"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert run["model"] == run["dense"]


@pytest.fixture
def answers(monkeypatch):
    """What a stand-in for an engine answers, and, in ``asked``, what it was asked."""
    answers = {"version": "vllm 1", "asked": {}}

    def ask(engine, _python, _folder, request):
        answers["asked"] = {"engine": engine, **json.loads(json.dumps(request))}
        return answers

    monkeypatch.setattr(process, "ask", ask)
    return answers


def test_in_an_engine_the_same_is_measured_but_memory(source, tmp_path, answers, monkeypatch):
    answers["runs"] = [
        {"dense": [[0.5, 2.0], [0.6, 4.0], [0.7, 8.0]], "model": [[0.1, 1.0], [0.3, 1.0], [0.7, 8.0]]}
    ] * 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    store, stage = Store(tmp_path), stage_of(source, engine="vllm")
    metrics, asked = run_here(store, stage), answers["asked"]
    assert metrics["threads"] == asked["threads"] == 7
    assert metrics["engine"] == "vllm 1" and asked["engine"] == "vllm" and asked["repeats"] == asked["new_tokens"] == 3
    assert metrics["dense"]["flops_per_token"] > metrics["model"]["flops_per_token"]
    for run, prompts in zip(metrics["runs"], asked["workloads"], strict=True):
        assert [len(prompt) for prompt in prompts] == [run["prompt_tokens"]] * run["batch_size"]
        assert run["decode_speed"] == {"median": 2.0, "min": 1.0, "max": 4.0}
        assert run["first_token_speed"]["median"] == 2.0
        assert run["model"]["decode_tokens_per_s"]["median"] == 2 * run["batch_size"]
        assert run["model"]["time_to_first_token_s"]["median"] == 0.3 and run["model"]["peak_memory_bytes"] is None
    for role, name in (("dense", "dense"), ("model", "pruned")):
        options = asked["models"][role]
        assert (options["model"], options["max_model_len"], options["max_num_seqs"]) == (str(source / name), 12, 3)
    assert len({options["kv_cache_memory_bytes"] for options in asked["models"].values()}) == 1


def test_an_engine_that_does_not_run_a_model_fails_its_stage(source, tmp_path, answers):
    answers["error"] = "ValueError: no such shape"
    with pytest.raises(UserError, match="vllm 1 doesn't run it: ValueError: no such shape"):
        run_here(Store(tmp_path), stage_of(source, "dense", engine="vllm"))
    assert answers["asked"]["models"].keys() == {"dense"}, "which isn't measured twice"


def test_a_shape_that_an_engine_does_not_hold_is_told_before_it_starts(source, tmp_path, answers):
    save_tiny(tmp_path / "pruned", "llama-tied-biases", output_biases=["mlp.down_proj"])
    stage = stage_of(source, str(tmp_path / "pruned"), engine="vllm")
    with pytest.raises(UserError, match=r"pruned: vllm won't load it: it has no biases .*refit: bias"):
        run_here(Store(tmp_path), stage)
    assert not answers["asked"]


@pytest.mark.engine("vllm")
def test_vllm_generates_with_both_models_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(RuntimeConfig, "python_of", lambda _, engine: python_of(engine))
    for name, width in (("dense", 48), ("pruned", 17)):
        save_tiny(tmp_path / name, hidden_size=128, intermediate_size=width)  # heads of 32, its smallest on CPUs
    store, stage = Store(tmp_path), stage_of(tmp_path, engine="vllm")
    began = time.monotonic()
    metrics = run_here(store, stage)
    waited = time.monotonic() - began
    assert metrics["engine"].startswith("vllm ")
    details = json.loads((store.handle(stage.id).artifact / RESULTS).read_text())
    for run, seconds in zip(metrics["runs"], details["seconds"], strict=True):
        assert seconds.keys() == {"dense", "model"}
        taken = [one for times in seconds.values() for pair in times for one in (pair["first"], pair["others"])]
        # A pass takes a millisecond; a time of day, or milliseconds for seconds, would be more than was waited.
        assert len(taken) == 2 * 3 * 2 and min(taken) > 2e-4 and sum(taken) < waited
        pairs = zip(seconds["dense"], seconds["model"], strict=True)
        assert run["decode_speed"]["median"] == median(one["others"] / other["others"] for one, other in pairs)
