"""The layer-by-layer pass of the importance stage, on real ranks: what a resume may not change."""

import torch
from forks import on_ranks
from tiny import save_tiny, write_documents

from hfprune_dist.artifacts import Store
from hfprune_dist.config import RuntimeConfig
from hfprune_dist.identity import FileHashes
from hfprune_dist.parallel import zero3  # noqa: F401  imported here once, not in every fork
from hfprune_dist.parallel.layerwise import LayerStream
from hfprune_dist.plan import Input, Stage
from hfprune_dist.progress import Progress
from hfprune_dist.stages import importance
from hfprune_dist.stages.context import Context

LAYERS = 3


def make_stage(folder, variant="llama", dtype="float32", criteria=("entropy", "surgeon")):
    save_tiny(folder / "model", variant, num_hidden_layers=LAYERS)
    write_documents(folder / "text.jsonl")
    calibration = {"samples": 6, "sequence_length": 24, "micro_batch_size": 1, "shard_size": 2, "text_field": "text"}
    params = {
        "calibration": {**calibration, "settled": None},
        "criteria": sorted(criteria),
        "dtype": dtype,
        "add_bos_token": True,
        "seed": 3,
    }
    hashes = FileHashes(None)
    inputs = {
        "model": Input(hashes.of_folder(folder / "model"), str(folder / "model")),
        "calibration": Input(hashes.of_file(folder / "text.jsonl"), str(folder / "text.jsonl")),
    }
    return Stage("importance", variant, params, inputs)


def run(store, stage, world):
    store.work(stage.id).mkdir(parents=True, exist_ok=True)
    importance.run(Context(stage, store, world, RuntimeConfig(), Progress(None), {}, {}, 1))


def files_of(store, stage):
    return {file.name: file.read_bytes() for file in store.path(stage.id).glob("*.safetensors")}


def killed_at(layer):
    """What makes ``LayerStream.grams`` the last thing that a rank does."""
    original = LayerStream.grams

    def grams(self, number, *rest):
        if number == layer:
            raise RuntimeError("killed")
        return original(self, number, *rest)

    return grams


def test_a_resume_in_the_second_pass_has_the_bits_of_a_model_with_biases(tmp_path, monkeypatch):
    """A process that resumes there never loads a sharded model, for which DeepSpeed replaces torch's linear."""
    stage = make_stage(tmp_path, "qwen2", "bfloat16")
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "store")
    assert on_ranks(1, lambda world: run(whole, stage, world)).codes == [0]
    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "grams", killed_at(1))
        assert on_ranks(1, lambda world: run(store, stage, world)).codes == [1]
    assert on_ranks(1, lambda world: run(store, stage, world)).codes == [0]
    assert files_of(store, stage) == files_of(whole, stage)
    assert not torch.distributed.is_initialized()
