"""Where Gram matrices of inputs don't fit, the importance stage makes them in a pass layer by layer."""

import pytest
import torch
from ranks import files_of, on_ranks, run_here
from safetensors.torch import load
from scoring import make_stage

from hfprune_dist.distributed import zero3  # noqa: F401  imported here once, not in every fork
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.scoring import shard_scorer
from hfprune_dist.stages import importance
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures.score_names import SCORES


def killed_at(layer):
    """Return a ``LayerStream.grams`` that kills its rank at a layer."""
    original = LayerStream.grams

    def grams(self, number, *rest):
        if number == layer:
            raise RuntimeError("killed")
        return original(self, number, *rest)

    return grams


@pytest.mark.parametrize(("variant", "dtype"), [("qwen2", "bfloat16"), ("llama", "float32")])
def test_a_second_pass_resumes_and_scores_as_one_pass_does(tmp_path, monkeypatch, variant, dtype):
    """A process that resumes there never loads a sharded model, for which DeepSpeed replaces torch's linear."""
    calibration = {"samples": 6, "sequence_length": 24, "micro_batch_size": 1, "shard_size": 2}
    scored = {"criteria": ["entropy", "surgeon"], "structures": ["neurons", "kv_groups"]}
    stage = make_stage(tmp_path, variant, dtype=dtype, sizes={"num_hidden_layers": 3}, **scored, **calibration)
    in_one, whole, store = (Store(tmp_path / name) for name in ("in one", "whole", "store"))
    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "grams", killed_at(0))
        assert on_ranks(1, lambda world: run_here(in_one, stage, world)) == [0]
    monkeypatch.setattr(shard_scorer, "OWN_TERMS_BYTES", 0)
    assert on_ranks(1, lambda world: run_here(whole, stage, world)) == [0]
    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "grams", killed_at(1))
        assert on_ranks(1, lambda world: run_here(store, stage, world)) == [1]
    monkeypatch.setattr(importance, "ShardScorer", None)  # the pass over all layers isn't run again
    assert on_ranks(1, lambda world: run_here(store, stage, world)) == [0]
    assert files_of(store, stage) == files_of(whole, stage)
    one, two = (load(files_of(it, stage)[SCORES]) for it in (in_one, whole))
    for name, scores_U in two.items():
        if dtype == "float32":
            torch.testing.assert_close(one[name], scores_U, rtol=1e-3, atol=1e-9)
