"""Shapes for which neurons, KV groups and layers compete: cut, measured, loaded, and the same however they are made."""

import itertools
import shutil

import pytest
import shapes
import torch
from families import save_model
from faults.kill import die_in_fork
from forks import on_ranks
from masking import read_kept
from ranks import SoloWorld
from shapes import GROUPS, NEURONS, divergence, kept_of, metrics_of, outcome, scores_of, windows_of
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core.width_search import START, Found
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.stages import finals, prune, prune_shapes
from hfprune_dist.stages.cheap_measurement import EVERY, CheapMeasurements
from hfprune_dist.store.artifacts import Store

LAYERS = 3
# Where layers compete, of nine windows in micro-batches of two, shapes are compared on two and finalists on one.
COMPARED, JUDGED = slice(6, 8), slice(8, 9)
NEURONS_ALONE, BOTH, ALL = ["neurons"], ["neurons", "kv_groups"], ["neurons", "kv_groups", "layers"]


def prepare(folder, variant="llama", **changes):
    """Prepare a stage for which a group's score per parameter is about a neuron's."""
    settings = {"criterion": "surgeon", "allocation": "searched", "refit": "none", "structures": BOTH}
    limits = {"floor": 0.2, "protect_first": 0, "protect_last": 0}
    biases = {"attention_bias": True} if variant == "qwen3" else {}
    return shapes.prepare(folder, variant, layers=LAYERS, worth=4.0, **biases, **{**settings, **limits, **changes})


def run(store, stage, world=None):
    shapes.run(store, stage, world or SoloWorld())


def neuron_in(folder):
    checkpoint = open_checkpoint(folder / "model")
    return checkpoint.parameters_per_unit / checkpoint.parameters


