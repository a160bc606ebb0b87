"""FLAP's biases against the definition, and in recovery."""

import pytest
import shapes
import torch
from made_stages import stage_of
from masking import kept_in
from ranks import metrics_of, run_here
from shapes import windows_of
from tiny import write_pairs
from trained import weights_of
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm, require_own_weights
from hfprune_dist.store.stage import Input

BOTH = ["neurons", "kv_groups"]
LAYERS = 3
IDS = torch.arange(14)[None] + 3
OUTPUTS = {"neurons": "mlp.down_proj", "kv_groups": "self_attn.o_proj"}


def prepare(folder, variant):
    settings = {"allocation": "standardized", "criterion": "fluctuation", "structures": BOTH, "refit": "bias"}
    limits = {"floor": 0.0, "protect_first": 0, "protect_last": 0}
    return shapes.prepare(folder, variant, layers=LAYERS, **settings, **limits)


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
    return {kind: [torch.cat(batches).flatten(0, 1).mean(0) for batches in rows] for kind, rows in read.items()}, dense


def with_means_in_place(dense, kept, means):
    """Return the dense model with the channels that go replaced by their means, whatever it reads."""
    for kind in BOTH:
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
    run_here(store, stage)
    folder, metrics = store.handle(stage.id).artifact, metrics_of(store, stage)
    means, dense = dense_means(tmp_path / "model", windows_of(store))
    expected = logits(with_means_in_place(dense, kept_in(folder), means))
    ours = load_causal_lm(folder, torch.float32)
    torch.testing.assert_close(logits(ours), expected.float(), rtol=1e-3, atol=1e-3)
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(logits(remote), logits(ours)) and type(remote).__module__ != type(ours).__module__
    checkpoint = open_checkpoint(folder)
    require_own_weights(checkpoint)
    own = {"self_attn.o_proj", "mlp.down_proj"} if variant == "llama-tied-biases" else set()
    assert set(checkpoint.config.get("output_biases", [])) == set(OUTPUTS.values()) - own
    assert metrics["parameters"] == checkpoint.parameters == sum(weight.numel() for weight in remote.parameters())
    dense_size = open_checkpoint(tmp_path / "model").parameters
    assert metrics["ratio_reached"] == pytest.approx(1 - checkpoint.parameters / dense_size, abs=1e-12)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recovery_keeps_the_biases_or_trains_them(tmp_path, method):
    store, pruned = prepare(tmp_path, "llama")
    run_here(store, pruned)
    write_pairs(tmp_path / "pairs.jsonl")
    recovery = {"method": method, "sequence_length": 256, "batch_size": 4, "max_steps": 2, "dtype": "float32"}
    inputs = {"model": pruned.as_input(), "text": Input("pairs", str(tmp_path / "pairs.jsonl"))}
    stage = stage_of("recover", "tiny", {"recovery": recovery}, inputs)
    metrics, folder = run_here(store, stage), store.handle(stage.id).artifact
    before, after = weights_of(store.handle(pruned.id).artifact), weights_of(folder)
    biases = {f"model.layers.{layer}.{name}.bias" for layer in range(LAYERS) for name in OUTPUTS.values()}
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert biases <= before.keys() == after.keys() and moved
    assert biases <= moved if method == "full" else not biases & moved
    assert metrics["micro_batch_size"] == 1 and metrics["fused_kernels"] is False
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(logits(remote), logits(load_causal_lm(folder, torch.float32)))
    assert all(torch.equal(remote.state_dict()[name], after[name]) for name in biases)
