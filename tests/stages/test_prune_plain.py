"""The plain shape that is found, against whole models that transformers makes."""

import itertools
import re

import pytest
import torch
from faults.kill import deaths_during
from forks import on_ranks
from masking import mask
from ranks import SoloWorld
from refitting import held_out_errors, ridge_regression
from shapes import (
    GROUPS,
    LAYERS,
    NEURONS,
    QUERIES,
    divergence,
    kept_of,
    load,
    metrics_of,
    outcome,
    prepare,
    run,
    scores_of,
    windows_of,
)

from hfprune_dist.core.least_squares import RIDGES
from hfprune_dist.core.selection import entries_of, top_units
from hfprune_dist.refit.measurement import Measurement
from hfprune_dist.stages import prune_plain, prune_refit, shape_search
from hfprune_dist.stages.shape_search import EVERY
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures.kept import Kept

ALL_HOPEFUL = 1e6
# Of nine windows, in micro-batches of two, candidates are compared on two and finalists on one.
COMPARED, JUDGED = slice(6, 8), slice(8, 9)


@pytest.fixture
def all_hopeful(monkeypatch):
    """Allow as many finalists as there may be, however much random models differ."""
    monkeypatch.setattr(shape_search, "WORST_FINALIST", ALL_HOPEFUL)


def numbers_of(name):
    """Return the layers, KV groups and width that a metric's name states."""
    return tuple(map(int, re.fullmatch(r"(\d+) layers, (\d+) KV groups, width (\d+)", name).groups()))


def shape_in(folder):
    config = load(folder).config
    return config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size


@pytest.mark.parametrize(
    ("variant", "refit"),
    [
        ("llama", "dense"),
        ("llama-tied-biases", "layerwise"),
        ("qwen2", "block"),
        ("qwen3", "layerwise"),
        ("mistral", "dense"),
    ],
)
@pytest.mark.usefixtures("all_hopeful")
def test_the_finalist_that_is_closest_on_windows_apart_is_written(tmp_path, variant, refit):
    store, stage = prepare(tmp_path, variant, refit=refit)
    run(store, stage, SoloWorld())
    metrics, folder = metrics_of(store, stage), store.path(stage.id)
    measured, finalists = metrics["search_kl"], metrics["finalists_kl"]
    best = min(finalists, key=finalists.get)
    assert shape_in(folder) == numbers_of(best)
    dense, written = load(tmp_path / "model"), load(folder)
    assert set(finalists) == expected_finalists(measured, finalists)
    parameters = [sum(it.numel() for it in model.parameters()) for model in (dense, written)]
    assert metrics["parameters"] == parameters[1]
    assert metrics["ratio_reached"] == pytest.approx(1 - parameters[1] / parameters[0])
    step = 3 * dense.config.hidden_size * written.config.num_hidden_layers / parameters[0]
    assert abs(metrics["ratio_reached"] - 0.2) <= 0.6 * step, "within rounding of one width (and its biases)"

    kept, scores = kept_of(store, stage), scores_of(store)
    assert kept["layers"] == [it for it in range(LAYERS) if it not in gone(metrics, written.config.num_hidden_layers)]
    for place, layer in enumerate(kept["layers"]):
        for kind, name in (("neurons", "entropy"), ("kv_groups", "kv_groups.entropy")):
            row = kept[kind][place]
            assert row == sorted(scores[f"layers.{layer}.{name}"].topk(len(row)).indices.tolist())
    for name in ("refit_ridge", "refit_kv_groups_ridge"):
        assert len(metrics[name]) == len(kept["layers"])


def expected_finalists(measured, finalists, layers=LAYERS):
    """Return the names of finalists, given how close they are."""
    most = shape_search.WORST_FINALIST * min(measured.values())
    hopeful = [it for it in sorted(measured, key=measured.get) if measured[it] <= most]
    mlp_alone = [name for name in hopeful if numbers_of(name)[:2] == (layers, GROUPS)]
    expected = {*mlp_alone, *[name for name in hopeful if name not in mlp_alone][: prune_plain.FINALISTS]}
    while True:
        fewest, groups, _ = numbers_of(min(expected, key=finalists.get))
        fewer = [it for it in hopeful if numbers_of(it)[1] == groups and numbers_of(it)[0] < fewest]
        following = {*sorted(fewer, key=numbers_of)[-1:]}
        if following <= expected:
            return expected
        expected |= following


