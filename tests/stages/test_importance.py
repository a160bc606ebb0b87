"""The importance stage on real ZeRO-3 ranks."""

import pytest
import torch
from core_definition import OF_ONE_PASS, coupled_taylor, definition
from made_stages import stage_of
from ranks import finish, killing, metrics_of, run_here, run_stage
from safetensors.torch import load_file
from scoring import make_stage
from tiny import tiny_model
from worlds import Ranks, run_in_threads, without_deepspeed

from hfprune_dist.methods import CRITERIA
from hfprune_dist.methods.sdmprune import student_keeps
from hfprune_dist.stages import importance
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures.score_names import score_name, scores_of_layers

pytestmark = pytest.mark.slow


# DeepSpeed shards only parameters with more than 100,000 elements: here, the MLPs' weights.
SHARDED = {"hidden_size": 256, "intermediate_size": 416}


def scores_of(store, stage):
    return load_file(store.handle(stage.id).artifact / "importance.safetensors")


def test_all_criteria_at_once_on_any_number_of_ranks(tmp_path):
    """The bits are the same on one rank and, from sharded weights, on two that die and resume."""
    kinds = ["neurons", "kv_groups"]
    stage = make_stage(tmp_path, criteria=OF_ONE_PASS, sizes=SHARDED, structures=kinds, samples=5, micro_batch_size=1)
    one, two = (Store(tmp_path / name) for name in ("one", "two"))
    finish(one, stage)
    death = killing(rank=0, kill_at=5, match="partial.draft")
    assert run_stage(two, stage, 2, environment=death, sharding="zero3").returncode != 0
    assert load_file(two.handle(stage.id).work / "partial.safetensors")["next_shard"] == 4
    finish(two, stage, 2, sharding="zero3")
    scores = scores_of(one, stage)
    assert set(scores) == {
        score_name(layer, name, kind)
        for layer in range(2)
        for name in OF_ONE_PASS
        for kind in kinds[: 1 if CRITERIA[name].units == {"neurons"} else 2]
    }
    for name, expected in scores.items():
        assert torch.equal(scores_of(two, stage)[name], expected), name
    metrics = [metrics_of(store, stage) for store in (one, two)]
    assert metrics[0] == metrics[1] and 0 < metrics[0]["mean_entropy_nats"] < metrics[0]["mean_cross_entropy_nats"]

    model = tiny_model("llama", **SHARDED)
    windows = load_file(one.handle(stage.id).artifact / "windows.safetensors")["input_ids"]
    assert windows.shape == (5, 32) and windows.dtype == torch.int64 and metrics[0]["tokens"] == 5 * 32
    assert (windows[:, 0] == 1).all(), "every window begins with BOS, as in evaluation"
    assert {scores_U.dtype for scores_U in scores.values()} == {torch.float64}
    for kind, place in {"neurons": (1, "mlp.down_proj"), "kv_groups": (2 * 64, "self_attn.o_proj")}.items():
        expected = definition(model, windows, "fluctuation", 3, *place)
        ours = torch.stack(scores_of_layers(scores, "fluctuation", kind))
        assert (ours - expected).norm() / expected.norm() < 1e-4, kind


def test_criteria_without_a_loss_do_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(importance, "ShardScorer", None)
    criteria = ["magnitude", "random"]
    store, stage = Store(tmp_path / "store"), make_stage(tmp_path, criteria=criteria, samples=3)
    metrics = run_here(store, stage)
    assert set(scores_of(store, stage)) == {f"layers.{layer}.{name}" for layer in range(2) for name in criteria}
    assert not any(key.startswith("mean_") for key in metrics)


STUDENT = {"lacks": 0.1, "teacher_share": 0.42, "teacher_temperature": 0.5}


def test_a_second_pass_scores_in_the_student_that_the_first_one_chose(tmp_path, monkeypatch):
    """SDMPrune, on ranks that are threads; the bits are those of one rank."""
    without_deepspeed(monkeypatch)
    names = "coupled_taylor", "coupled_taylor_distilled"
    first = make_stage(tmp_path, criteria=[names[0]], samples=5, sequence_length=16)
    second = make_stage(tmp_path, criteria=[names[1]], samples=5, sequence_length=16, student=STUDENT)
    second = stage_of(second.kind, "second", second.params, {**second.inputs, "student": first.as_input()})
    found = []
    for size in (1, 3):
        store = Store(tmp_path / str(size))
        for stage in (first, second):
            run_in_threads(store, stage, Ranks(size))
        found.append([scores_of(store, stage) for stage in (first, second)])
    for one, three in zip(*found, strict=True):
        assert all(torch.equal(one[name], scores_U) for name, scores_U in three.items())
    ours, distilled = (
        torch.stack(scores_of_layers(scores, name, "neurons")) for scores, name in zip(found[0], names, strict=True)
    )
    model, windows = (
        tiny_model("llama"),
        load_file(store.handle(second.id).artifact / "windows.safetensors")["input_ids"],
    )
    expected = coupled_taylor(model, windows)
    assert (ours - expected).norm() < 1e-4 * expected.norm()
    keeps = torch.stack([student_keeps(scores_U, STUDENT["lacks"]) for scores_U in ours])
    expected = coupled_taylor(model, windows, keeps, STUDENT["teacher_share"], STUDENT["teacher_temperature"])
    assert (distilled - expected).norm() < 1e-4 * expected.norm()
    assert not distilled[~keeps].any() and distilled[keeps].min() > 0
