"""Every architecture that can be pruned, compared with transformers and autograd on a tiny random model of it."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from core_definition import definition
from families import ALL_SEEING, EXPERTS, FAMILIES, SEEING, SHAPE, save_model
from families_lora import trained_and_merged
from families_masked import assert_same, dense_of, kinds_of, load, masked, some_kept, through_layers, two_layers
from families_ranks import assert_two_ranks_have_the_bits_of_one
from masking import write
from more_families import MORE_EXPERTS
from ranks import SoloWorld
from refitting import refit
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.families import _UNFIT
from hfprune_dist.checkpoints.layer_settings import of_layers, undroppable_layers
from hfprune_dist.checkpoints.pruned_config import is_plain
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.models.after_head import after_head
from hfprune_dist.models.distillation_head import DistillingHead
from hfprune_dist.models.loading import load_causal_lm, require_own_weights
from hfprune_dist.scoring.shard_scorer import ShardScorer
from hfprune_dist.structures.kept import Kept

README = Path(__file__).parents[2] / "hfprune_dist" / "checkpoints" / "README.md"
CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))
ENTROPY = CRITERIA["entropy"]
every_family = pytest.mark.parametrize("model_type", FAMILIES)
every_decoder = pytest.mark.parametrize("model_type", FAMILIES | SEEING)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A family's checkpoint, shared by all tests."""
    return functools.cache(lambda name: open_checkpoint(save_model(tmp_path_factory.mktemp(name) / "model", name)))


@torch.no_grad()
def logits_of(model):
    return model(input_ids=WINDOWS, use_cache=False).logits


def scorer_of(checkpoint, world, criteria=(ENTROPY,)):
    options = {"seed": 0, "micro_batch_size": 1, "world": world, "structures": kinds_of(checkpoint)}
    options["sharding"] = "zero3" if world.size > 1 else "replicate"
    return ShardScorer(checkpoint, torch.float32, WINDOWS, list(criteria), **options)


@every_decoder
def test_scores_are_those_of_autograd(checkpoint_of, model_type):
    checkpoint = checkpoint_of(model_type)
    require_own_weights(checkpoint)
    sums = scorer_of(checkpoint, SoloWorld()).score([range(2)])
    model = dense_of(checkpoint)
    for kind in kinds_of(checkpoint):
        units = checkpoint.structures[kind]
        expected = definition(model, WINDOWS[:2], channels=units.channels_per_unit, output=units.output)
        found = sums.kinds[kind].exact["entropy"]
        for layer, count in enumerate(units.counts):
            assert (found[layer, :count] - expected[layer]).norm() < 1e-4 * expected[layer].norm(), (kind, layer)


@every_decoder
def test_products_of_neurons_weights_are_those_of_autograd(checkpoint_of, model_type):
    """Also where gate and up are one matrix."""
    checkpoint = checkpoint_of(model_type)
    criteria = [CRITERIA["coupled_taylor"]]
    found = scorer_of(checkpoint, SoloWorld(), criteria).score([range(2)]).kinds["neurons"].exact
    units, model = checkpoint.units, dense_of(checkpoint).double().requires_grad_()
    expected = {name: [0.0] * units.num_layers for name in found}
    for window in WINDOWS[:2]:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(input_ids=window[None]).logits[0, :-1], window[1:]).backward()
        for layer in range(units.num_layers):
            whole = [model.get_parameter(name) for name in (*units.row_weights(layer), units.output_weight(layer))]
            *rows, columns = [(it.detach() * it.grad) for it in whole]
            products = [part for it, parts in zip(rows, units.row_parts, strict=True) for part in it.chunk(parts)]
            products.append(columns.T)
            expected["coupled_taylor"][layer] += sum(products).abs().mean(dim=1)
    for name, each in expected.items():
        for layer, scores_U in enumerate(each):
            ours_U = found[name][layer, : len(scores_U)]
            assert (ours_U - scores_U).norm() < 1e-3 * scores_U.norm(), (name, layer)


