"""The plain shape that is found, against whole models that transformers makes."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import shapes
import torch
from families_masked import masked
from ranks import metrics_of, on_ranks, run_here
from shapes import GROUPS, LAYERS, divergence, kept_of, load, outcome, scores_of, windows_of

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core.selection import top_units
from hfprune_dist.models import single_layer
from hfprune_dist.stages import prune_refit, shape_search
from hfprune_dist.stages.shape_search import EVERY
from hfprune_dist.structures.kept import Kept

ANY_FACTOR = 1e6


def prepare(folder, variant="llama", **settings):
    return shapes.prepare(folder, variant, **{"effort": "thorough", **settings})


# Of nine windows, in micro-batches of two, candidates are compared on two and finalists on one.
COMPARED, JUDGED = slice(6, 8), slice(8, 9)


@pytest.fixture
def all_compete(monkeypatch):
    """Allow as many finalists as there may be, however much random models differ."""
    monkeypatch.setattr(shape_search, "WORST_FINALIST", ANY_FACTOR)


def numbers_of(name):
    """Return the layers, KV groups and width that a metric's name states."""
    return tuple(map(int, re.fullmatch(r"(\d+) layers, (\d+) KV groups, width (\d+)", name).groups()))


def shape_in(folder):
    config = load(folder).config
    return config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size


@pytest.mark.parametrize(("variant", "refit"), [("llama-tied-biases", "layerwise"), ("qwen2", "block")])
@pytest.mark.usefixtures("all_compete")
def test_the_finalist_that_is_closest_on_windows_apart_is_written(tmp_path, variant, refit):
    store, stage = prepare(tmp_path, variant, refit=refit)
    run_here(store, stage)
    metrics, folder = metrics_of(store, stage), store.handle(stage.id).artifact
    measured, finalists = metrics["search_kl"], metrics["finalists_kl"]
    best = min(finalists, key=finalists.get)
    assert shape_in(folder) == numbers_of(best)
    dense, written = load(tmp_path / "model"), load(folder)
    assert min(measured, key=measured.get) in finalists and finalists.keys() <= measured.keys()
    parameters = [sum(weight.numel() for weight in model.parameters()) for model in (dense, written)]
    assert metrics["parameters"] == parameters[1]
    assert metrics["ratio_reached"] == pytest.approx(1 - parameters[1] / parameters[0])
    step = 3 * dense.config.hidden_size * written.config.num_hidden_layers / parameters[0]
    assert abs(metrics["ratio_reached"] - 0.2) <= 0.6 * step, "within rounding of one width (and its biases)"

    kept, scores = kept_of(store, stage), scores_of(store)
    assert kept["layers"] == [
        layer for layer in range(LAYERS) if layer not in gone(metrics, written.config.num_hidden_layers)
    ]
    for place, layer in enumerate(kept["layers"]):
        for kind, name in (("neurons", "entropy"), ("kv_groups", "kv_groups.entropy")):
            row = kept[kind][place]
            assert row == sorted(scores[f"layers.{layer}.{name}"].topk(len(row)).indices.tolist())


def test_a_quick_stage_writes_the_fewest_layers_that_are_near_and_does_little_more_than_it_must(tmp_path, monkeypatch):
    """By count: tokens that pass a layer, of all blocks or only the first, and factorizations of matrices."""
    counts, forward, factorize = Counter(), single_layer.run_with_graph, torch.linalg.cholesky_ex

    def counted_forward(layer, hidden_BTC):
        counts["tokens"] += hidden_BTC.shape[:2].numel()
        return forward(layer, hidden_BTC)

    def counted_factorization(matrix):
        counts["factorizations"] += 1
        return factorize(matrix)

    store, stage = prepare(tmp_path, effort="quick", refit="block", samples=16)
    monkeypatch.setattr(single_layer, "run_with_graph", counted_forward)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted_factorization)
    run_here(store, stage)
    metrics = metrics_of(store, stage)
    measured = metrics["search_kl"]
    near = [name for name, kl in measured.items() if kl <= shape_search.NEAR * min(measured.values())]
    fewest, groups, _ = found = shape_in(store.handle(stage.id).artifact)
    assert found in map(numbers_of, near) and fewest == min(numbers_of(name)[0] for name in near)
    assert all(2 * numbers_of(name)[1] > GROUPS for name in measured) and 2 * groups > GROUPS
    assert "finalists_kl" not in metrics
    assert counts["tokens"] <= 4.1 * LAYERS * windows_of(store).numel()
    assert counts["factorizations"] <= 31 * LAYERS


def gone(metrics, num_layers, layers=LAYERS):
    return metrics["layers_in_order_of_dropping"][: layers - num_layers]


