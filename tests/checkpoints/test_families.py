"""Every architecture that can be pruned, compared with transformers and autograd on a tiny random model of it."""

from __future__ import annotations

import functools

import pytest
import torch
from core_definition import definition
from families import EVERY, FAMILIES, SEEING, save_model
from families_lora import trained_and_merged
from families_masked import (
    WINDOWS,
    assert_same,
    dense_of,
    kinds_of,
    load,
    logits_of,
    masked,
    pruned_plainly,
    some_kept,
    through_layers,
    two_layers,
)
from masking import write
from ranks import SoloWorld, on_ranks
from refitting import refit
from shapes import divergence
from tiny import edit_json
from transformers import AutoModel

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.methods import CRITERIA
from hfprune_dist.models.loading import load_causal_lm, require_own_weights
from hfprune_dist.scoring.shard_scorer import ShardScorer
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.score_names import score_name

every_family = pytest.mark.parametrize("model_type", FAMILIES)
every_decoder = pytest.mark.parametrize("model_type", FAMILIES | SEEING)
every_model = pytest.mark.parametrize("model_type", EVERY)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A family's checkpoint, shared by all tests."""
    return functools.cache(lambda name: open_checkpoint(save_model(tmp_path_factory.mktemp(name) / "model", name)))


def scorer_of(checkpoint, world):
    options = {"seed": 0, "world": world, "structures": kinds_of(checkpoint)}
    options["sharding"] = "zero3" if world.size > 1 else "replicate"
    return ShardScorer(checkpoint, torch.float32, WINDOWS, [CRITERIA["entropy"]], **options)


