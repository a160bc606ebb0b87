"""LoRAP's cut by the stage: the ratio, and the same bits on any number of ranks. What it writes is tested with model
families in checkpoints/.
"""

import pytest
import shapes
import torch
from ranks import run_here
from shapes import LAYERS, outcome
from transformers import AutoModelForCausalLM
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(("variant", "ratio", "cut"), [("qwen2", 0.45, PROJECTIONS), ("llama", 0.15, PROJECTIONS[:2])])
def test_any_number_of_ranks_reaches_the_ratio_by_the_same_factors(tmp_path, variant, ratio, cut):
    """Of nine windows in micro-batches of two, the sixth rank gets none."""
    outcomes = []
    for size in (1, 6):
        settings = {"allocation": "low_rank", "criterion": "lorap", "refit": "none", "structures": ["neurons"]}
        store, stage = shapes.prepare(tmp_path / str(size), variant, ratio=ratio, **settings)
        Ranks(size).run(lambda world, store=store, stage=stage: run_here(store, stage, world))
        outcomes.append(outcome(store, stage))
    assert outcomes[0] == outcomes[1]
    metrics, folder = outcomes[0][1], store.handle(stage.id).artifact
    assert {*metrics["attention_ranks"]} == {*cut}
    checkpoint, dense = open_checkpoint(folder), open_checkpoint(tmp_path / "1" / "model")
    assert metrics["ratio_reached"] == pytest.approx(1 - checkpoint.parameters / dense.parameters)
    assert abs(metrics["ratio_reached"] - ratio) <= 0.51 * LAYERS * dense.parameters_per_unit / dense.parameters
    remote, ids = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), torch.arange(12)[None] + 3
    cached, anew = (remote.generate(ids, max_new_tokens=4, do_sample=False, use_cache=on) for on in (True, False))
    assert cached.equal(anew) and cached.shape[1] > 12
