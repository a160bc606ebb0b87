"""What LoRAP's cut writes: products of its factors; the same on any number of ranks. Which factors these should be is
tested with model families in checkpoints/.
"""

import pytest
import shapes
import torch
from ranks import metrics_of, run_here
from shapes import LAYERS, NEURONS, kept_of, outcome
from transformers import AutoModelForCausalLM
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm, require_own_weights

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
IDS = torch.arange(12)[None] + 3


def prepare(folder, variant="llama", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"allocation": "low_rank", "criterion": "lorap", "refit": "none", "structures": ["neurons"]}
    return shapes.prepare(folder, variant, **{**settings, "ratio": 0.3, **changes})


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


@pytest.mark.parametrize(("variant", "ratio", "cut"), [("qwen2", 0.45, PROJECTIONS), ("llama", 0.15, PROJECTIONS[:2])])
def test_what_is_written_loads_everywhere_with_its_code_and_computes_products(tmp_path, variant, ratio, cut):
    store, stage = prepare(tmp_path, variant, ratio=ratio)
    run_here(store, stage)
    folder, metrics = store.handle(stage.id).artifact, metrics_of(store, stage)
    assert set(metrics["attention_ranks"]) == set(cut)
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
    assert abs(metrics["ratio_reached"] - ratio) <= 0.51 * step
    whole = load_causal_lm(tmp_path / "model", torch.float32)
    whole.config.intermediate_size = metrics["intermediate_size"]
    for layer, low, kept in zip(whole.model.layers, ours.model.layers, kept_of(store, stage)["neurons"], strict=True):
        for name in cut:
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
        Ranks(size).run(lambda world, store=store, stage=stage: run_here(store, stage, world))
        outcomes.append(outcome(store, stage))
    assert outcomes[0] == outcomes[1]