@every_decoder
def test_a_plain_checkpoint_is_the_masked_model(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    pruned_plainly(checkpoint, some_kept(checkpoint, two_layers(checkpoint), (15, 15)), tmp_path)


@every_family
def test_layers_that_differ_load_with_their_code_and_are_pruned_again(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    kept = some_kept(checkpoint, (1, 2), (9, 20))  # one of each kind, if there are several
    write(checkpoint, kept, tmp_path / "once")
    expected = logits_of(masked(checkpoint, kept))
    loaded = load(tmp_path / "once", trust_remote_code=True)
    assert_same(logits_of(loaded), expected)
    smaller = open_checkpoint(tmp_path / "once")
    assert not smaller.is_plain
    second = Kept((0, 1), {"neurons": [torch.arange(7)] * 2})
    write(smaller, second, tmp_path / "twice")
    assert_same(logits_of(load_causal_lm(tmp_path / "twice", torch.float32)), logits_of(masked(smaller, second)))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_5_text", "opt"])
def test_the_body_alone_loads_with_the_same_code(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    write(checkpoint, some_kept(checkpoint, (1, 2), (9, 20)), tmp_path)
    loaded = load(tmp_path, trust_remote_code=True)
    body = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs = [model(input_ids=WINDOWS).last_hidden_state for model in (body, loaded.base_model)]
    assert torch.equal(*outputs)


@every_decoder
def test_scores_and_single_layers_are_those_of_the_whole_model(checkpoint_of, model_type):
    checkpoint, model = checkpoint_of(model_type), dense_of(checkpoint_of(model_type))
    require_own_weights(checkpoint)
    sums = scorer_of(checkpoint, SoloWorld()).score([range(1)])
    for kind in kinds_of(checkpoint):
        units = checkpoint.structures[kind]
        expected = definition(model, WINDOWS[:1], channels=units.channels_per_unit, output=units.output)
        for layer, count in enumerate(units.counts):
            found = sums.get(score_name(layer, "entropy", kind), torch.zeros(count))
            assert (found - expected[layer]).norm() < 1e-4 * expected[layer].norm(), (kind, layer)
    through_layers(checkpoint, model, WINDOWS)


@every_model
@torch.no_grad()
def test_pairs_that_share_a_row_of_training_do_not_see_each_other_where_the_family_says_so(checkpoint_of, model_type):
    assert_pairs_are_apart_where_the_family_says_so(checkpoint_of(model_type))


def assert_pairs_are_apart_where_the_family_says_so(checkpoint):
    model = load_causal_lm(checkpoint.path, torch.float32)
    alone = torch.cat([logits_of_part(model, slice(0, 5)), logits_of_part(model, slice(5, 12))], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    together = logits_of_part(model, slice(0, 12), position_ids=positions)
    if checkpoint.family.keeps_apart:
        assert_same(together, alone)
    else:
        assert (together - alone).abs().max() > 1e-2 * alone.abs().max()


@torch.no_grad()
def logits_of_part(model, part, **options):
    return model(input_ids=WINDOWS[:1, part], use_cache=False, **options).logits


# One for each kind of names, norms or head, and of what is left alone in mixtures of experts.
@pytest.mark.parametrize(
    "model_type",
    [
        *("llama", "phi3", "opt", "lfm2", "youtu", "gpt_neox", "gemma3"),
        *("afmoe", "deepseek_v32", "qwen3_next", "qwen3_5_moe"),
    ],
)
def test_lora_trains_and_merges(checkpoint_of, tmp_path, model_type):
    model = trained_and_merged(checkpoint_of(model_type), tmp_path, WINDOWS)
    ours, theirs = logits_of(load(tmp_path / "merged")), logits_of(model)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


# One for each arrangement of norms, and for each kind of MLP.
@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "olmo2", "granite", "lfm3", "bamba", "phi", "phi3", "apertus"]
)
def test_refits_lower_the_error(checkpoint_of, tmp_path, model_type):
    """One layer after another, where the family allows that, or all layers on dense activations."""
    checkpoint = checkpoint_of(model_type)
    windows_ST = torch.randint(3, 64, (24, 12), generator=torch.Generator().manual_seed(2))

    def lost(folder):
        return divergence(dense_of(checkpoint), load_causal_lm(folder, torch.float32), windows_ST)

    kept = Kept.of_all_layers({"neurons": [torch.arange(2, 20)] * 3})
    write(checkpoint, kept, tmp_path / "cut")
    for method in ["dense"] if checkpoint.family.no_sequence else ["layerwise", "block"]:
        options = {"world": SoloWorld(), "windows_ST": windows_ST, "micro_batch_size": 6}
        fitted = refit(method, checkpoint, kept, tmp_path / f"{method} fit", **options)
        write(checkpoint, kept, tmp_path / method, fitted.replacements(kept.layers))
        assert lost(tmp_path / method) < lost(tmp_path / "cut"), method


def edited(folder, *gone, **changes):
    """Change entries of a folder's config.json, and open it."""
    edit_json(folder / "config.json", *gone, **changes)
    return open_checkpoint(folder)


def assert_prunable(checkpoint, folder, layers=(0, 1)):
    """Check that a pruned checkpoint is the masked model; return the settings of the former."""
    smaller, _ = pruned_plainly(checkpoint, some_kept(checkpoint, layers, (15, 15)), folder)
    return smaller.config


def test_older_names_of_widths_and_layers_follow(tmp_path):
    """Files of lfm2 use block_ff_dim and full_attn_idxs, which its class reads first; those of exaone num_layers."""
    gone = ("intermediate_size", "layer_types", "block_auto_adjust_ff_dim")
    changes = {"intermediate_size": 99, "block_ff_dim": 24, "full_attn_idxs": [1]}
    smaller = assert_prunable(edited(save_model(tmp_path / "lfm2", "lfm2"), *gone, **changes), tmp_path / "a")
    assert (smaller["intermediate_size"], smaller["block_ff_dim"], smaller["full_attn_idxs"]) == (15, 15, [1])
    told = {"num_layers": 3, "architectures": ["ExaoneForCausalLM"]}
    checkpoint = edited(save_model(tmp_path / "exaone", "exaone"), "num_hidden_layers", **told)
    assert assert_prunable(checkpoint, tmp_path / "b")["num_layers"] == 2


@pytest.mark.parametrize("as_published", [True, False])
def test_layers_of_a_kind_that_has_fewer_heads_leave_a_checkpoint_plain(tmp_path, as_published):
    """What the files of its authors say by two keys, transformers saves as settings of single layers."""
    fewer = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16}
    folder = save_model(tmp_path / "dense", "gemma4_text", **fewer)
    checkpoint = edited(folder, "per_layer_config", **fewer) if as_published else open_checkpoint(folder)
    assert_prunable(checkpoint, tmp_path / "pruned", (0, 2))


@pytest.mark.parametrize("positions", ["rope", None])
def test_a_hybrid_of_attention_alone_is_pruned_like_decoders_that_are_none(tmp_path, positions):
    settings = {"layer_types": ["attention"] * 3, "position_embedding_type": positions}
    checkpoint = open_checkpoint(save_model(tmp_path / "dense", "granitemoehybrid", **settings))
    assert not checkpoint.family.no_low_rank and "kv_groups" in kinds_of(checkpoint)
    assert_pairs_are_apart_where_the_family_says_so(checkpoint)
    assert_prunable(checkpoint, tmp_path / "pruned", (0, 2))


def test_two_ranks_have_the_bits_of_one(tmp_path):
    """Each scores its own window, with MLPs large enough to be sharded; one rank scores both in turn."""
    sizes = {"hidden_size": 256, "intermediate_size": 416, "ffn_dim": 416, "mamba_d_head": 64}
    names = "gemma2", "bamba", "opt"
    checkpoints = {name: open_checkpoint(save_model(tmp_path / name, name, **sizes)) for name in names}

    def sums_of(name, world, *windows):
        scorer = scorer_of(checkpoints[name], world)
        sums = [scorer.score([range(window, window + 1)]) for window in windows]
        scorer.release()
        return sums

    def act(world):
        from hfprune_dist.distributed.zero3 import init_deepspeed

        init_deepspeed(world)
        torch.save({name: sums_of(name, world, world.rank) for name in checkpoints}, tmp_path / f"{world.rank}.pt")

    assert on_ranks(2, act) == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in checkpoints:
        for rank, expected in enumerate(sums_of(name, SoloWorld(), 0, 1)):
            (sums,) = found[rank][name]
            assert all(torch.equal(sums[kind], own) for kind, own in expected.items()), (rank, name)
