"""The prune stage on mixtures of experts: it keeps the same number of neurons in every expert, or of experts in every
group, those that score highest.
"""

import pytest
import shapes
import torch
from families import save_model, with_experts
from ranks import metrics_of, run_here
from shapes import kept_of, scores_of
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.structures import EXPERTS as WHOLE
from hfprune_dist.structures import KV_GROUPS, NEURONS
from hfprune_dist.structures.score_names import score_name

RATIO = 0.15
BOTH = [NEURONS, KV_GROUPS]


@pytest.mark.parametrize(
    ("model_type", "refit", "structures"),
    [
        *((name, "none", [WHOLE]) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss")),
        ("mixtral", "none", [NEURONS]),
        ("gpt_oss", "dense", [NEURONS]),
        ("qwen2_moe", "dense", BOTH),
    ],
)
def test_what_scores_highest_stays(tmp_path, model_type, refit, structures):
    changes = with_experts(model_type, 12) if structures == [WHOLE] else {}
    changes |= {"num_attention_heads": 8, "num_key_value_heads": 4} if structures == BOTH else {}
    folder = save_model(tmp_path / "model", model_type, **changes)
    settings = {"allocation": "uniform", "structures": structures, "refit": refit, "ratio": RATIO}
    settings |= {"allocation": "local", "protect_first": 0, "protect_last": 0} if structures == BOTH else {}
    store, stage = shapes.prepare(tmp_path / "cut", model=folder, samples=16, **settings)
    run_here(store, stage)
    scores, kept, metrics = scores_of(store), kept_of(store, stage), metrics_of(store, stage)
    model = AutoModelForCausalLM.from_pretrained(store.handle(stage.id).artifact)
    assert metrics["parameters"] == sum(it.numel() for it in model.state_dict().values())
    assert metrics["ratio_reached"] >= RATIO
    for units in open_checkpoint(folder).pruned_kinds(structures):
        for layer, rows in enumerate(kept[units.kind]):
            scores_EN = scores[score_name(layer, "entropy", units.kind)].view(units.parts, -1)
            count, width = len(rows) // units.parts, scores_EN.shape[1]
            best = [row.topk(count).indices.sort().values + width * it for it, row in enumerate(scores_EN)]
            assert rows == torch.cat(best).tolist()
            for field in units.fields if rows else ():
                assert getattr(model.config, field) == metrics[field] == len(rows) // units.copies * units.fields[field]
