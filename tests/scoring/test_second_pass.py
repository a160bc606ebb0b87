"""The layer-by-layer pass of the importance stage, on real ranks: what a resume may not change."""

from ranks import on_ranks
from scoring import files_of, make_stage, run

from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.store.artifacts import Store


def killed_at(layer):
    """Return a ``LayerStream.grams`` that kills its rank at a layer."""
    original = LayerStream.grams

    def grams(self, number, *rest):
        if number == layer:
            raise RuntimeError("killed")
        return original(self, number, *rest)

    return grams


def test_a_resume_in_the_second_pass_has_the_bits_of_a_model_with_biases(tmp_path, monkeypatch):
    """A process that resumes there never loads a sharded model, for which DeepSpeed replaces torch's linear."""
    stage = make_stage(tmp_path, "qwen2", "bfloat16", structures=("neurons", "kv_groups"))
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "store")
    assert on_ranks(1, lambda world: run(whole, stage, world)) == [0]
    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "grams", killed_at(1))
        assert on_ranks(1, lambda world: run(store, stage, world)) == [1]
    assert on_ranks(1, lambda world: run(store, stage, world)) == [0]
    assert files_of(store, stage) == files_of(whole, stage)