@pytest.mark.usefixtures("all_hopeful")
@pytest.mark.parametrize("ratio", [0.17, 0.2])
def test_the_closest_is_tried_with_fewer_layers_while_that_helps(tmp_path, monkeypatch, ratio):
    monkeypatch.setattr(prune_plain, "FINALISTS", 0)
    store, stage = prepare(tmp_path, layers=6, ratio=ratio)
    run(store, stage, SoloWorld())
    measured, finalists = (metrics_of(store, stage)[name] for name in ("search_kl", "finalists_kl"))
    tried = sorted(finalists, key=numbers_of, reverse=True)
    assert [numbers_of(name)[0] for name in tried] == list(range(6, 6 - len(tried), -1)) and len(tried) > 1
    kls = [finalists[name] for name in tried]
    assert all(later < earlier for earlier, later in itertools.pairwise(kls[:-1])), "it goes on where that helped"
    assert set(finalists) == expected_finalists(measured, finalists, layers=6)
    assert shape_in(store.path(stage.id)) == numbers_of(min(finalists, key=finalists.get))


def gone(metrics, num_layers, layers=LAYERS):
    return metrics["layers_in_order_of_dropping"][: layers - num_layers]


def shaped(store, shape, order, layers):
    """Return what a candidate keeps."""
    num_layers, groups, width = shape
    staying = tuple(it for it in range(layers) if it not in order[: layers - num_layers])
    scores = scores_of(store)
    neurons, kv_groups = (
        [top_units(scores[f"layers.{layer}.{name}"], count) for layer in staying]
        for name, count in (("entropy", width), ("kv_groups.entropy", groups))
    )
    return Kept(staying, {"neurons": neurons, "kv_groups": kv_groups})


def test_layers_are_given_up_in_the_order_in_which_whole_models_miss_them_least(tmp_path):
    layers = 6
    store, stage = prepare(tmp_path, layers=layers, refit="none", ratio=0.4)
    run(store, stage, SoloWorld())
    order, windows = metrics_of(store, stage)["layers_in_order_of_dropping"], windows_of(store)[COMPARED]
    expected = []
    for _ in range(2):
        kls = {}
        for layer in sorted({*range(layers)} - {*expected}):
            whole = mask(load(tmp_path / "model"), Kept(tuple(sorted({*range(layers)} - {*expected, layer}))))
            kls[layer] = divergence(load(tmp_path / "model"), whole, windows, EVERY)
        expected.append(min(kls, key=kls.get))
    assert order == expected
    for name, kl in metrics_of(store, stage)["search_kl"].items():
        masked = mask(load(tmp_path / "model"), shaped(store, numbers_of(name), order, layers))
        assert divergence(load(tmp_path / "model"), masked, windows, EVERY) == pytest.approx(kl, rel=1e-3), name


