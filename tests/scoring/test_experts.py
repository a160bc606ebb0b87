"""Neurons of experts, shared ones and those of dense layers beside them, from the stage's first window to its file."""

import pytest
from damage import nothing_reaches_the_disk
from families import EXPERTS, save_model
from safetensors.torch import load_file
from tiny import importance_stage, write_documents
from worlds import Ranks, run_in_threads, without_deepspeed

from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures.score_names import SCORES

SEED, VOCABULARY, KIND = 3, 264, "expert_neurons"
NAMES = sorted(name for name, it in CRITERIA.items() if it.is_of_experts)


@pytest.fixture
def threads(monkeypatch):
    with nothing_reaches_the_disk():
        without_deepspeed(monkeypatch)
        yield


def stage_of(folder, model_type, criteria=NAMES, dtype="float32", **calibration):
    save_model(folder / "model", model_type, vocab_size=VOCABULARY)
    write_documents(folder / "text.jsonl")
    calibration = {"samples": 4, "sequence_length": 12, "micro_batch_size": 1, "shard_size": 1, **calibration}
    params = {"calibration": {**calibration, "text_field": "text", "settled": None}, "criteria": list(criteria)}
    return importance_stage(folder, model_type, {**params, "dtype": dtype, "add_bos_token": True, "seed": SEED})


def files_of(store, stage):
    return {file.name: file.read_bytes() for file in store.path(stage.id).glob("*.safetensors")}


@pytest.mark.parametrize("model_type", EXPERTS)
def test_scores_are_as_defined_in_every_family(tmp_path, model_type, threads):
    store, stage = Store(tmp_path / "store"), stage_of(tmp_path, model_type)
    run_in_threads(store, stage, Ranks(1))
    print(load_file(store.path(stage.id) / SCORES).keys())