@every_decoder
def test_a_plain_checkpoint_is_the_masked_model(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    kept = some_kept(checkpoint, two_layers(checkpoint), (15, 15))
    assert is_plain(checkpoint, kept.shape)
    write(checkpoint, kept, tmp_path)
    smaller = open_checkpoint(tmp_path)
    require_own_weights(smaller)
    loaded = load(tmp_path)
    assert not list(tmp_path.glob("*.py")) and type(loaded).__module__.startswith("transformers.")
    assert_same(logits_of(loaded), logits_of(masked(checkpoint, kept)))
    assert smaller.parameters == checkpoint.parameter_counts.of(kept.shape)
    assert smaller.parameters == sum(
        it.numel() for it in {it.data_ptr(): it for it in loaded.state_dict().values()}.values()
    )
    assert all(smaller.config[key] == value for key, value in unchanged(checkpoint, smaller).items())


def unchanged(checkpoint, smaller):
    """Return the entries of config.json that describe neither units nor layers."""
    fields = {field for units in checkpoint.structures.values() for field in units.fields}
    ours = {
        *fields,
        "head_dim",
        "per_layer_config",
        "num_hidden_layers",
        "layer_types",
        "no_rope_layers",
        "layer_rope_theta",
        "max_window_layers",
        "attn_layer_indices",
    }
    return {key: value for key, value in checkpoint.config.items() if key not in ours}


def test_an_older_name_of_the_width_follows(tmp_path):
    """Files of lfm2 use block_ff_dim and full_attn_idxs, which its configuration class reads first."""
    folder = save_model(tmp_path / "dense", "lfm2")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key in ("intermediate_size", "layer_types", "block_auto_adjust_ff_dim"):
        config.pop(key, None)
    file.write_text(json.dumps(config | {"intermediate_size": 99, "block_ff_dim": 24, "full_attn_idxs": [1]}))
    checkpoint = open_checkpoint(folder)
    kept = some_kept(checkpoint, (0, 1), (15, 15))
    write(checkpoint, kept, tmp_path / "pruned")
    assert_same(logits_of(load(tmp_path / "pruned")), logits_of(masked(checkpoint, kept)))
    smaller = open_checkpoint(tmp_path / "pruned").config
    assert (smaller["intermediate_size"], smaller["block_ff_dim"], smaller["full_attn_idxs"]) == (15, 15, [1])


def test_the_number_of_layers_follows_whatever_it_is_called(tmp_path):
    """Files of exaone use num_layers, and name a class that transformers doesn't have."""
    folder = save_model(tmp_path / "dense", "exaone")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    told = {"num_layers": config.pop("num_hidden_layers"), "architectures": ["ExaoneForCausalLM"]}
    file.write_text(json.dumps(config | told))
    checkpoint = open_checkpoint(folder)
    kept = some_kept(checkpoint, (0, 1), (15, 15))
    write(checkpoint, kept, tmp_path / "pruned")
    assert_same(logits_of(load(tmp_path / "pruned")), logits_of(masked(checkpoint, kept)))
    assert open_checkpoint(tmp_path / "pruned").config["num_layers"] == 2


@every_family
def test_layers_that_differ_load_with_their_code_and_are_pruned_again(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    kept = some_kept(checkpoint, (1, 2), (9, 20))  # one of each kind, if there are several
    write(checkpoint, kept, tmp_path / "once")
    expected = logits_of(masked(checkpoint, kept))
    loaded = load(tmp_path / "once", trust_remote_code=True)
    assert_same(logits_of(loaded), expected)
    body = AutoModel.from_pretrained(tmp_path / "once", trust_remote_code=True).eval()
    with torch.no_grad():
        outputs = [it(input_ids=WINDOWS).last_hidden_state for it in (body, loaded.base_model)]
    assert torch.equal(*outputs)
    smaller = open_checkpoint(tmp_path / "once")
    assert not smaller.is_plain
    assert_same(logits_of(load_causal_lm(tmp_path / "once", torch.float32)), expected)
    second = Kept((0, 1), {"neurons": [torch.arange(7)] * 2})
    write(smaller, second, tmp_path / "twice")
    twice = load_causal_lm(tmp_path / "twice", torch.float32)
    assert_same(logits_of(twice), logits_of(masked(smaller, second)))


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
@pytest.mark.parametrize("as_published", [True, False])
def test_layers_of_a_kind_that_has_fewer_heads_leave_a_checkpoint_plain(tmp_path, model_type, as_published):
    """What the files of its authors say by two keys, transformers saves as settings of single layers."""
    fewer = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16}
    folder = save_model(tmp_path / "dense", model_type, **fewer)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert config["per_layer_config"]["1"] == {"head_dim": 16, "num_key_value_heads": 1}
    if as_published:
        config.pop("per_layer_config")
        file.write_text(json.dumps(config | fewer))
    checkpoint = open_checkpoint(folder)
    kept = some_kept(checkpoint, (0, 2), (15, 15))
    assert checkpoint.is_plain and is_plain(checkpoint, kept.shape)
    assert_same(logits_of(load_causal_lm(folder, torch.float32)), logits_of(load(folder)))
    write(checkpoint, kept, tmp_path / "pruned")
    assert_same(logits_of(load_causal_lm(tmp_path / "pruned", torch.float32)), logits_of(masked(checkpoint, kept)))


@every_decoder
@torch.no_grad()
def test_layer_after_layer_is_the_whole_model(checkpoint_of, model_type):
    checkpoint = checkpoint_of(model_type)
    for dtype in (torch.float32, torch.bfloat16):
        model = dense_of(checkpoint) if dtype == torch.float32 else load_causal_lm(checkpoint.path, dtype)
        reader, hidden_BTC, logits = through_layers(checkpoint, model, WINDOWS)
        ((_, logits_NV),) = reader.head().outputs(hidden_BTC).logits()
        error = (logits_NV - logits.flatten(0, 1).float()).abs().max()
        assert error <= (1e-6 if dtype == torch.float32 else 1e-2) * logits.abs().max()


@every_decoder
def test_refits_lower_the_error(checkpoint_of, tmp_path, model_type):
    """One layer after another, where the family allows that, and all layers on dense activations."""
    checkpoint = checkpoint_of(model_type)
    windows_ST = torch.randint(3, 64, (24, 12), generator=torch.Generator().manual_seed(2))
    options = {"world": SoloWorld(), "windows_ST": windows_ST, "micro_batch_size": 6}
    dense_STV = log_probabilities(dense_of(checkpoint), windows_ST)

    def lost(model):
        return (dense_STV.exp() * (dense_STV - log_probabilities(model, windows_ST))).sum()

    attention = {"kv_groups": groups_kept(model_type)} if "kv_groups" in kinds_of(checkpoint) else {}
    refits = [(("dense",), attention)]
    if not checkpoint.family.no_sequence:
        refits = [(("dense", "layerwise"), attention), (("block",), {})]
    for methods, others in refits:
        kept = Kept(tuple(range(3)), {"neurons": [torch.arange(2, 20)] * 3, **others})
        write(checkpoint, kept, tmp_path / methods[0])
        cut, before = load_causal_lm(tmp_path / methods[0], torch.float32), lost(masked(checkpoint, kept))
        for method in methods:
            fitted = refit(method, checkpoint, kept, tmp_path / f"{method} fit", **options)
            assert lost(with_weights(cut, checkpoint, fitted)) < before, method
            for fit in (fit for report in fitted.reports(range(3)) for fit in report.values()):
                assert fit.error_after < fit.error_before or fit.error_before < 1e-9, method


@torch.no_grad()
def log_probabilities(model, windows_ST):
    return model(input_ids=windows_ST).logits.log_softmax(-1)


def groups_kept(model_type):
    """Return some KV groups of each layer; models of images must stay plain."""
    others = torch.tensor([1]) if model_type in SEEING else torch.arange(2)
    return [torch.tensor([0]), others, others]


def with_weights(model, checkpoint, fitted):
    """Return a copy of a pruned model that has refitted weights."""
    model = copy.deepcopy(model)
    for number in range(3):
        prefix = checkpoint.units.tensor(number, "")
        for name, weight in fitted.weights(number, like=torch.zeros(1)).items():
            model.get_parameter(prefix + name).data = weight
    return model


@every_family
def test_layers_that_are_told_apart_by_their_number_stay(model_type):
    """Where config.json doesn't list the kinds of layers, the configuration class may make such a list."""
    needed = {key: value for key, value in FAMILIES[model_type].items() if key.startswith("mamba_")}
    made = CONFIG_MAPPING[model_type](**SHAPE | needed | {"num_hidden_layers": 12}).to_dict()
    lists = [key for key in ("layer_types", "no_rope_layers") if len(set(map(str, made.get(key) or []))) > 1]
    stated = {key: value for key, value in made.items() if key not in lists and "interval" not in key}
    assert bool(undroppable_layers(stated)) == bool(lists)
    kinds = made.get("layer_types") or []
    attending = [number for number, kind in enumerate(kinds) if kind not in ("conv", "linear_attention", "mamba")]
    last = attending[-1:] if len(attending) < len(kinds) else []
    assert list(undroppable_layers(made)) == ([11] if model_type.startswith("gemma4") else last)
    smaller = of_layers(made, range(1, 12))
    assert all(smaller[key] == list(made[key][1:]) for key in lists)


@every_decoder
@torch.no_grad()
def test_distillation_compares_the_logits_that_count(checkpoint_of, model_type):
    checkpoint = checkpoint_of(model_type)
    dense, model = dense_of(checkpoint), masked(checkpoint, some_kept(checkpoint, range(3), (15,) * 3))
    log_p, log_q = (logits_of(it).log_softmax(-1) for it in (dense, model))
    head = DistillingHead(model, checkpoint.family, after_head(checkpoint))
    dense_BTC = checkpoint.family.body_of(dense)(input_ids=WINDOWS, use_cache=False).last_hidden_state
    head.expect(dense_BTC, len(WINDOWS))
    expected = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=0.0)