def inputs_of(model, windows_ST, name):
    """Return what an output projection reads in every layer, [windows, tokens, channels] in float64."""
    seen = []
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].double()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(windows_ST, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_candidates_are_measured_with_least_squares_on_dense_activations(tmp_path):
    """The reference is ridge regression in float64, on windows that are neither compared nor set apart."""
    store, stage = prepare(tmp_path)
    run(store, stage, SoloWorld())
    metrics, windows = metrics_of(store, stage), windows_of(store)
    measured = metrics["search_kl"]
    shapes = {
        name: shaped(store, numbers_of(name), metrics["layers_in_order_of_dropping"], LAYERS) for name in measured
    }
    dense = load(tmp_path / "model")
    models = {name: load(tmp_path / "model") for name in measured}
    head_dim = dense.config.hidden_size // dense.config.num_attention_heads
    for kind, projection, per_unit, most in (
        ("neurons", "mlp.down_proj", 1, NEURONS),
        ("kv_groups", "self_attn.o_proj", QUERIES * head_dim, GROUPS),
    ):
        hidden = inputs_of(dense, windows[:8], projection)
        for layer in range(LAYERS):
            weight = dense.model.layers[layer].get_submodule(projection).weight.detach().double()
            kept = {name: it.of_layer(layer, kind) for name, it in shapes.items() if layer in it.layers}
            columns = {name: entries_of(row, per_unit) for name, row in kept.items() if len(row) < most}
            if not columns:
                continue
            fewest = min(columns.values(), key=len)
            targets = hidden[layer] @ weight.T
            errors = held_out_errors(RIDGES, weight[:, fewest], hidden[layer][..., fewest], targets)
            ridge = min(errors, key=errors.get)
            for name, channels in columns.items():
                fitted = hidden[layer][: COMPARED.start].flatten(0, 1)
                found = ridge_regression(weight[:, channels], fitted[:, channels], fitted @ weight.T, ridge)
                module = models[name].model.layers[layer].get_submodule(projection)
                module.weight.data.zero_()
                module.weight.data[:, channels] = found.float()
    for name, kl in measured.items():
        model = mask(models[name], Kept(shapes[name].layers))
        assert divergence(dense, model, windows[COMPARED], EVERY) == pytest.approx(kl, rel=1e-3), name


def rows(windows_ST, among_ST):
    return {int((among_ST == row).all(1).nonzero()[0]) for row in windows_ST}


@pytest.fixture
def used(monkeypatch):
    """Windows by use: those of measurements, which are made in this order, and those of refits."""
    seen = {"finalists refits": [], "refit refits": []}
    init, refit, phases = Measurement.__init__, prune_refit.refit_layers, iter(["finalists", "layers", "shapes"])

    def measuring(self, checkpoint, variants, micro_batches, **options):
        seen[next(phases)] = torch.cat(list(micro_batches.values()))
        init(self, checkpoint, variants, micro_batches, **options)

    def refitting(context, models, kept, windows_ST, fitted, *, phase):
        seen[f"{phase} refits"].append(windows_ST)
        refit(context, models, kept, windows_ST, fitted, phase=phase)

    monkeypatch.setattr(Measurement, "__init__", measuring)
    for module in (shape_search, prune_refit):
        monkeypatch.setattr(module, "refit_layers", refitting)
    return seen


@pytest.mark.usefixtures("all_hopeful")
@pytest.mark.parametrize(("samples", "judged"), [(3, 1), (4, 2), (9, 1), (70, 4)])
def test_no_window_judges_finalists_that_was_seen_before(tmp_path, used, samples, judged):
    store, stage = prepare(tmp_path, samples=samples, layers=3, groups=2)
    run(store, stage, SoloWorld())
    everything = windows_of(store)
    apart = rows(used["finalists"], everything)
    seen = rows(torch.cat([*used["finalists refits"], used["layers"], used["shapes"]]), everything)
    assert apart == set(range(samples - judged, samples)) and seen == set(range(samples - judged))
    (fitted_on,) = used["refit refits"]
    assert torch.equal(fitted_on, everything), "what is written is fitted on all"


# Bits.


@pytest.mark.parametrize(
    ("variant", "samples", "several", "method"),
    [
        ("qwen2", 9, 3, {"refit": "layerwise", "structures": ["neurons", "kv_groups"]}),
        ("llama-tied-biases", 1, 2, {"refit": "block"}),
        ("qwen3", 4, 3, {"refit": "dense", "dtype": "bfloat16"}),
        ("mistral", 5, 2, {"refit": "none", "structures": ["neurons", "layers"]}),
    ],
)
@pytest.mark.usefixtures("all_hopeful")
def test_any_number_of_ranks_finds_and_writes_the_same(tmp_path, variant, samples, several, method):
    """This also holds for fewer micro-batches than ranks."""
    outcomes = []
    for ranks in (1, several):
        (folder := tmp_path / str(ranks)).mkdir()
        store, stage = prepare(folder, variant, samples=samples, layers=3, **method)
        ended = on_ranks(ranks, lambda world, store=store, stage=stage: run(store, stage, world))
        assert ended.codes == [0] * ranks
        outcomes.append(outcome(store, stage))
    assert outcomes[0] == outcomes[1]


# What can't go, or needn't.


@pytest.mark.usefixtures("all_hopeful")
def test_death_before_any_file_appears_ends_with_the_same_bits(tmp_path):
    """It dies before every file that is written, of finalists, of the final refit and of the checkpoint."""
    reference, stage = prepare(tmp_path, layers=3, groups=2, samples=4)
    (tmp_path / "copies").mkdir()
    appearing = "rename", "replace"
    deaths = deaths_during(lambda: run(reference, stage, SoloWorld()), reference.root, tmp_path / "copies", appearing)
    expected, found = outcome(reference, stage), set()
    for store in map(Store, deaths):
        found |= {file.parent.name.partition("-")[0] for file in store.work(stage.id).rglob("*") if file.is_file()}
        if store.handle(stage.id).verify().state == "missing":
            run(store, stage, SoloWorld())
        assert outcome(store, stage) == expected
    assert len(deaths) > 10 and found >= {"final", "refit"}
