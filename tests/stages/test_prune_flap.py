"""FLAP's allocation and biases: against definitions."""

import pytest
import shapes
import torch
from masking import read_kept
from ranks import SoloWorld
from shapes import kept_of, metrics_of, scores_of, windows_of
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
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


@pytest.mark.parametrize("variant", ["llama", "llama-tied-biases"])
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


@pytest.mark.parametrize(
    ("criterion", "ratio", "floor", "protect_first"), [("fluctuation", 0.3, 0.25, 0), ("activation_l1", 0.2, 0.0, 1)]
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