@pytest.mark.parametrize(
    ("variant", "criterion", "refit"),
    [
        ("llama-tied-biases", "surgeon", "dense"),
        ("qwen3", "entropy", "layerwise"),
        ("qwen2", "surgeon", "none"),
        ("mistral", "entropy", "none"),
    ],
)
def test_neurons_and_groups_of_all_layers_compete_and_the_checkpoint_loads(tmp_path, variant, criterion, refit):
    store, stage = prepare(tmp_path, variant, allocation="global", criterion=criterion, refit=refit)
    run(store, stage)
    metrics, kept = metrics_of(store, stage), kept_of(store, stage)
    assert abs(metrics["ratio_reached"] - 0.2) <= 0.51 * neuron_in(tmp_path)
    scores = scores_of(store)
    for kind, name, most in (("neurons", criterion, NEURONS), ("kv_groups", f"kv_groups.{criterion}", GROUPS)):
        assert any(len(row) < most for row in kept[kind])
        for layer, row in enumerate(kept[kind]):
            assert row == sorted(scores[f"layers.{layer}.{name}"].topk(len(row)).indices.tolist())
    ours = load_causal_lm(store.path(stage.id), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(store.path(stage.id), trust_remote_code=True, dtype=torch.float32)
    assert sum(it.numel() for it in plain.parameters()) == metrics["parameters"]
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
    assert plain.generate(ids, max_new_tokens=3).shape == (1, 15)


@pytest.mark.parametrize(("structures", "ratio"), [(BOTH, 0.3), (ALL, 0.3), (["neurons", "layers"], 0.35), (ALL, 0.5)])
def test_a_search_writes_what_measures_closest(tmp_path, structures, ratio):
    """The winner's measurement is what the finished checkpoint has on the held-out window."""
    store, stage = prepare(tmp_path, structures=structures, ratio=ratio, floor=0.1)
    run(store, stage)
    metrics, kept = metrics_of(store, stage), kept_of(store, stage)
    assert abs(metrics["ratio_reached"] - ratio) <= 0.51 * neuron_in(tmp_path)
    exchanged = any("exchange" in name for name in metrics["search_kl"])
    assert exchanged is ("kv_groups" in structures)
    dense, written = (load_causal_lm(it, torch.float32) for it in (tmp_path / "model", store.path(stage.id)))
    windows_ST = windows_of(store)[COMPARED if "layers" in structures else slice(8, 9)]
    best = min(metrics["search_kl"].values())
    assert divergence(dense, written, windows_ST, EVERY) == pytest.approx(best, rel=1e-3)
    gone = metrics.get("layers_in_order_of_dropping", [])[: LAYERS - written.config.num_hidden_layers]
    assert kept.get("layers", [*range(LAYERS)]) == [layer for layer in range(LAYERS) if layer not in gone]


@pytest.mark.parametrize(
    ("allocation", "structures"), [("searched", ALL), ("searched", NEURONS_ALONE), ("global", NEURONS_ALONE)]
)
def test_a_checkpoint_whose_layers_differ_is_pruned_as_a_model_of_its_own(tmp_path, allocation, structures):
    store, first = prepare(tmp_path, ratio=0.15, allocation="global", structures=structures[:2])
    run(store, first)
    settings = {"model": store.path(first.id), "ratio": 0.15, "allocation": allocation, "structures": structures}
    again, stage = prepare(tmp_path / "again", **settings)
    run(again, stage)
    model, metrics, kept = open_checkpoint(store.path(first.id)), metrics_of(again, stage), again.path(stage.id)
    assert not model.is_uniform
    assert abs(metrics["ratio_reached"] - 0.15) <= 0.51 * model.parameters_per_unit / model.parameters
    assert metrics["ratio_reached"] == 1 - metrics["parameters"] / model.parameters
    shape = read_kept(kept).shape
    assert model.parameter_counts.of(shape) == metrics["parameters"]
    if allocation == "searched":
        assert not any("everywhere" in name for name in metrics["search_kl"])


@pytest.mark.parametrize(
    ("model_type", "order"),
    [("gemma4_text", [0, 1]), ("lfm3", [0, 1, 2]), ("lfm3", [1, 0, 2]), ("qwen3_5_text", [2, 1, 0])],
)
def test_a_plain_shape_competes_with_the_ratio_met_whichever_layers_went(tmp_path, monkeypatch, model_type, order):
    """Layers with another kind of attention have more parameters than others, or fewer; the width makes up for it."""
    model = save_model(tmp_path / "model", model_type, vocab_size=264)
    checkpoint = open_checkpoint(model)
    assert len(set(checkpoint.parameter_counts.layers)) > 1
    possible = prune_shapes._possible
    monkeypatch.setattr(CheapMeasurements, "layers_in_order", lambda _self, _droppable, count: order[:count])
    store, stage = prepare(tmp_path, model=model, structures=["neurons", "layers"], ratio=0.3, floor=0.0)
    monkeypatch.setattr(prune_shapes, "_possible", lambda contests: possible(contests)[-1:])
    monkeypatch.setattr(prune_shapes, "search_shapes", lambda _, plain, __: Found(next(iter(plain.values())), {}))
    run(store, stage)
    metrics = metrics_of(store, stage)
    layers, neuron = metrics["num_hidden_layers"], checkpoint.parameters_per_unit / checkpoint.parameters
    assert layers < 3 and abs(metrics["ratio_reached"] - 0.3) <= layers * neuron / 2 + 1e-9


def test_where_layers_add_nothing_they_go(tmp_path):
    silent = ("layers.1.mlp.down_proj.weight", "layers.1.self_attn.o_proj.weight")
    store, stage = prepare(tmp_path, structures=ALL, ratio=0.3, silent=silent)
    run(store, stage)
    metrics = metrics_of(store, stage)
    assert metrics["layers_in_order_of_dropping"] == [1] and kept_of(store, stage)["layers"] == [0, 2]
    assert metrics["search_kl"]["2 layers"] < metrics["search_kl"]["3 layers"]


def layers_of(name):
    return int(name.removesuffix(" layers"))


@pytest.mark.parametrize(("variant", "refit"), [("llama", "block"), ("mistral", "layerwise")])
def test_the_number_of_layers_is_that_of_the_closest_finalist(tmp_path, monkeypatch, variant, refit):
    """Without any further search or a new refit, what is written is a finalist."""
    monkeypatch.setattr(finals, "HOPELESS", 1e6)
    fit, fitted = finals.Finals._fitted, {}

    def fitting(self, shape, kept):
        fitted[len(kept.layers)] = fit(self, shape, kept)
        return fitted[len(kept.layers)]

    store, stage = prepare(tmp_path, variant, structures=ALL, ratio=0.2, refit=refit, floor=0.05)
    monkeypatch.setattr(finals.Finals, "_fitted", fitting)
    monkeypatch.setattr(prune_shapes, "search_shapes", lambda shapes, *_: Found(shapes.counts(START), {}))
    monkeypatch.setattr(prune, "final_refit", lambda _context, _dense, kept: fitted[len(kept.layers)])
    run(store, stage)
    metrics = metrics_of(store, stage)
    measured, compared = metrics["search_kl"], metrics["finalists_kl"]
    best = min(compared, key=compared.get)
    dense, written = (load_causal_lm(it, torch.float32) for it in (tmp_path / "model", store.path(stage.id)))
    assert written.config.num_hidden_layers == layers_of(best) and len(measured) > 1
    closest = sorted(measured, key=measured.get)
    assert {*closest[: finals.FINALISTS]} <= {*compared} <= {*measured}
    fewer = [name for name in measured if layers_of(name) < layers_of(best)]
    assert not fewer or max(fewer, key=layers_of) in compared, "fewer layers are tried as long as that helps"
    judged = windows_of(store)[JUDGED]
    assert divergence(dense, written, judged) == pytest.approx(compared[best], rel=1e-3)


def test_protected_layers_keep_all_and_groups_are_divisible(tmp_path):
    store, stage = prepare(tmp_path, structures=ALL, ratio=0.3, protect_first=1, tensor_parallel=2, multiple_of=8)
    run(store, stage)
    kept = kept_of(store, stage)
    assert len(kept["neurons"][0]) == NEURONS and len(kept["kv_groups"][0]) == GROUPS
    assert all(len(row) in (2, 4) for row in kept["kv_groups"]) and all(len(row) % 8 == 0 for row in kept["neurons"])
    assert abs(metrics_of(store, stage)["ratio_reached"] - 0.3) <= 4.1 * neuron_in(tmp_path)


@pytest.mark.parametrize(("variant", "dtype", "several"), [("qwen3", "bfloat16", 3), ("llama", "float32", 2)])
def test_any_number_of_ranks_finds_and_writes_the_same(tmp_path, variant, dtype, several):
    outcomes = []
    for ranks in (1, several):
        store, stage = prepare(tmp_path / str(ranks), variant, structures=ALL, refit="dense", dtype=dtype, samples=5)
        ended = on_ranks(ranks, lambda world, store=store, stage=stage: run(store, stage, world))
        assert ended.codes == [0] * ranks, ended.messages
        outcomes.append(outcome(store, stage))
    assert outcomes[0] == outcomes[1]


def test_death_on_the_way_ends_with_the_same_checkpoint(tmp_path):
    reference, stage = prepare(tmp_path / "whole", structures=ALL, samples=2, ratio=0.3)
    shutil.copytree(reference.root, tmp_path / "before")
    run(reference, stage)
    for kill_at in itertools.count(1, 13):
        store = Store(shutil.copytree(tmp_path / "before", tmp_path / str(kill_at)))
        died = die_in_fork(lambda store=store: run(store, stage), kill_at, store.root)
        if store.verify(stage.id).state == "missing":
            run(store, stage)
        assert outcome(store, stage) == outcome(reference, stage)
        if not died:
            break
    assert kill_at > 10
