"""Shapes for which neurons, KV groups and layers compete: cut, measured, loaded, and the same however they are made."""

import pytest
import shapes
import torch
from ranks import metrics_of, run_here
from shapes import GROUPS, NEURONS, divergence, kept_of, windows_of

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.stages.shape_search import EVERY

LAYERS = 3
# Where layers compete, of nine windows in micro-batches of two, shapes are compared on two and finalists on one.
COMPARED = slice(6, 8)
NEURONS_ALONE, BOTH, ALL = ["neurons"], ["neurons", "kv_groups"], ["neurons", "kv_groups", "layers"]


def prepare(folder, variant="llama", **changes):
    """Prepare a stage for which a group's score per parameter is about a neuron's."""
    settings = {"criterion": "surgeon", "allocation": "searched", "refit": "none", "structures": BOTH}
    settings |= {"effort": "thorough"}
    limits = {"floor": 0.2, "protect_first": 0, "protect_last": 0}
    return shapes.prepare(folder, variant, layers=LAYERS, worth=4.0, **{**settings, **limits, **changes})


def neuron_in(folder):
    checkpoint = open_checkpoint(folder / "model")
    return checkpoint.parameters_per_unit / checkpoint.parameters


@pytest.mark.parametrize(("structures", "ratio"), [(BOTH, 0.3), (["neurons"], 0.15), (ALL, 0.5)])
def test_a_search_writes_what_measures_closest(tmp_path, structures, ratio):
    """The winner's measurement is what the finished checkpoint has on the held-out window."""
    store, stage = prepare(tmp_path, structures=structures, ratio=ratio, floor=0.1)
    run_here(store, stage)
    metrics, kept = metrics_of(store, stage), kept_of(store, stage)
    assert abs(metrics["ratio_reached"] - ratio) <= 0.51 * neuron_in(tmp_path)
    exchanged = any("exchange" in name for name in metrics["search_kl"])
    assert exchanged is ("kv_groups" in structures)
    dense, written = (
        load_causal_lm(folder, torch.float32) for folder in (tmp_path / "model", store.handle(stage.id).artifact)
    )
    windows_ST = windows_of(store)[COMPARED if "layers" in structures else slice(8, 9)]
    best = min(metrics["search_kl"].values())
    assert divergence(dense, written, windows_ST, EVERY) == pytest.approx(best, rel=1e-3)
    gone = metrics.get("layers_in_order_of_dropping", [])[: LAYERS - written.config.num_hidden_layers]
    assert kept.get("layers", [*range(LAYERS)]) == [layer for layer in range(LAYERS) if layer not in gone]


def test_protected_layers_keep_all_and_groups_are_divisible(tmp_path):
    store, stage = prepare(tmp_path, structures=ALL, ratio=0.3, protect_first=1, tensor_parallel=2, multiple_of=8)
    run_here(store, stage)
    kept = kept_of(store, stage)
    assert len(kept["neurons"][0]) == NEURONS and len(kept["kv_groups"][0]) == GROUPS
    assert all(len(row) in (2, 4) for row in kept["kv_groups"]) and all(len(row) % 8 == 0 for row in kept["neurons"])
    assert abs(metrics_of(store, stage)["ratio_reached"] - 0.3) <= 4.1 * neuron_in(tmp_path)
