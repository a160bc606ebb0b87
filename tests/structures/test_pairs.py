"""A made-up kind of unit goes through every stage: nothing between scores and files knows about neurons."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from core_definition import (
    GRADIENT_CRITERIA,
    OF_ONE_PASS,
    coupled_taylor,
    definition,
    moments,
    of_units,
    weight_taylor,
)
from damage import nothing_reaches_the_disk
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_stages import stage_of
from pairs import CHANNELS, prune_pairs
from safetensors.torch import load_file
from sweeps import make_inputs, planned
from tiny import importance_stage, save_tiny, tiny_model, write_documents
from transformers import AutoModelForCausalLM
from worlds import Ranks, run_in_threads, without_deepspeed

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.method import OF_A_STUDENT, Method
from hfprune_dist.core.elimination import elimination_scores
from hfprune_dist.core.least_squares import Projection
from hfprune_dist.core.selection import entries_of
from hfprune_dist.errors import UserError
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.planning.ratios import check_ratios
from hfprune_dist.store.artifacts import Store

SEED = 3


@pytest.fixture(scope="module", autouse=True)
def patch():
    with pytest.MonkeyPatch.context() as patch, nothing_reaches_the_disk():
        prune_pairs(patch)
        without_deepspeed(patch)
        yield patch


@dataclass(frozen=True)
class Model:
    variant: str
    layers: int
    pairs: int

    @property
    def shape(self):
        return {"num_hidden_layers": self.layers, "intermediate_size": CHANNELS * self.pairs}

    def tiny(self):
        return tiny_model(self.variant, **self.shape)


MODELS = st.builds(
    Model,
    variant=st.sampled_from(("llama", "llama-tied-biases", "qwen2", "qwen3", "mistral")),
    layers=st.integers(1, 3),
    pairs=st.integers(3, 12),
)
CALIBRATIONS = st.fixed_dictionaries(
    {"samples": st.integers(2, 6), "micro_batch_size": st.integers(1, 2), "shard_size": st.integers(1, 2)}
)


def save(folder, model):
    """Write the model and its text."""
    save_tiny(folder / "model", model.variant, **model.shape)
    write_documents(folder / "text.jsonl")


def score(folder, calibration, criteria, ranks=1):
    """Run the importance stage over what ``save`` wrote; return its store and the stage."""
    settings = {"sequence_length": 24, "text_field": "text", **calibration}
    params = {"calibration": settings, "criteria": sorted(criteria), "dtype": "float32", "add_bos_token": True}
    stage = importance_stage(folder, "pairs", {**params, "seed": SEED})
    store = Store(folder / f"on {ranks}")
    run_in_threads(store, stage, Ranks(ranks))
    return store, stage


def scores_of(store, stage):
    return load_file(store.path(stage.id) / "importance.safetensors")


def windows_of(store, stage):
    return load_file(store.path(stage.id) / "windows.safetensors")["input_ids"]


@settings(derandomize=True, deadline=None, max_examples=6)
@given(model=MODELS, calibration=CALIBRATIONS, ranks=st.integers(2, 3))
def test_scores_of_pairs_are_as_defined_on_any_number_of_ranks(tmp_path_factory, model, calibration, ranks):
    folder = tmp_path_factory.mktemp("scores")
    save(folder, model)
    store, stage = score(folder, calibration, OF_ONE_PASS)
    scores, windows = scores_of(store, stage), windows_of(store, stage)
    again = scores_of(*score(folder, calibration, OF_ONE_PASS, ranks))
    assert scores.keys() == again.keys() and all(torch.equal(again[name], it) for name, it in scores.items())

    dense = model.tiny()
    for name in (*GRADIENT_CRITERIA, "activation", "activation_l1", "fluctuation"):
        expected = definition(dense, windows, name, SEED, CHANNELS)
        ours = torch.stack([scores[f"layers.{layer}.{name}"] for layer in range(model.layers)])
        assert ours.shape == (model.layers, model.pairs)
        assert (ours - expected).norm() < 1e-4 * expected.norm() + 1e-12, name
    ours = torch.stack([scores[f"layers.{layer}.coupled_taylor"] for layer in range(model.layers)])
    torch.testing.assert_close(ours, of_units(coupled_taylor(dense, windows), CHANNELS), rtol=1e-3, atol=1e-9)
    ours = torch.stack([scores[f"layers.{layer}.weight_taylor"] for layer in range(model.layers)])
    torch.testing.assert_close(ours, weight_taylor(dense, windows, model.pairs), rtol=1e-3, atol=1e-9)
    for layer, (gram, curvature, fisher) in enumerate(moments(dense, windows, SEED, CHANNELS)):
        mlp = dense.model.layers[layer].mlp
        expected = elimination_scores(gram, curvature, mlp.down_proj.weight.detach(), fisher)
        found = scores[f"layers.{layer}.surgeon"]
        assert found.shape == expected.shape == (model.pairs,)
        assert found.log().sub(expected.log()).abs().median() < 1e-3
        for pair in range(model.pairs):
            own = slice(CHANNELS * pair, CHANNELS * (pair + 1))
            weights = mlp.gate_proj.weight[own], mlp.up_proj.weight[own], mlp.down_proj.weight[:, own]
            norm = sum(weight.double().square().sum() for weight in weights).sqrt().item()
            assert scores[f"layers.{layer}.magnitude"][pair].item() == pytest.approx(norm)


METHODS = st.builds(
    Method,
    criterion=st.sampled_from(("entropy", "surgeon", "activation")),
    allocation=st.sampled_from(("uniform", "global", "searched")),
    floor=st.sampled_from((0.1, 0.4)),
    protect_last=st.sampled_from((0, 0, 1)),
    refit=st.sampled_from(("none", "none", "dense", "layerwise", "block")),
    multiple_of=st.sampled_from((1, 1, 2)),
)


# Settings of a method that no prune stage has.
OF_OTHERS = ("prunes_in", "adapts", "distill")
# Settings of a refit that are left at their defaults.
OF_REFITS = ("refit_iterations", "refit_copies", "refit_norms")


def prune(folder, scored, ratio, method, ranks=1):
    """Run the prune stage after the importance stage of one rank; return its store and the stage."""
    store, importance = scored
    params = {
        "ratio": ratio,
        **method.model_dump(exclude={*OF_OTHERS, *OF_A_STUDENT, "structures", "tensor_parallel", *OF_REFITS}),
    }
    params |= {"dtype": "float32", "micro_batch_size": 2}
    stage = stage_of(
        "prune", "pairs", params, {"model": importance.inputs["model"], "importance": importance.as_input()}
    )
    other = Store(folder / f"pruned on {ranks}")
    other.path(importance.id).parent.mkdir(parents=True, exist_ok=True)
    other.path(importance.id).symlink_to(store.path(importance.id))
    run_in_threads(other, stage, Ranks(ranks))
    return other, stage


def reachable(checkpoint, share, method):
    """Return a share of the most that the method can remove, as a ratio; rounding must leave some of it."""
    counts = checkpoint.parameter_counts
    ratio = share * counts.units["neurons"] * sum(checkpoint.units.counts) / counts.total
    try:
        check_ratios(checkpoint, [ratio], method, "pairs")
    except UserError:
        assume(False)
    return ratio


@torch.no_grad()
def masked(dense, kept):
    """Return the dense model in float64, in which only these pairs put anything out."""
    dense = dense.double()
    for layer, row in zip(dense.model.layers, kept, strict=True):
        keeps = torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64)
        keeps[[CHANNELS * pair + channel for pair in row for channel in range(CHANNELS)]] = 1.0
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs, keeps=keeps: (inputs[0] * keeps,))
    return dense


@torch.no_grad()
def activations(model, windows, number):
    seen = []
    projection = model.model.layers[number].mlp.down_proj
    handle = projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, 1)))
    model(windows)
    handle.remove()
    return seen[0].double()


@settings(derandomize=True, deadline=None, max_examples=16)
@given(
    model=MODELS,
    calibration=CALIBRATIONS,
    method=METHODS,
    share=st.floats(0.1, 0.8),
    ranks=st.integers(2, 3),
)
def test_pairs_go_through_budget_allocation_refit_and_surgery(
    tmp_path_factory, model, calibration, method, share, ranks
):
    assume(method.protect_last < model.layers)
    folder = tmp_path_factory.mktemp("pruned")
    save(folder, model)
    checkpoint = open_checkpoint(folder / "model")
    ratio = reachable(checkpoint, share, method)
    scored = score(folder, calibration, [method.criterion])
    store, stage = prune(folder, scored, ratio, method)
    again, _ = prune(folder, scored, ratio, method, ranks)
    pruned, other = store.path(stage.id), again.path(stage.id)
    for name in ("model.safetensors", "kept.json", "config.json"):
        assert (pruned / name).read_bytes() == (other / name).read_bytes(), "on any number of ranks"

    kept = json.loads((pruned / "kept.json").read_text())["neurons"]
    widths, metrics = [len(row) for row in kept], store.manifest(stage.id)["metrics"]
    assert all(row == sorted(set(row)) and set(row) <= set(range(model.pairs)) for row in kept)
    assert metrics["intermediate_sizes"] == [CHANNELS * width for width in widths]
    assert open_checkpoint(pruned).units.counts == tuple(widths)
    if method.allocation == "uniform":
        assert len(set(widths)) == 1
    for layer, row in enumerate(kept):
        scores = scores_of(*scored)[f"layers.{layer}.{method.criterion}"]
        assert sorted(scores.topk(len(row)).indices.tolist()) == row

    reloaded = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True, dtype=torch.float32)
    dense, windows = model.tiny(), windows_of(*scored)
    parameters = [sum(it.numel() for it in some.parameters()) for some in (dense, reloaded)]
    assert metrics["parameters"] == parameters[1]
    assert metrics["ratio_reached"] == pytest.approx((parameters[0] - parameters[1]) / parameters[0])
    # The uniform width, which a search may find to be the closest, changes by a step in all layers.
    step = method.multiple_of * (1 if method.allocation == "global" else model.layers)
    assert abs(metrics["ratio_reached"] - ratio) <= step * checkpoint.parameters_per_unit / checkpoint.parameters
    with torch.no_grad():
        assert torch.equal(reloaded(windows).logits, load_causal_lm(pruned, torch.float32)(windows).logits)
        if method.refit == "none":
            expected = masked(model.tiny(), kept)(windows).logits
            torch.testing.assert_close(reloaded.double()(windows).logits, expected)
    for number, row in enumerate(kept):
        channels = entries_of(torch.tensor(row), CHANNELS)
        before, after = (some.model.layers[number].mlp for some in (dense, reloaded))
        if method.refit != "block":
            assert torch.equal(after.gate_proj.weight.float(), before.gate_proj.weight[channels])
        if method.refit == "dense":
            hidden, weight = activations(dense, windows, number), before.down_proj.weight.detach().double()
            expected = Projection(weight, hidden.T @ hidden).keeping(channels).weight(metrics["refit_ridge"][number])
            torch.testing.assert_close(after.down_proj.weight.detach(), expected.float(), rtol=1e-2, atol=1e-3)
    for before, after in zip(metrics.get("refit_error_before", []), metrics.get("refit_error_after", []), strict=True):
        assert after <= before + 1e-9


def test_a_plan_of_pairs_counts_in_pairs(tmp_path):
    config = make_inputs(tmp_path)
    files = sorted((Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml"))
    shipped = {file.stem for file in files} - {"hfprune-experts", "reap"}
    _, plan = planned(config, models=["alpha"], ratios=[0.15], methods=sorted(shipped))
    assert {cell.method for cell in plan.cells} == {None, *shipped}
    with pytest.raises(UserError, match="can't be reached by pruning neurons alone"):
        planned(config, models=["alpha"], ratios=[0.9])
    checkpoint = open_checkpoint(tmp_path / "alpha")
    assert (checkpoint.units.most, checkpoint.parameters_per_unit) == (24, 2 * 3 * 32)
    with pytest.raises(UserError, match=r"removes nothing once units are rounded \(multiple_of 5\)"):
        check_ratios(checkpoint, [0.01], Method(criterion="entropy", multiple_of=5), "alpha")
