"""Shapes whose layers lose the same share: cut, refitted, loaded, and the same on any number of ranks."""

import pytest
import shapes
import torch
from forks import on_ranks
from masking import mask, read_kept
from ranks import SoloWorld
from shapes import GROUPS, LAYERS, NEURONS, kept_of, load, metrics_of, outcome, scores_of
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm

BOTH = ["neurons", "kv_groups"]


def prepare(folder, variant="llama", **changes):
    settings = {"allocation": "local", "refit": "none", "structures": BOTH, "protect_first": 0, "protect_last": 0}
    return shapes.prepare(folder, variant, **{**settings, "ratio": 0.2, **changes})


def assert_highest_stay(store, kept, criterion="entropy"):
    scores = scores_of(store)
    for kind, name in (("neurons", criterion), ("kv_groups", f"kv_groups.{criterion}")):
        for layer, row in enumerate(kept[kind]):
            assert row == sorted(scores[f"layers.{layer}.{name}"].topk(len(row)).indices.tolist())


@pytest.mark.parametrize(
    ("variant", "refit", "written"),
    [
        ("llama", "none", "mistral"),  # six heads don't divide 32
        ("llama-tied-biases", "dense", "llama"),
    ],
)
def test_without_protected_layers_all_are_alike_in_a_plain_checkpoint(tmp_path, variant, refit, written):
    store, stage = prepare(tmp_path, variant, refit=refit)
    shapes.run(store, stage, SoloWorld())
    metrics, kept = metrics_of(store, stage), kept_of(store, stage)
    assert {len(kept[kind]) for kind in BOTH} == {LAYERS}
    ((groups,), (width,)) = ({len(row) for row in kept[kind]} for kind in ("kv_groups", "neurons"))
    assert groups == (2 if variant == "llama-tied-biases" else 3) and width < NEURONS
    assert_highest_stay(store, kept)
    checkpoint = open_checkpoint(tmp_path / "model")
    step = LAYERS * checkpoint.parameters_per_unit / checkpoint.parameters
    assert abs(metrics["ratio_reached"] - 0.2) <= 0.51 * step
    folder = store.path(stage.id)
    assert open_checkpoint(folder).is_plain and open_checkpoint(folder).config["model_type"] == written
    plain = load(folder)
    assert sum(it.numel() for it in plain.parameters()) == metrics["parameters"]
    if refit == "none":
        ids = torch.arange(12)[None] + 3
        expected = mask(load_causal_lm(tmp_path / "model", torch.float32), read_kept(folder))
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


def test_protected_layers_stay_whole_and_the_others_lose_more(tmp_path):
    store, stage = prepare(tmp_path, "qwen2", refit="block", protect_first=1, protect_last=1)
    shapes.run(store, stage, SoloWorld())
    metrics, kept, folder = metrics_of(store, stage), kept_of(store, stage), store.path(stage.id)
    assert [len(row) for row in kept["kv_groups"]] == [GROUPS, 2, 2, GROUPS]
    first, *middle, last = (len(row) for row in kept["neurons"])
    assert first == last == NEURONS and len(set(middle)) == 1 and middle[0] < NEURONS
    assert_highest_stay(store, kept)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert abs(metrics["ratio_reached"] - 0.2) <= 0.51 * 2 * checkpoint.parameters_per_unit / checkpoint.parameters
    assert not open_checkpoint(folder).is_plain
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        assert torch.equal(load_causal_lm(folder, torch.float32)(ids).logits, remote(ids).logits)


def test_any_number_of_ranks_writes_the_same_bits(tmp_path):
    outcomes = []
    for ranks in (1, 3):
        store, stage = prepare(tmp_path / str(ranks), refit="layerwise", protect_first=1)
        if ranks == 1:
            shapes.run(store, stage, SoloWorld())
        else:
            ended = on_ranks(ranks, lambda world, store=store, stage=stage: shapes.run(store, stage, world))
            assert ended.codes == [0] * ranks, ended.messages
        outcomes.append(outcome(store, stage))
    assert outcomes[0] == outcomes[1]
