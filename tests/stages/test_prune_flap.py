"""FLAP's allocation and biases: against definitions, on any number of ranks, after deaths, and when pruned again."""

import json

import pytest
import shapes
import torch
from faults.kill import arm
from forks import on_ranks
from masking import read_kept
from ranks import SoloWorld
from shapes import IMPORTANCE, kept_of, load, metrics_of, outcome, scores_of, windows_of
from tiny import VARIANTS
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.models.loading import load_causal_lm, require_own_weights

BOTH = ["neurons", "kv_groups"]
LAYERS = 3
IDS = torch.arange(14)[None] + 3
OUTPUTS = {"neurons": "mlp.down_proj", "kv_groups": "self_attn.o_proj"}


def prepare(folder, variant="llama", **changes):
    settings = {"allocation": "standardized", "criterion": "fluctuation", "structures": BOTH, "refit": "bias"}
    limits = {"floor": 0.0, "protect_first": 0, "protect_last": 0}
    if changes.get("allocation") == "local":
        del limits["floor"]
    return shapes.prepare(folder, variant, layers=LAYERS, **{**settings, **limits, **changes})


def run(store, stage, world=None):
    shapes.run(store, stage, world or SoloWorld())


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def dense_means(folder, windows_ST):
    """Return, by kind, the mean of what each layer's output projection reads, and the dense model, both in float64."""
    dense = load_causal_lm(folder, torch.float32).double()
    read = {kind: [[] for _ in dense.model.layers] for kind in OUTPUTS}
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _m, args, to=read[kind][number]: to.append(args[0]))
        for number, layer in enumerate(dense.model.layers)
        for kind, name in OUTPUTS.items()
    ]
    logits(dense, windows_ST)
    for handle in handles:
        handle.remove()
    return {kind: [torch.cat(it).flatten(0, 1).mean(0) for it in rows] for kind, rows in read.items()}, dense


def with_means_in_place(dense, kept, means, kinds=BOTH):
    """Return the dense model with the channels that go replaced by their means, whatever it reads."""
    for kind in kinds:
        for number, layer in enumerate(dense.model.layers):
            projection, rows = layer.get_submodule(OUTPUTS[kind]), kept.units[kind][number]
            units = {"neurons": shapes.NEURONS, "kv_groups": shapes.GROUPS}[kind]
            stays_U = torch.zeros(units, dtype=torch.bool).index_fill_(0, rows, True)
            stays_D = stays_U.repeat_interleave(projection.in_features // units)

            def replace(_module, args, stays_D=stays_D, mean_D=means[kind][number]):
                return (torch.where(stays_D, args[0], mean_D.to(args[0])),)

            projection.register_forward_pre_hook(replace)
    return dense


@pytest.mark.parametrize("variant", VARIANTS)
def test_removed_channels_are_their_means_on_any_text(tmp_path, variant):
    store, stage = prepare(tmp_path, variant)
    run(store, stage)
    folder, metrics = store.path(stage.id), metrics_of(store, stage)
    means, dense = dense_means(tmp_path / "model", windows_of(store))
    expected = logits(with_means_in_place(dense, read_kept(folder), means))
    ours = load_causal_lm(folder, torch.float32)
    torch.testing.assert_close(logits(ours), expected.float(), rtol=1e-3, atol=1e-3)
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(logits(remote), logits(ours)) and type(remote).__module__ != type(ours).__module__
    assert remote.generate(IDS, max_new_tokens=3).shape == (1, 17)
    checkpoint = open_checkpoint(folder)
    require_own_weights(checkpoint)
    own = {"self_attn.o_proj", "mlp.down_proj"} if variant == "llama-tied-biases" else set()
    assert set(checkpoint.config.get("output_biases", [])) == set(OUTPUTS.values()) - own
    assert metrics["parameters"] == checkpoint.parameters == sum(it.numel() for it in remote.parameters())
    dense_size = open_checkpoint(tmp_path / "model").parameters
    assert metrics["ratio_reached"] == pytest.approx(1 - checkpoint.parameters / dense_size, abs=1e-12)


@pytest.mark.parametrize("variant", ["llama", "llama-tied-biases"])
def test_on_calibration_text_the_mean_output_of_a_projection_stays(tmp_path, variant):
    """It is checked on the first layer's attention, whose input is the same as before."""
    store, stage = prepare(tmp_path, variant)
    run(store, stage)
    windows = windows_of(store)
    models = load_causal_lm(tmp_path / "model", torch.float32), load_causal_lm(store.path(stage.id), torch.float32)
    put_out = []
    for model in models:
        projection = model.model.layers[0].self_attn.o_proj
        handle = projection.register_forward_hook(lambda _m, _args, output: put_out.append(output.double()))
        logits(model, windows)
        handle.remove()
    before, after = (it.flatten(0, 1) for it in put_out)
    assert len(kept_of(store, stage)["kv_groups"][0]) < shapes.GROUPS and (before - after).abs().max() > 0.1
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=0, atol=1e-5)


