"""Scores of a checkpoint whose layers differ in units: those of the dense model with the missing units masked."""

import pytest
import torch
from core_definition import definition, moments, weight_taylor
from damage import nothing_reaches_the_disk
from families_masked import masked
from masking import write
from safetensors.torch import load_file
from tiny import importance_stage, save_tiny, write_documents
from worlds import Ranks, run_in_threads, without_deepspeed

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core.elimination import elimination_scores
from hfprune_dist.core.selection import entries_of
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.score_names import SCORES, scores_of_layers

SEED, LAYERS, QUERIES, HEAD_DIM, NEURONS = 3, 3, 2, 4, 40
HEADS = {"num_key_value_heads": 4, "num_attention_heads": 4 * QUERIES}
DEFINED = ["activation_l1", "cross_entropy", "entropy", "fisher_signs"]
CRITERIA = [*DEFINED, "magnitude", "random", "surgeon", "weight_taylor"]
# Kind -> its output projection, and channels of a unit.
OUTPUTS = {"neurons": ("mlp.down_proj", 1), "kv_groups": ("self_attn.o_proj", QUERIES * HEAD_DIM)}


@pytest.fixture(scope="module", autouse=True)
def patch():
    with pytest.MonkeyPatch.context() as patch, nothing_reaches_the_disk():
        without_deepspeed(patch)
        yield patch


def some(count, size, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size].sort().values


KEPT = Kept.of_all_layers(
    {
        "neurons": [some(NEURONS, 11, 0), torch.arange(NEURONS), some(NEURONS, 30, 1)],
        "kv_groups": [some(4, 3, 2), some(4, 1, 3), torch.arange(4)],
    }
)


def test_what_layers_lack_is_as_if_it_were_masked_on_any_number_of_ranks(tmp_path):
    shape = {**HEADS, "num_hidden_layers": LAYERS, "intermediate_size": NEURONS}
    checkpoint = open_checkpoint(save_tiny(tmp_path / "dense", **shape))
    write(checkpoint, KEPT, tmp_path / "model")
    write_documents(tmp_path / "text.jsonl")
    calibration = {"samples": 4, "sequence_length": 16, "micro_batch_size": 1, "shard_size": 1, "text_field": "text"}
    params = {"calibration": calibration, "criteria": CRITERIA, "dtype": "float32"}
    params |= {"add_bos_token": True, "seed": SEED, "structures": ["neurons", "kv_groups"]}
    stage = importance_stage(tmp_path, "per layer", params)
    stores = [Store(tmp_path / f"on {ranks}") for ranks in (1, 2)]
    for ranks, store in enumerate(stores, start=1):
        run_in_threads(store, stage, Ranks(ranks))
    folders = [store.handle(stage.id).artifact for store in stores]
    assert (folders[0] / SCORES).read_bytes() == (folders[1] / SCORES).read_bytes()

    scores, windows = load_file(folders[0] / SCORES), load_file(folders[0] / "windows.safetensors")["input_ids"]
    dense = masked(checkpoint, KEPT)
    for kind, (output, channels) in OUTPUTS.items():
        for name in DEFINED:
            expected = definition(dense, windows, name, SEED, channels, output)
            for layer, found_K in enumerate(scores_of_layers(scores, name, kind)):
                kept_K = KEPT.of_layer(layer, kind)
                assert (found_K - expected[layer, kept_K]).norm() < 1e-4 * expected[layer].norm() + 1e-12, name
        expected = weight_taylor(dense, windows, {"neurons": NEURONS, "kv_groups": 4}[kind], output)
        for layer, found_K in enumerate(scores_of_layers(scores, "weight_taylor", kind)):
            torch.testing.assert_close(found_K, expected[layer, KEPT.of_layer(layer, kind)], rtol=1e-3, atol=1e-9)
        for layer, (gram, curvature, fisher) in enumerate(moments(dense, windows, SEED, channels, output)):
            kept_K = KEPT.of_layer(layer, kind)
            own = entries_of(kept_K, channels)
            weight = dense.model.layers[layer].get_submodule(output).weight.detach()[:, own]
            expected = elimination_scores(gram[own][:, own], curvature, weight, fisher[kept_K])
            found_K = scores_of_layers(scores, "surgeon", kind)[layer]
            torch.testing.assert_close(found_K, expected, rtol=2e-2, atol=1e-12)
            assert [len(scores_of_layers(scores, it, kind)[layer]) for it in CRITERIA] == [len(kept_K)] * len(CRITERIA)