def shaped(store, shape, order, layers):
    """Return what a candidate keeps."""
    num_layers, groups, width = shape
    staying = tuple(layer for layer in range(layers) if layer not in order[: layers - num_layers])
    scores = scores_of(store)
    neurons, kv_groups = (
        [top_units(scores[f"layers.{layer}.{name}"], count) for layer in staying]
        for name, count in (("entropy", width), ("kv_groups.entropy", groups))
    )
    return Kept(staying, {"neurons": neurons, "kv_groups": kv_groups})


def test_layers_are_given_up_in_the_order_in_which_whole_models_miss_them_least(tmp_path, monkeypatch):
    layers = 6
    store, stage = prepare(tmp_path, layers=layers, refit="none", ratio=0.4)
    run_here(store, stage)
    order, windows = metrics_of(store, stage)["layers_in_order_of_dropping"], windows_of(store)[COMPARED]
    expected, checkpoint = [], open_checkpoint(tmp_path / "model")
    for _ in range(2):
        kls = {}
        for layer in sorted({*range(layers)} - {*expected}):
            whole = masked(checkpoint, Kept(tuple(sorted({*range(layers)} - {*expected, layer}))))
            kls[layer] = divergence(load(tmp_path / "model"), whole, windows, EVERY)
        expected.append(min(kls, key=kls.get))
    assert order == expected
    for name, kl in metrics_of(store, stage)["search_kl"].items():
        candidate = masked(checkpoint, shaped(store, numbers_of(name), order, layers))
        assert divergence(load(tmp_path / "model"), candidate, windows, EVERY) == pytest.approx(kl, rel=1e-3), name

    calls, measure = [], shape_search.measure_shapes
    monkeypatch.setattr(
        shape_search, "measure_shapes", lambda *given, **more: calls.append(1) or measure(*given, **more)
    )
    run_here(store, other := replace(stage, params=stage.params.model_copy(update={"ratio": 0.3})))
    known = metrics_of(store, other)["layers_in_order_of_dropping"]
    assert known and known == expected[: len(known)] and len(calls) == 1, "it is known for other ratios"


def rows(windows_ST, among_ST):
    return {int((among_ST == row).all(1).nonzero()[0]) for row in windows_ST}


@pytest.fixture
def used(monkeypatch):
    """Windows by use."""
    seen = {"shapes": [], "finalists": [], "finalist refits": [], "refit refits": []}
    measure, compare, refit = shape_search.measure_shapes, shape_search.mean_divergences, prune_refit.refit_layers

    def measuring(shapes, kinds, fitted_on, stream, *rest, **options):
        seen["shapes"] += [windows.windows_ST for windows in (fitted_on, stream) if windows is not None]
        return measure(shapes, kinds, fitted_on, stream, *rest, **options)

    def comparing(stream, *rest):
        seen["finalists"].append(stream.windows_ST)
        return compare(stream, *rest)

    def refitting(context, models, kept, windows_ST, folder, *, phase, whole_mlp):
        seen[f"{phase.split()[0]} refits"].append(windows_ST)
        return refit(context, models, kept, windows_ST, folder, phase=phase, whole_mlp=whole_mlp)

    monkeypatch.setattr(shape_search, "measure_shapes", measuring)
    monkeypatch.setattr(shape_search, "mean_divergences", comparing)
    for module in (shape_search, prune_refit):
        monkeypatch.setattr(module, "refit_layers", refitting)
    return seen


@pytest.mark.usefixtures("all_compete")
@pytest.mark.parametrize(("samples", "judged"), [(6, 2), (70, 4)])
def test_no_window_judges_finalists_that_was_seen_before(tmp_path, used, samples, judged):
    store, stage = prepare(tmp_path, samples=samples, layers=3, groups=2)
    run_here(store, stage)
    everything = windows_of(store)
    apart = rows(torch.cat(used["finalists"]), everything)
    seen = rows(torch.cat([*used["finalist refits"], *used["shapes"]]), everything)
    assert apart == set(range(samples - judged, samples)) and seen == set(range(samples - judged))
    (fitted_on,) = used["refit refits"]
    assert all((fitted_on == row).all(1).any() for row in everything), "what is written is fitted on all"


# Bits.


@pytest.mark.usefixtures("all_compete")
def test_any_number_of_ranks_finds_and_writes_the_same(tmp_path):
    """Of three ranks, one has no micro-batch in the search."""
    outcomes = []
    for ranks in (1, 3):
        (folder := tmp_path / str(ranks)).mkdir()
        store, stage = prepare(folder, "qwen3", samples=6, layers=3, refit="dense")
        ended = on_ranks(ranks, lambda world, store=store, stage=stage: run_here(store, stage, world))
        assert ended == [0] * ranks
        outcomes.append(outcome(store, stage))
    assert outcomes[0] == outcomes[1]