@every_decoder
def test_lora_trains_and_merges(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    model = trained_and_merged(checkpoint, tmp_path, WINDOWS)
    ours, theirs = logits_of(load(tmp_path / "merged")), logits_of(model)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_adapters_are_told_by_blocks_only_where_names_mislead(tmp_path):
    """Norms of all heads are matrices, but no linear layers; without convolutions, no other layer has a name alike."""
    normed = open_checkpoint(save_model(tmp_path / "normed", "cohere", use_qk_norm=True))
    assert len(normed.tensors["model.layers.0.self_attn.q_norm.weight"].shape) == 2
    full = open_checkpoint(save_model(tmp_path / "full", "lfm2", layer_types=["full_attention"] * 3))
    assert not normed.family.adapted_attention and not full.family.adapted_attention


@every_decoder
def test_pairs_that_share_a_row_of_training_do_not_see_each_other_where_the_family_says_so(checkpoint_of, model_type):
    assert_pairs_are_apart_where_the_family_says_so(checkpoint_of(model_type))


# Architectures of which some layers usually have no attention -> settings with which all have it.
_ALL_ATTEND: dict[str, dict[str, object]] = {
    "lfm2": {"layer_types": ["full_attention"] * 3},
    "qwen3_5_text": {"layer_types": ["full_attention"] * 3},
    "bamba": {"attn_layer_indices": [0, 1, 2]},
    "granitemoehybrid": {"layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
}
_WITHOUT_POSITIONS = {"layer_types": ["attention"] * 3, "position_embedding_type": None}


@pytest.mark.parametrize(("model_type", "settings"), [*_ALL_ATTEND.items(), ("granitemoehybrid", _WITHOUT_POSITIONS)])
def test_so_do_pairs_in_hybrids_of_which_all_layers_have_attention(tmp_path, model_type, settings):
    assert_pairs_are_apart_where_the_family_says_so(open_checkpoint(save_model(tmp_path, model_type, **settings)))


@torch.no_grad()
def assert_pairs_are_apart_where_the_family_says_so(checkpoint):
    model = load_causal_lm(checkpoint.path, torch.float32)
    alone = torch.cat([model(input_ids=WINDOWS[:1, part]).logits for part in (slice(0, 5), slice(5, 12))], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    together = model(input_ids=WINDOWS[:1], position_ids=positions, use_cache=False).logits
    if checkpoint.family.keeps_apart:
        assert_same(together, alone)
    else:
        assert (together - alone).abs().max() > 1e-2 * alone.abs().max()


def test_a_granitemoehybrid_of_attention_alone_is_pruned_like_decoders_that_are_no_hybrids(tmp_path):
    settings = _ALL_ATTEND["granitemoehybrid"]
    checkpoint = open_checkpoint(save_model(tmp_path / "dense", "granitemoehybrid", **settings))
    assert not checkpoint.family.no_low_rank and "kv_groups" in kinds_of(checkpoint)
    for neurons in ((15, 15), (9, 20)):
        kept = some_kept(checkpoint, (0, 2), neurons)
        folder = tmp_path / f"{neurons}"
        write(checkpoint, kept, folder)
        assert_same(logits_of(load_causal_lm(folder, torch.float32)), logits_of(masked(checkpoint, kept)))


def test_two_ranks_have_the_bits_of_one(checkpoint_of, tmp_path):
    checkpoints = {name: checkpoint_of(name) for name in FAMILIES | SEEING}
    assert_two_ranks_have_the_bits_of_one(checkpoints, scorer_of, tmp_path, shards=(range(1), range(1, 2)))


def test_the_readme_lists_what_is_covered(checkpoint_of, capsys):
    present = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {*FAMILIES, *EXPERTS, *MORE_EXPERTS} <= present
    tested = {*FAMILIES, *EXPERTS, *MORE_EXPERTS, *ALL_SEEING} & present
    without_experts = README.read_text().partition("### Mixtures of experts")[0]
    rows = [line.split("|")[1:-1] for line in without_experts.splitlines() if line.startswith("| `")]
    listed = {}
    for families, neurons, groups, layers, refits in rows:
        if neurons.strip() == "yes":
            assert layers.strip().startswith("yes")
            listed |= dict.fromkeys(re.findall(r"`(\w+)`", families), (groups, refits))
    assert listed.keys() == {*FAMILIES, *SEEING}
    for name, (groups, refits) in listed.items():
        family = checkpoint_of(name).family
        assert (groups.strip() == "yes") == (not family.whole_groups), name
        assert (refits.strip() == "all") == (not family.no_sequence), name
    with capsys.disabled():
        print(f"\n{len(tested)} of the {len(present)} causal language models of transformers are tested here")


def test_the_readme_lists_what_is_refused_by_name():
    listed = re.search(r"`_UNFIT` in `families.py`\):([^;]*);", README.read_text())
    assert listed and {*re.findall(r"`([\w-]+)`", listed[1])} == {*_UNFIT}
