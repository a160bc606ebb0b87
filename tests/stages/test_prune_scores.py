"""What scores highest stays, whatever shares the ratio: neurons and groups of a layer or of all, neurons of experts, or
experts in every group.
"""

import pytest
import shapes
import torch
from families import save_model, with_experts
from ranks import metrics_of, run_here
from shapes import kept_of, scores_of
from tiny import VARIANTS
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.structures import EXPERTS as WHOLE
from hfprune_dist.structures import KV_GROUPS, NEURONS
from hfprune_dist.structures.score_names import score_name

RATIO = 0.15
BOTH = [NEURONS, KV_GROUPS]
FREE = {"floor": 0.2, "protect_first": 0, "protect_last": 0}


@pytest.mark.parametrize(
    ("model_type", "allocation", "refit", "structures"),
    [
        *((name, "uniform", "none", [WHOLE]) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss")),
        ("mixtral", "uniform", "none", [NEURONS]),
        ("gpt_oss", "uniform", "dense", [NEURONS]),
        ("qwen2_moe", "local", "dense", BOTH),
        ("llama", "local", "none", BOTH),
        ("llama-tied-biases", "local", "dense", BOTH),
        ("llama-tied-biases", "global", "dense", BOTH),
        ("mistral", "global", "none", BOTH),
    ],
)
def test_what_scores_highest_stays(tmp_path, model_type, allocation, refit, structures):
    settings = {"allocation": allocation, "structures": structures, "refit": refit, "ratio": RATIO}
    settings |= FREE if structures == BOTH else {}
    if model_type in VARIANTS:
        store, stage = shapes.prepare(tmp_path, model_type, worth=4.0, **settings)
        folder = tmp_path / "model"
    else:
        changes = with_experts(model_type, 12) if structures == [WHOLE] else {}
        changes |= {"num_attention_heads": 8, "num_key_value_heads": 4} if structures == BOTH else {}
        folder = save_model(tmp_path / "model", model_type, **changes)
        store, stage = shapes.prepare(tmp_path / "cut", model=folder, samples=16, **settings)
    run_here(store, stage)
    scores, kept, metrics = scores_of(store), kept_of(store, stage), metrics_of(store, stage)
    written, dense = store.handle(stage.id).artifact, open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(written, trust_remote_code=True, dtype=torch.float32)
    assert metrics["parameters"] == sum(
        {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}.values()
    )
    if model_type in VARIANTS:
        step = (dense.num_layers if allocation == "local" else 1) * dense.parameters_per_unit / dense.parameters
        assert abs(metrics["ratio_reached"] - RATIO) <= 0.51 * step
        assert open_checkpoint(written).is_plain == (allocation == "local")
    else:
        assert metrics["ratio_reached"] >= RATIO
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        assert torch.equal(load_causal_lm(written, torch.float32)(ids).logits, model(ids).logits)
    for units in dense.pruned_kinds(structures):
        assert units.kind == KV_GROUPS or sum(map(len, kept[units.kind])) < sum(units.counts)
        for layer, rows in enumerate(kept[units.kind]):
            scores_EN = scores[score_name(layer, "entropy", units.kind)].view(units.parts, -1)
            count, width = len(rows) // units.parts, scores_EN.shape[1]
            best = [row.topk(count).indices.sort().values + width * part for part, row in enumerate(scores_EN)]
            assert rows == torch.cat(best).tolist()
            for field in units.fields if rows and open_checkpoint(written).is_plain else ():
                assert getattr(model.config, field) == metrics[field] == len(rows) // units.copies * units.fields[field]
