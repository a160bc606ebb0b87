"""LoRAP's cut against its definition with whole layers in float64; loaded, the same on any number of ranks."""

import pytest
import shapes
import torch
from ranks import SoloWorld
from refitting import embedded, inside
from safetensors.torch import load_file
from shapes import LAYERS, NEURONS, kept_of, metrics_of, outcome, windows_of
from transformers import AutoModelForCausalLM
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm, require_own_weights
from hfprune_dist.models.single_layer import part_of, run

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
IDS = torch.arange(12)[None] + 3


def prepare(folder, variant="llama", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"allocation": "low_rank", "criterion": "lorap", "refit": "none", "structures": ["neurons"]}
    return shapes.prepare(folder, variant, **{**settings, "ratio": 0.3, **changes})


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


def norms(rows_BTD):
    """Return the norms of the channels that a module reads, over a window, averaged over windows."""
    return rows_BTD.double().square().sum(1).mean(0).sqrt()


def truncated(weight, read, rank):
    """Return the product of LoRAP's factors."""
    left, values, right = torch.linalg.svd(weight * read, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] / read


def defined(checkpoint, windows_ST, ranks, width):
    """Return what stays of every layer, and the matrices that replace attention's, layer by layer."""
    reader, hidden = embedded(checkpoint, windows_ST)
    kept, products = [], []
    for number in range(checkpoint.num_layers):
        layer = reader.layer(number)
        attention, mlp = part_of(layer, "self_attn"), part_of(layer, "mlp")
        seen = inside(layer, hidden)
        norm, attended = seen["input_layernorm"][1], seen["self_attn.o_proj"][0]
        normed, gated = seen["post_attention_layernorm"][1], seen["mlp.down_proj"][0]
        d, d_hidden = norms(normed), norms(gated)
        scores = sum((it.weight.data * d).norm(dim=1) for it in (mlp.gate_proj, mlp.up_proj))
        scores += mlp.down_proj.weight.data.norm(dim=0) * d_hidden
        order = scores.argsort()
        lowest = int(0.01 * len(order))
        staying = torch.cat([order[:lowest], order[lowest + len(order) - width :]]).sort().values
        kept.append(staying.tolist())
        gone = torch.ones(len(order), dtype=torch.bool).index_fill_(0, staying, False)
        mlp.down_proj.weight.data[:, gone] = 0
        products.append({})
        for name, rank in ranks.items():
            linear = getattr(attention, name)
            linear.weight.data = truncated(linear.weight.data, norms(attended if name == "o_proj" else norm), rank)
            products[-1][name] = linear.weight.data
        hidden = run(layer, hidden)
    return kept, products


@pytest.mark.parametrize(("variant", "ratio"), [("llama", 0.15), ("qwen3", 0.45)])
def test_neurons_and_matrices_are_those_of_the_definition(tmp_path, variant, ratio):
    biases = {"attention_bias": True} if variant == "qwen3" else {}
    store, stage = prepare(tmp_path, variant, ratio=ratio, **biases)
    shapes.run(store, stage, SoloWorld())
    metrics, folder, dense = metrics_of(store, stage), store.path(stage.id), open_checkpoint(tmp_path / "model")
    ranks, (width,) = metrics["attention_ranks"], set(metrics["intermediate_sizes"])
    assert set(ranks) == set(PROJECTIONS[:2] if ratio == 0.15 else PROJECTIONS)
    kept, products = defined(dense, windows_of(store), ranks, width)
    assert kept_of(store, stage)["neurons"] == kept
    tensors = load_file(folder / "model.safetensors")
    original = load_file(tmp_path / "model" / "model.safetensors")
    for number in range(LAYERS):
        prefix = f"model.layers.{number}.self_attn."
        for name in PROJECTIONS:
            bias = original.get(f"{prefix}{name}.bias")
            if name not in ranks:
                assert torch.equal(tensors[f"{prefix}{name}.weight"], original[f"{prefix}{name}.weight"])
                continue
            first, second = (tensors[f"{prefix}{name}.{place}.weight"].double() for place in (0, 1))
            assert first.shape[0] == second.shape[1] == ranks[name] and f"{prefix}{name}.weight" not in tensors
            torch.testing.assert_close(second @ first, products[number][name], rtol=1e-3, atol=1e-3)
            assert bias is None or torch.equal(tensors[f"{prefix}{name}.1.bias"], bias)


def test_what_is_written_loads_everywhere_with_its_code_and_computes_products(tmp_path):
    store, stage = prepare(tmp_path, "qwen2", ratio=0.45)
    shapes.run(store, stage, SoloWorld())
    folder, metrics = store.path(stage.id), metrics_of(store, stage)
    checkpoint, dense = open_checkpoint(folder), open_checkpoint(tmp_path / "model")
    require_own_weights(checkpoint)
    ours = load_causal_lm(folder, torch.float32)
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(logits_of(ours), logits_of(remote))
    generated = remote.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated[:, : IDS.shape[1]].equal(IDS), "with a cache"
    assert sum(it.numel() for it in ours.parameters()) == metrics["parameters"] == checkpoint.parameters
    step = LAYERS * dense.parameters_per_unit / dense.parameters
    assert metrics["ratio_reached"] == pytest.approx(1 - checkpoint.parameters / dense.parameters)
    assert abs(metrics["ratio_reached"] - 0.45) <= 0.51 * step
    whole = load_causal_lm(tmp_path / "model", torch.float32)
    whole.config.intermediate_size = metrics["intermediate_size"]
    for layer, low, kept in zip(whole.model.layers, ours.model.layers, kept_of(store, stage)["neurons"], strict=True):
        for name in PROJECTIONS:
            first, second = getattr(low.self_attn, name)
            getattr(layer.self_attn, name).weight.data = second.weight.data @ first.weight.data
        gone = torch.ones(NEURONS, dtype=torch.bool).index_fill_(0, torch.tensor(kept), False)
        layer.mlp.down_proj.weight.data[:, gone] = 0
    torch.testing.assert_close(logits_of(whole), logits_of(ours), rtol=1e-3, atol=1e-3)


def test_any_number_of_ranks_writes_the_same_bits(tmp_path):
    """Of nine windows in micro-batches of two, the sixth rank gets none. Sweeps of rivals compare real ranks."""
    outcomes = []
    for size in (1, 6):
        store, stage = prepare(tmp_path / str(size), "qwen2", ratio=0.45)
        Ranks(size).run(lambda world, store=store, stage=stage: shapes.run(store, stage, world))
        outcomes.append(outcome(store, stage))
    assert outcomes[0] == outcomes[1]