def test_where_an_architecture_has_the_biases_equal_layers_make_a_plain_checkpoint(tmp_path):
    store, stage = prepare(tmp_path, "llama-tied-biases", allocation="local")
    run(store, stage)
    folder = store.path(stage.id)
    assert open_checkpoint(folder).is_plain and not list(folder.glob("*.py"))
    means, dense = dense_means(tmp_path / "model", windows_of(store))
    expected = logits(with_means_in_place(dense, read_kept(folder), means))
    torch.testing.assert_close(logits(load(folder)), expected.float(), rtol=1e-3, atol=1e-3)
    assert metrics_of(store, stage)["parameters"] == open_checkpoint(folder).parameters


def test_neurons_alone_of_equal_layers_add_biases_to_down_projections_alone(tmp_path):
    store, stage = prepare(tmp_path, "qwen2", allocation="uniform", structures=["neurons"], ratio=0.1)
    run(store, stage)
    checkpoint = open_checkpoint(store.path(stage.id))
    assert checkpoint.config["output_biases"] == ["mlp.down_proj"] and checkpoint.is_uniform and not checkpoint.is_plain
    biases = {name for name in checkpoint.tensors if name.endswith(("o_proj.bias", "down_proj.bias"))}
    assert biases == {f"model.layers.{number}.mlp.down_proj.bias" for number in range(LAYERS)}
    means, dense = dense_means(tmp_path / "model", windows_of(store))
    expected = logits(with_means_in_place(dense, read_kept(store.path(stage.id)), means, ["neurons"]))
    remote = AutoModelForCausalLM.from_pretrained(store.path(stage.id), trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(logits(remote), expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_that_was_given_biases_gets_a_low_rank(tmp_path, variant):
    store, stage = prepare(tmp_path / "first", variant, allocation="local")
    run(store, stage)
    first = store.path(stage.id)
    asked = {"allocation": "low_rank", "criterion": "lorap", "refit": "none", "structures": ["neurons"], "ratio": 0.4}
    again, second = shapes.prepare(tmp_path / "second", model=first, **asked)
    run(again, second)
    folder = again.path(second.id)
    require_own_weights(open_checkpoint(folder))
    ours, expected = load_causal_lm(folder, torch.float32), load_causal_lm(first, torch.float32)
    rows = kept_of(again, second)["neurons"]
    for layer, low, kept in zip(expected.model.layers, ours.model.layers, rows, strict=True):
        staying = torch.zeros(layer.mlp.down_proj.in_features).index_fill_(0, torch.tensor(kept), 1)
        layer.mlp.down_proj.weight.data *= staying
        down, up = low.self_attn.o_proj
        layer.self_attn.o_proj.weight.data = up.weight.data @ down.weight.data
        assert torch.equal(up.bias, layer.self_attn.o_proj.bias) and up.bias.abs().max() > 0
        for name in ("q_proj", "k_proj", "v_proj"):
            made = getattr(low.self_attn, name)
            product = made[1].weight @ made[0].weight if isinstance(made, torch.nn.Sequential) else made.weight
            getattr(layer.self_attn, name).weight.data = product.data
    torch.testing.assert_close(logits(ours), logits(expected), rtol=1e-3, atol=1e-3)
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(logits(remote), logits(ours))
    assert metrics_of(again, second)["parameters"] == sum(it.numel() for it in remote.parameters())


@pytest.mark.parametrize("refit", ["bias", "dense", "layerwise"])
def test_a_checkpoint_with_biases_is_pruned_again(tmp_path, refit):
    """Its biases stay, and those of what goes now are added to them."""
    store, first = prepare(tmp_path, "qwen3", ratio=0.1)
    run(store, first)
    again, second = prepare(tmp_path / "again", model=store.path(first.id), ratio=0.2, refit=refit)
    run(again, second)
    checkpoint = open_checkpoint(again.path(second.id))
    require_own_weights(checkpoint)
    assert metrics_of(again, second)["parameters"] == checkpoint.parameters
    assert metrics_of(again, second)["ratio_reached"] == pytest.approx(0.2, abs=0.02)
    assert sorted(checkpoint.config["output_biases"]) == sorted(OUTPUTS.values())
    remote = AutoModelForCausalLM.from_pretrained(again.path(second.id), trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(logits(remote), logits(load_causal_lm(again.path(second.id), torch.float32)))
    if refit == "bias":
        means, half = dense_means(store.path(first.id), windows_of(again))
        structures = open_checkpoint(store.path(first.id)).structures
        expected = logits(with_means_kept(half, structures, kept_of(again, second), means))
        torch.testing.assert_close(logits(remote), expected.float(), rtol=1e-3, atol=1e-3)


def with_means_kept(half, structures, left, means):
    """Do as ``with_means_in_place`` for a model whose layers differ."""
    for kind in BOTH:
        for number, layer in enumerate(half.model.layers):
            projection = layer.get_submodule(OUTPUTS[kind])
            stays_U = torch.tensor([unit in left[kind][number] for unit in range(structures[kind].counts[number])])
            stays_D = stays_U.repeat_interleave(projection.in_features // len(stays_U))
            mean_D = means[kind][number]
            projection.register_forward_pre_hook(
                lambda _m, args, stays_D=stays_D, mean_D=mean_D: (torch.where(stays_D, args[0], mean_D.to(args[0])),)
            )
    return half


# The order in which units are removed.


def standardized_by_hand(scores, criterion):
    """Return (standardized score, layer, kind) of every unit; fluctuations are already in channels' deviations."""
    units = []
    for kind in BOTH:
        for layer in range(LAYERS):
            score = scores[".".join(["layers", str(layer), *(["kv_groups"] if kind == "kv_groups" else []), criterion])]
            centred = score - score.mean()
            spread = 1.0 if criterion == "fluctuation" else score.std()
            units += [(float(it / spread), layer, kind, unit) for unit, it in enumerate(centred)]
    return sorted(units)


@pytest.mark.parametrize("criterion", ["fluctuation", "activation_l1"])
@pytest.mark.parametrize(
    ("ratio", "floor", "protect_first"), [(0.05, 0.0, 0), (0.3, 0.0, 0), (0.3, 0.25, 0), (0.2, 0.0, 1)]
)
def test_units_of_all_layers_and_kinds_go_in_one_order_until_enough_parameters_are_gone(
    tmp_path, criterion, ratio, floor, protect_first
):
    """Sizes don't affect the order; where the last group was too much, only neurons that went come back."""
    limits = {"floor": floor, "protect_first": protect_first}
    store, stage = prepare(tmp_path, criterion=criterion, refit="none", ratio=ratio, worth=2.0, **limits)
    run(store, stage)
    checkpoint, kept = open_checkpoint(tmp_path / "model"), kept_of(store, stage)
    sizes = checkpoint.parameter_counts.units
    order = standardized_by_hand(scores_of(store), criterion)
    stays = {(layer, kind): getattr(shapes, {"neurons": "NEURONS"}.get(kind, "GROUPS")) for _, layer, kind, _ in order}
    least = {"neurons": max(1, round(floor * shapes.NEURONS)), "kv_groups": 1}
    gone, wanted, went = 0, round(ratio * checkpoint.parameters), []
    for _, layer, kind, unit in order:
        if gone < wanted and stays[layer, kind] > least[kind] and layer >= protect_first:
            stays[layer, kind] -= 1
            gone += sizes[kind]
            went.append((layer, kind, unit))
    for place in [it for it in went[::-1] if it[1] == "neurons"]:
        if 2 * (gone - wanted) > sizes["neurons"]:
            gone -= sizes["neurons"]
            went.remove(place)
    expected = {
        kind: [set(range(getattr(shapes, name))) for _ in range(LAYERS)]
        for kind, name in (("neurons", "NEURONS"), ("kv_groups", "GROUPS"))
    }
    for layer, kind, unit in went:
        expected[kind][layer].remove(unit)
    assert {kind: [sorted(row) for row in rows] for kind, rows in expected.items()} == {it: kept[it] for it in BOTH}
    assert abs(gone - wanted) <= sizes["neurons"] / 2
    assert metrics_of(store, stage)["ratio_reached"] == pytest.approx(gone / checkpoint.parameters, abs=1e-12)


# Ranks and deaths.


def test_any_number_of_ranks_writes_the_same_bits(tmp_path):
    outcomes = []
    for ranks in (1, 2, 3):
        store, stage = prepare(tmp_path / str(ranks), dtype="bfloat16", samples=3)
        ended = on_ranks(ranks, lambda world, store=store, stage=stage: run(store, stage, world))
        assert ended.codes == [0] * ranks, ended.messages
        outcomes.append(outcome(store, stage))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    store, stage = prepare(tmp_path_factory.mktemp("whole"))
    assert on_ranks(1, lambda world: run(store, stage, world)).codes == [0]
    return outcome(store, stage)


@pytest.mark.parametrize("kill_at", [1, 2, 3, 6])
def test_a_death_at_any_write_of_biases_ends_with_the_same_checkpoint(tmp_path, whole, kill_at):
    store, stage = prepare(tmp_path)

    def die(world):
        arm(kill_at, "/biases/")
        run(store, stage, world)

    assert on_ranks(1, die).codes == [-9]
    assert on_ranks(2, lambda world: run(store, stage, world)).codes == [0, 0]
    assert outcome(store, stage) == whole


def test_a_damaged_file_of_biases_is_made_again_and_no_other(tmp_path, whole, monkeypatch):
    store, stage = prepare(tmp_path)
    written, write = [], SavedLayers.write
    monkeypatch.setattr(
        SavedLayers, "write", lambda self, number, it: (written.append(number), write(self, number, it))
    )
    with monkeypatch.context() as patch:
        patch.setattr(shapes.Context, "open_draft", lambda _self: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run(store, stage)
    file = store.work(stage.id) / "biases" / "layer-1.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    run(store, stage)
    assert written == [0, 1, 2, 1] and outcome(store, stage) == whole


def test_biases_are_in_the_index_of_a_checkpoint_of_several_files(tmp_path):
    store, stage = prepare(tmp_path)
    model = tmp_path / "model"
    load(model).save_pretrained(model, max_shard_size="20KB")
    (model / "model.safetensors").unlink()
    run(store, stage)
    folder = store.path(stage.id)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for number in range(LAYERS):
        for name in OUTPUTS.values():
            module = f"model.layers.{number}.{name}"
            assert weight_map[f"{module}.bias"] == weight_map[f"{module}.weight"]
    assert len(set(weight_map.values())) > 2 and IMPORTANCE.id in stage.inputs["importance"].location
    assert torch.equal(
        logits(load_causal_lm(folder, torch.float32)),
        logits(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)),
    )
